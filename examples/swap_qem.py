r"""Learned aggregation in an autoencoder that you did not write. The model below is in the style of
SpiralNet++: it holds QEM's matrices in lists of sparse tensors and applies them by a function that
takes them apart. Nothing of it changes; two lines, marked below, swap the matrices and ship. Keys
come from the hierarchy's positions, or where there are none (--no-positions) from the matrices.

Reproduced on AnnyFaces (2,271 training meshes of 4,538 vertices, every eighth test mesh), 200
steps, seed 0, one thread of an Intel Xeon, error of the test meshes:

                                         QEM      learned       frozen
    positions                          1.541 mm     1.302 mm     1.302 mm
    --no-positions                     1.541 mm     1.381 mm     1.381 mm
    parameters                           92,099      404,885       92,099
"""

import copy
import os
from pathlib import Path
from time import perf_counter

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn import Linear, ModuleList

from pyg_attnpool import MeshHierarchy, freeze, swap_pooling
from pyg_attnpool.datasets import AnnyFaces
from pyg_attnpool.metrics import vertex_distances

# The model as it is ##################################################################


def pool(x: Tensor, trans: Tensor) -> Tensor:
    row, col = trans._indices()
    out = x.index_select(1, col) * trans._values().unsqueeze(-1)
    zeros = out.new_zeros(x.size(0), trans.size(0), x.size(2))
    return zeros.scatter_add(1, row.view(1, -1, 1).expand_as(out), out)


class SpiralConv(torch.nn.Module):
    def __init__(self, in_channels: int, out_channels: int, spirals: Tensor):
        super().__init__()
        self.spirals = spirals
        self.lin = Linear(in_channels * spirals.size(1), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.index_select(1, self.spirals.flatten())
        return self.lin(x.view(x.size(0), self.spirals.size(0), -1))


class Autoencoder(torch.nn.Module):
    def __init__(self, spirals, down, up, channels=(16, 16, 32), latent_channels=16):
        super().__init__()
        self.down_transform, self.up_transform = down, up
        self.channels, self.num_coarse = channels, down[-1].size(0)
        sizes = list(zip((3, *channels), channels, spirals, strict=False))
        self.encoder = ModuleList(SpiralConv(i, o, s) for i, o, s in sizes)
        self.to_latent = Linear(self.num_coarse * channels[-1], latent_channels)
        self.from_latent = Linear(latent_channels, self.num_coarse * channels[-1])
        sizes = list(zip(channels, (channels[0], *channels), spirals, strict=False))
        self.decoder = ModuleList(SpiralConv(i, o, s) for i, o, s in sizes)
        self.out = SpiralConv(channels[0], 3, spirals[0])

    def forward(self, x: Tensor) -> Tensor:
        for conv, trans in zip(self.encoder, self.down_transform, strict=True):
            x = pool(F.elu(conv(x)), trans)
        z = self.to_latent(x.flatten(1))
        x = self.from_latent(z).view(-1, self.num_coarse, self.channels[-1])
        for i in reversed(range(len(self.decoder))):
            x = F.elu(self.decoder[i](pool(x, self.up_transform[i])))
        return self.out(x)


# Before and after ####################################################################


def make(hierarchy: MeshHierarchy) -> Autoencoder:
    steps = range(len(hierarchy.down))
    spirals = [hierarchy.spirals(level, length=9) for level in steps]
    down, up = (
        [m.to(torch.float32).to_dense().to_sparse() for m in matrices]
        for matrices in (hierarchy.down, hierarchy.up)
    )
    return Autoencoder(spirals, down, up)


def count(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):>9,}"


def main(
    steps: int = 200,
    batch_size: int = 16,
    lr: float = 2e-3,
    positions: bool = True,
    seed: int = 0,
):
    dataset = AnnyFaces(Path(__file__).resolve().parents[1] / "data" / "AnnyFaces")
    split = dataset.split("interpolation")
    hierarchy = MeshHierarchy.from_template(dataset.template, factors=[4, 4, 4])
    train, test = dataset.vertices[split.train], dataset.vertices[split.test][::8]
    mean, std = train.mean(dim=0), (train - train.mean(dim=0)).std()

    @torch.no_grad()
    def error(model: torch.nn.Module) -> float:
        out = mean + std * model((test - mean) / std)
        return vertex_distances(out, test).mean().item()

    torch.manual_seed(seed)
    before = make(hierarchy)
    after = copy.deepcopy(before)
    # CHANGED: the first of the two lines, where the matrices are handed to the model
    down, up = swap_pooling(
        after.down_transform, after.up_transform, hierarchy if positions else None
    )
    after.down_transform, after.up_transform = down, up
    print(f"parameters: {count(before)} before, {count(after)} after")
    print(f"untrained:  {error(before):9.4f} mm before, {error(after):9.4f} mm after")

    for name, model in (("before", before), ("after", after)):
        torch.manual_seed(seed)  # the same batches
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        start = perf_counter()
        for step in range(steps):
            x = (train[torch.randint(len(train), (batch_size,))] - mean) / std
            loss = F.l1_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0 or step == steps - 1:
                print(f"{name:6} step {step:3}: loss {loss.item():.4f}")
        print(f"{name:6} {error(model):.3f} mm on test meshes, {perf_counter() - start:.1f} s")

    # CHANGED: the second line, before the model ships
    freeze(after)
    print(f"parameters: {count(after)} frozen, {error(after):.3f} mm on test meshes")


if __name__ == "__main__":
    tyro.cli(main)
