r"""The data sets, at a scale."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.options import Options
from pyg_attnpool import MeshHierarchy
from pyg_attnpool.datasets import (
    AnnyBodies,
    AnnyFaces,
    AnnyHands,
    CoMA,
    DynamicFAUST,
    MeshDataset,
    RegisteredMeshes,
    SynHand,
)
from pyg_attnpool.files import digest
from pyg_attnpool.mesh import decimate

RESIDENT = 8 << 30  # bytes of training meshes beyond which they are read while training

DETAILED = "detailed_"  # before the name of a set that is made here, with the detail of scans

# Of a smoke run: vertices of the template, how many times fewer every level has, training and other
# meshes.
SMOKE_VERTICES, SMOKE_FACTORS, SMOKE_MESHES = 400, [2.5] * 4, (48, 16, 16)


class Meshes:
    r"""A data set at a scale, with its hierarchy.

    Args:
        name (str): As in :class:`Options`.
        options (Options): Scale and places.
    """

    def __init__(self, name: str, options: Options):
        self.smoke = options.scale == "smoke"
        self.dataset = _open(name, options)
        vertices, faces = self.dataset.template
        self.kept = torch.arange(len(vertices))
        if self.smoke and len(vertices) > SMOKE_VERTICES:
            ((kept, faces),) = decimate(vertices, faces, [SMOKE_VERTICES])
            vertices, self.kept = vertices[kept], torch.from_numpy(kept)
        factors = SMOKE_FACTORS if self.smoke else None
        self.hierarchy = MeshHierarchy.from_template(
            (vertices, faces), factors=factors, cache=options.root / "hierarchies"
        )

    @property
    def template(self) -> str:
        r"""A hash of the faces, with the sizes of the levels. It is the same on every machine;
        coordinates differ in their last digits."""
        sizes = "-".join(map(str, self.hierarchy.num_vertices))
        return f"{digest({'faces': self.hierarchy.faces[0]})[:16]}-{sizes}"

    def num_train(self, **kwargs: str) -> int:
        r"""The number of training meshes."""
        num = len(self.dataset.split(**kwargs).train)
        return min(num, SMOKE_MESHES[0]) if self.smoke else num

    def split(self, **kwargs: str) -> list[Tensor | MeshDataset]:
        r"""Training, validation and test meshes."""
        parts = self.dataset.split(**kwargs)
        if self.smoke:
            # Evenly spread over the part.
            parts = [
                part[torch.linspace(0, len(part) - 1, min(num, len(part))).long()]
                for part, num in zip(parts, SMOKE_MESHES, strict=True)
            ]
            return [self.dataset.read(part)[:, self.kept] for part in parts]
        size = 12 * len(self.kept) * len(parts[0])
        train = self.dataset[parts[0]] if size > RESIDENT else self.dataset.read(parts[0])
        return [train, *(self.dataset.read(part) for part in parts[1:])]


def _open(name: str, options: Options) -> MeshDataset:
    size = ("smoke", "small", "full").index(options.scale)
    root = options.root
    made, detail = name.removeprefix(DETAILED), name.startswith(DETAILED)
    if made == "faces":
        return AnnyFaces(root / "AnnyFaces", frames=(1, 20, 140)[size], detail=detail)
    if made == "bodies":
        return AnnyBodies(root / "AnnyBodies", frames=(1, 20, 286)[size], detail=detail)
    if made == "hands":
        return AnnyHands(root / "AnnyHands", meshes=(100, 3000, 100_000)[size], detail=detail)
    if name == "coma":
        return CoMA(root / "CoMA")
    if name == "dfaust":
        listed = root / "DynamicFAUST" / "test_list.txt"
        return DynamicFAUST(root / "DynamicFAUST", listed if listed.exists() else None)
    if name == "synhand":
        return SynHand(root / "SynHand" / "raw", cache=root / "SynHand" / "processed")
    if not Path(name).is_dir():
        raise ValueError(
            f"Expected 'data' to be faces, bodies, hands (or detailed_faces, ...), coma, dfaust, "
            f"synhand or a folder of registered meshes (got {name!r})"
        )
    return RegisteredMeshes(name, unit=options.unit, cache=root / "RegisteredMeshes")
