r"""The sets that models are compared on, plain and with the detail that scans have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
