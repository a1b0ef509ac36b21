r"""`StaticChebConv` against the `ChebConv` of PyG that it replaces: equality first, then the time
of forward and backward, as a ratio of medians of interleaved runs."""

import statistics
import time

import torch
import tyro
from templates import blob
from torch_geometric.nn import ChebConv

from pyg_attnpool import StaticChebConv
from pyg_attnpool.mesh import MeshHierarchy


def main(num_vertices: int = 5023, batch_size: int = 16, K: int = 6, repeat: int = 7):
    edge_index = MeshHierarchy.from_template(blob(num_vertices), factors=[4]).edge_index(0)
    lambda_max = torch.tensor(2.0)
    print(
        f"{num_vertices} vertices, batch {batch_size}, K = {K}, {torch.get_num_threads()} threads"
    )
    for in_channels, out_channels in ((3, 16), (16, 16), (16, 32), (16, 3)):
        torch.manual_seed(0)
        theirs = ChebConv(in_channels, out_channels, K)
        ours = StaticChebConv(in_channels, out_channels, K, edge_index, num_vertices)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(batch_size, num_vertices, in_channels, requires_grad=True)
        cotangent = torch.randn(batch_size, num_vertices, out_channels)

        def step(run, layer, x=x, cotangent=cotangent):
            layer.zero_grad()
            x.grad = None
            start = time.perf_counter()
            out = run(x)
            out.backward(cotangent)
            seconds = time.perf_counter() - start
            return seconds, [out.detach(), x.grad, *(p.grad for p in layer.parameters())]

        def run_theirs(x, layer=theirs):
            return layer(x, edge_index, lambda_max=lambda_max)

        _, expected = step(run_theirs, theirs)
        _, got = step(ours, ours)
        errors = [
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)
        ]
        # Gradients of parameters are sums over all vertices and meshes, of which PyG's order of
        # summation leaves five digits.
        error = max(errors[:2])
        assert error < 1e-5 and max(errors) < 1e-4, errors
        times = [(step(run_theirs, theirs)[0], step(ours, ours)[0]) for _ in range(repeat)]
        slow, fast = (statistics.median(t) for t in zip(*times, strict=True))
        print(
            f"{in_channels:3} -> {out_channels:3}: largest relative difference {error:.1e}, "
            f"ChebConv takes {slow / fast:.1f} times as long"
        )


if __name__ == "__main__":
    tyro.cli(main)
