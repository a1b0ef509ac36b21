r"""The sets that models are compared on, plain and with the detail that scans have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces, AnnyHands

SETS: dict[str, Callable[[Path], Any]] = {
    "faces": lambda root: AnnyFaces(root / "AnnyFaces", frames=20),
    "bodies": lambda root: AnnyBodies(root / "AnnyBodies", frames=20),
    "hands": lambda root: AnnyHands(root / "AnnyHands", meshes=3000),
    "detailed faces": lambda root: AnnyFaces(root / "AnnyFaces", frames=20, detail=True),
    "detailed bodies": lambda root: AnnyBodies(root / "AnnyBodies", frames=20, detail=True),
    "detailed hands": lambda root: AnnyHands(root / "AnnyHands", meshes=3000, detail=True),
    "100 detailed faces": lambda root: AnnyFaces(
        root / "AnnyFaces", frames=3, detail=True, num_subjects=100
    ),
}


def load(
    data: str, root: Path
) -> tuple[MeshHierarchy, tuple[Tensor, Tensor, Tensor], list[str] | None]:
    r"""The levels of the template of a set, its training, validation and test meshes, and the
    subjects of the training meshes where they have names."""
    dataset = SETS[data](root)
    hierarchy = MeshHierarchy.from_template(dataset.template, cache=root / "hierarchies")
    split = dataset.split()
    train, val, test = (dataset.read(part) for part in split)
    names = dataset.subject
    subjects = None if names is None else [names[i] for i in split[0].tolist()]
    return hierarchy, (train, val, test), subjects
