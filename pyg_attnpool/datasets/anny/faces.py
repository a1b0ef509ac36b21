from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from pyg_attnpool.datasets.anny.detail import FACES, Detail, Skin, Surface
from pyg_attnpool.datasets.anny.meshes import AnnySequences, smoothstep
from pyg_attnpool.datasets.anny.model import AnnyModel
from pyg_attnpool.datasets.cache import Source

# Part of every stored file: raised with every change of the meshes made here.
GENERATOR = 1

RIG = {"rig": "makehuman-head", "topology": "head", "facial_actions": "all"}

NUM_SUBJECTS = 12

# Actions that stir unasked with every expression.
INVOLUNTARY = ("brow", "cheekSquint", "eyeSquint", "mouthDimple", "mouthPress", "noseSneer")

PHENOTYPES = {
    "gender": (0.05, 0.95),
    "age": (0.62, 0.95),
    "muscle": (0.3, 0.7),
    "weight": (0.25, 0.8),
    "height": (0.4, 0.6),
    "proportions": (0.3, 0.9),
}
CHANGES = (
    r"(?!(head|neck)-trans|(mouth|nose)-trans-out)"
    r"(cheek|chin|ear|eye|forehead|head|mouth|neck|nose)"
)

# The peak of every expression in Anny's facial actions. "*" stands for both sides, "+" for the one
# that a subject prefers. "jawPitch" is a rotation of the jaw bone in degrees.
EXPRESSIONS = {
    "bareteeth": {
        "mouthUpperUp*": 1.1,
        "mouthLowerDown*": 1.3,
        "mouthStretch*": 0.7,
        "mouthSmile*": 0.2,
        "noseSneer*": 0.4,
        "cheekSquint*": 0.3,
    },
    "cheeks_in": {"cheekPuff": -0.55, "mouthPucker": 0.6, "mouthDimple*": 0.3, "browDown*": 0.1},
    "eyebrow": {"browInnerUp": 1.2, "browOuterUp*": 1.2, "eyeWide*": 0.7, "mouthPress*": 0.1},
    "high_smile": {
        "mouthSmile*": 0.75,
        "cheekSquint*": 0.7,
        "eyeSquint*": 0.5,
        "mouthUpperUp*": 0.4,
        "mouthDimple*": 0.3,
    },
    "lips_back": {
        "mouthRollUpper": 0.8,
        "mouthRollLower": 0.9,
        "mouthPress*": 0.4,
        "jawPitch": 1.0,
    },
    "lips_up": {"mouthUpperUp*": 1.0, "noseSneer*": 0.8, "mouthShrugUpper": 0.5, "eyeSquint*": 0.3},
    "mouth_down": {
        "mouthFrown*": 1.0,
        "mouthLowerDown*": 0.6,
        "mouthShrugLower": 0.4,
        "mouthStretch*": 0.3,
        "browDown*": 0.3,
    },
    "mouth_extreme": {
        "jawOpen": 0.6,
        "mouthStretch*": 0.8,
        "mouthUpperUp*": 0.6,
        "mouthLowerDown*": 0.6,
        "eyeSquint*": 0.6,
        "noseSneer*": 0.4,
        "browDown*": 0.4,
        "jawPitch": 2.0,
    },
    "mouth_middle": {"mouthPucker": 1.0, "mouthFunnel": 0.4, "mouthPress*": 0.2, "browDown*": 0.2},
    "mouth_open": {"jawOpen": 0.6, "mouthFunnel": 0.3, "browInnerUp": 0.2, "jawPitch": 2.0},
    "mouth_side": {
        "mouth+": 1.0,
        "jaw+": 0.6,
        "mouthSmile+": 0.2,
        "eyeSquint+": 0.4,
        "cheekSquint+": 0.3,
    },
    "mouth_up": {
        "mouthShrugLower": 1.0,
        "mouthShrugUpper": 0.9,
        "mouthFrown*": 0.3,
        "mouthPucker": 0.3,
        "browInnerUp": 0.2,
    },
}


class AnnyFaces(AnnySequences):
    r"""Faces of 12 subjects in 12 extreme expressions, laid out as the COMA data set is: every
    expression is a smooth sequence from neutral to its peak and back. They are made on this
    computer, from the `Anny <https://arxiv.org/abs/2511.03589>`_ model of the package :obj:`anny`
    (Apache-2.0, on CC0 data of MakeHuman), and stored for the next time. No network is needed.

    A mesh has 4,538 vertices and 9,014 faces: the skin of head and neck with the inside of the
    mouth, the tongue and two eyeballs. It faces :math:`+z` with :math:`+y` up, in metres, and every
    subject's neutral face has its mean at the origin. Subjects differ by phenotype, 129 local
    changes of shape and their style of moving; neither depends on :obj:`frames`. Meshes are ordered
    by subject, expression and frame.

    Args:
        root (str or Path): The folder to store the data set in, as
            :obj:`processed/anny_faces_frames{frames}_seed{seed}.npz`. A file that is damaged or of
            another version of this generator is made again.
        frames (int, optional): Meshes per sequence; :obj:`20` makes 2,880 meshes (157 MB),
            :obj:`140` makes 20,160 (1.1 GB), the size of COMA. (default: :obj:`20`)
        seed (int, optional): Seed of the subjects and their motion. (default: :obj:`0`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        detail (bool or Detail, optional): What scans have beside smooth shapes: folds where the
            skin is compressed, tissue that bulges, a fine surface and a way to move of every
            subject's own, noise; see :class:`~pyg_attnpool.datasets.anny.Detail`. It is stored in a
            file of its own. (default: :obj:`False`)
        num_subjects (int, optional): The number of subjects, of which fewer are the first of more.
            (default: :obj:`12`)

    Raises:
        ImportError: If the data set is to be made and :obj:`anny` is not installed.
        ValueError: If :obj:`frames` or :obj:`num_subjects` is not positive or :obj:`seed` negative.

    Example:
        >>> from pyg_attnpool.datasets import AnnyFaces
        >>> dataset = AnnyFaces("data/AnnyFaces")  # doctest: +SKIP
        >>> dataset.vertices.shape  # doctest: +SKIP
        torch.Size([2880, 4538, 3])
    """

    kind = "faces"
    generator = GENERATOR
    mapped = False
    subjects = tuple(f"{s:02d}" for s in range(NUM_SUBJECTS))
    expressions = tuple(EXPRESSIONS)

    def __init__(
        self,
        root: str | Path,
        frames: int = 20,
        seed: int = 0,
        transform: Callable | None = None,
        detail: bool | Detail = False,
        num_subjects: int = NUM_SUBJECTS,
    ):
        if num_subjects != NUM_SUBJECTS:
            self.subjects = tuple(f"{s:02d}" for s in range(num_subjects))
        # No part of the file's name and settings unless it is another number than ever.
        size = {} if num_subjects == NUM_SUBJECTS else {"subjects": num_subjects}
        super().__init__(root, frames, seed, transform, detail, **size)

    @staticmethod
    def source(folder: Path, size: Mapping[str, int], seed: int, detail: Detail | None) -> Source:
        r"""What makes the faces, given a folder for temporary files."""
        subjects = size.get("subjects", NUM_SUBJECTS)
        return _Faces(folder, size["frames"], seed, detail, subjects)


class _Faces:
    def __init__(
        self,
        folder: Path,
        frames: int,
        seed: int,
        detail: Detail | None = None,
        num_subjects: int = NUM_SUBJECTS,
    ):
        self.head = AnnyModel(folder, "AnnyFaces", **RIG)
        self.num_subjects = num_subjects
        self.sizes = [frames] * (num_subjects * len(EXPRESSIONS))
        self.labels: dict[str, list[Any]] = {}
        # 'frames' decides where the sequences are sampled, never what is drawn for them.
        self.time = (np.arange(frames) + 0.5) / frames
        self.seed = seed
        adult = self.head(self.head.average_adult())[0]
        self.template = adult - adult.mean(axis=0), self.head.faces
        self.skin = Skin(*self.template, FACES, detail, seed) if detail else None

    def blocks(self, start: int) -> Iterator[ndarray]:
        first, skipped = divmod(start, len(EXPRESSIONS))
        for s in range(first, self.num_subjects):
            subject = self._subject(s)
            surface = self.skin.subject(s) if self.skin else None
            for e in range(skipped, len(EXPRESSIONS)):
                x = self._sequence(s, e, subject, subject)
                yield x if surface is None else self._detailed(s, e, x, subject[0], surface)
            skipped = 0

    def transferred(self, source: int, target: int, expression: int) -> ndarray:
        r"""The sequence of an expression as one subject makes it, on the shape of another."""
        return self._sequence(source, expression, self._subject(source), self._subject(target))

    def _detailed(
        self, s: int, e: int, x: ndarray, shape: dict[str, ndarray], surface: Surface
    ) -> ndarray:
        assert self.skin is not None
        neutral = self.head(shape)[0]
        return self.skin(x, neutral - neutral.mean(axis=0), surface, (s, e))

    def _subject(self, s: int) -> tuple[dict[str, ndarray], ndarray, str]:
        # The shape of a subject, the style of its motion, and the side that it prefers.
        rng = np.random.default_rng([self.seed, s, 0])
        shape = self.head.draw_shape(rng, PHENOTYPES, CHANGES, 0.002)
        style = np.exp(0.12 * rng.standard_normal(len(self.head.actions)))
        return shape, style, "Left" if rng.random() < 0.5 else "Right"

    def _sequence(self, s: int, e: int, mover: tuple, moved: tuple) -> ndarray:
        rng = np.random.default_rng([self.seed, s, e + 1])
        (shape, *_), (_, style, side) = moved, mover
        peak = _spell_out(list(EXPRESSIONS.values())[e], side)
        motion = _draw_motion(self.head, rng, peak, style, self.time)
        return self.head(shape, *motion) - self.head(shape)[0].mean(axis=0)


def _spell_out(peak: dict[str, float], side: str) -> dict[str, float]:
    sides = {"*": ("Left", "Right"), "+": (side,)}
    return {
        name.rstrip("*+") + suffix: value
        for name, value in peak.items()
        for suffix in sides.get(name[-1], ("",))
    }


def _draw_motion(
    head: AnnyModel,
    rng: np.random.Generator,
    peak: dict[str, float],
    style: ndarray,
    time: ndarray,
) -> tuple[ndarray, dict[str, ndarray]]:
    start, top, turn, end = rng.uniform([0.06, 0.4, 0.52, 0.85], [0.15, 0.48, 0.6, 0.94])
    strength = rng.uniform(0.8, 1.05)

    def bump(lag: float) -> ndarray:
        return smoothstep((time - lag - start) / (top - start)) * smoothstep(
            (end - time + lag) / (end - turn)
        )

    def wobble(size: float) -> Any:
        return sum(size * rng.standard_normal() / k * np.sin(np.pi * k * time) for k in (1, 2, 3))

    actions = np.zeros((len(time), len(head.actions)))
    for i, name in enumerate(head.actions):
        lag = np.clip(0.02 * rng.standard_normal(), -0.05, 0.05)
        co_movement = 0.06 * abs(rng.standard_normal()) * bump(lag) + wobble(0.02)
        if name.startswith(INVOLUNTARY):
            actions[:, i] += co_movement
        actions[:, i] += strength * style[i] * peak.get(name, 0) * bump(lag)
    angles = {
        "head": np.stack([wobble(1.2), wobble(0.6), wobble(1.2)], axis=1),
        "jaw": np.stack([wobble(0.5), wobble(0.2), wobble(0.3)], axis=1),
    }
    angles["jaw"][:, 0] += strength * peak.get("jawPitch", 0) * bump(0)
    return actions, angles
