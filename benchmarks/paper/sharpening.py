r"""What a negative w_a does: how rough features are that a mapping makes of white noise, for the
prior P, the attention A and the fused mapping M = w_a A + (1 - w_a) P of every layer, at the start
and after training.

Roughness is the Rayleigh quotient of the symmetrically normalised Laplacian of the target level:
0 for features that do not vary, 1 for white noise, 2 at most."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.utils import get_laplacian

from benchmarks import report
from benchmarks.paper.data import Meshes
from benchmarks.paper.options import Options
from benchmarks.paper.run import BATCH_SIZE
from pyg_attnpool import Mapping, MorphableModel
from pyg_attnpool.models import MeshAutoencoder
from pyg_attnpool.training import epochs_for, quiet_lightning

ABOUT = "not in the paper: how rough mappings make what they map, by the start of w_a"
NOTES = (
    "Layers are named by the vertices that they map from and to. Roughness is the Rayleigh "
    "quotient of the normalised Laplacian on 256 channels of white noise at the source: 0 for "
    "features that do not vary, 1 for white noise.",
)


def roughness(mapping: Mapping, edge_index: Tensor) -> float:
    r"""That of what a mapping makes of white noise, on the edges of its target level."""
    generator = torch.Generator().manual_seed(0)
    y = mapping @ torch.randn(mapping.num_source, 256, generator=generator)
    index, value = get_laplacian(edge_index, normalization="sym", num_nodes=len(y))
    laplacian = torch.zeros_like(y).index_add(0, index[0], value[:, None] * y[index[1]])
    return ((y * laplacian).sum() / y.square().sum()).item()


@torch.no_grad()
def rows(model: MeshAutoencoder, w_a: float, when: str) -> list[dict[str, Any]]:
    r"""A row for every attention layer."""
    steps = len(model.pools)
    targets = [*range(1, steps + 1), *reversed(range(steps))]
    return [
        {
            "w_a from": w_a,
            "when": when,
            "layer": f"{pool.num_source} > {pool.num_target}",
            "w_a": pool.fusion_weight.item(),
            "P": roughness(Mapping(pool.prior_index, pool.prior_weight, pool.num_source), edges),
            "A": roughness(pool.attention(), edges),
            "M": roughness(pool.mapping(), edges),
        }
        for pool, level in zip([*model.pools, *model.unpools], targets, strict=True)
        for edges in [model.hierarchy.edge_index(level)]
    ]


@dataclass
class SharpeningOptions:
    data: str = "hands"
    """faces, bodies or hands, made here; or what else a table takes."""
    scale: Literal["smoke", "small", "full"] = "small"
    """The size of template and data set, as of a table."""
    steps: int = 850
    """Steps of a run, rounded up to whole epochs."""
    shares: tuple[float, ...] = (0.0, -2.0)
    """The values that w_a starts from."""
    seed: int = 0
    """Seed of parameters and the order of the meshes."""
    root: Path = Path("data")
    """Folder of the data sets."""
    output: Path = Path("runs") / "sharpening"
    """Folder for everything written."""


def main(options: SharpeningOptions):
    r"""Trains CoMA with attention once for every start and writes the table."""
    quiet_lightning()
    meshes = Meshes(options.data, Options(scale=options.scale, root=options.root))
    train, val, test = meshes.split()
    found, errors = [], []
    for w_a in options.shares:
        kwargs = {"fusion_weight": w_a}
        torch.manual_seed(options.seed)
        model = MorphableModel.coma(meshes.hierarchy, down_kwargs=kwargs, up_kwargs=kwargs)
        found += rows(model.autoencoder, w_a, "start")
        epochs = epochs_for(options.steps, len(train), BATCH_SIZE)
        model.fit(train, val, epochs=epochs, seed=options.seed, accelerator="cpu")
        found += rows(model.autoencoder, w_a, "trained")
        errors.append({"w_a from": w_a, "epochs": epochs, "mm": model.evaluate(test)["mean"]})
    about = report.machine("cpu")
    about |= {"data": options.data, "batch": BATCH_SIZE, "seed": options.seed}
    tables = {"Roughness": found, "Test error": errors}
    command = report.command()
    print(report.write(options.output, "sharpening", command, found, tables, about, NOTES))
