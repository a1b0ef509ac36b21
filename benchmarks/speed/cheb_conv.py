r"""`StaticChebConv` against the `ChebConv` of PyG that it replaces: equality first, then the time
of forward and backward, as a ratio of medians of interleaved runs."""

import torch
from torch_geometric.nn import ChebConv

from benchmarks.speed import measure
from benchmarks.speed.templates import blob
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

        def step(layer, *args, x=x, cotangent=cotangent, **kwargs):
            out = layer(x, *args, **kwargs)
            return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)]

        def step_theirs(layer=theirs, step=step):
            return step(layer, edge_index, lambda_max=lambda_max)

        # Gradients of parameters are sums over all vertices and meshes, of which PyG's order of
        # summation leaves five digits.
        names = [
            "output",
            "gradient of x",
            *(f"gradient of {n}" for n, _ in ours.named_parameters()),
        ]
        rtols = [1e-5, 1e-5, *(1e-4 for _ in ours.parameters())]
        found = zip(names, step(ours), step_theirs(), rtols, strict=True)
        differences = [measure.equal(*each) for each in found]
        runs = {"theirs": step_theirs, "ours": lambda layer=ours, step=step: step(layer)}
        seconds = measure.interleaved(runs, repeat, budget=60.0)
        print(
            f"{in_channels:3} -> {out_channels:3}: largest relative difference "
            f"{max(differences[:2]):.1e}, ChebConv takes {seconds['theirs'] / seconds['ours']:.1f} "
            f"times as long"
        )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
