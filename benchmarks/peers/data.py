r"""The sets that models are compared on, plain and with the detail that scans have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces, AnnyHands


class MeshSet(NamedTuple):
    r"""How a set is made of a folder, and split."""

    build: Callable[[Path], Any]
    subject: str | None = None
    r"""The one whose meshes are test, in place of the split of the set itself."""
    same_as: str | None = None
    r"""Another set of the same meshes, whose tuned rates and costs are taken."""


def _faces(root: Path) -> Any:
    return AnnyFaces(root / "AnnyFaces", frames=20)


def _bodies(root: Path) -> Any:
    return AnnyBodies(root / "AnnyBodies", frames=20)


SETS = {
    "faces": MeshSet(_faces),
    "bodies": MeshSet(_bodies),
    "hands": MeshSet(lambda root: AnnyHands(root / "AnnyHands", meshes=3000)),
    "faces, another subject": MeshSet(_faces, "03", "faces"),
    "bodies, another subject": MeshSet(_bodies, "03f", "bodies"),
    "detailed faces": MeshSet(
        lambda root: AnnyFaces(root / "AnnyFaces", frames=20, detail=True),
    ),
    "detailed bodies": MeshSet(
        lambda root: AnnyBodies(root / "AnnyBodies", frames=20, detail=True),
    ),
    "detailed hands": MeshSet(
        lambda root: AnnyHands(root / "AnnyHands", meshes=3000, detail=True),
    ),
    "100 detailed faces": MeshSet(
        lambda root: AnnyFaces(root / "AnnyFaces", frames=3, detail=True, num_subjects=100)
    ),
}


def measured_on(data: str) -> str:
    r"""The set whose tuned rates and costs are those of a set."""
    return SETS[data].same_as or data


def load(
    data: str, root: Path
) -> tuple[MeshHierarchy, tuple[Tensor, Tensor, Tensor], list[str] | None]:
    r"""The levels of the template of a set, its training, validation and test meshes, and the
    subjects of the training meshes where they have names."""
    dataset = SETS[data].build(root)
    hierarchy = MeshHierarchy.from_template(dataset.template, cache=root / "hierarchies")
    subject = SETS[data].subject
    split = dataset.split() if subject is None else dataset.split("identity", subject=subject)
    train, val, test = (dataset.read(part) for part in split)
    names = dataset.subject
    subjects = None if names is None else [names[i] for i in split[0].tolist()]
    return hierarchy, (train, val, test), subjects
