from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.spatial.transform import Rotation

from pyg_attnpool.datasets.anny.detail import HANDS, Detail, Muscle, Skin
from pyg_attnpool.datasets.anny.meshes import AnnyMeshes, smoothstep
from pyg_attnpool.datasets.anny.model import CHUNK, AnnyModel
from pyg_attnpool.datasets.cache import Source

# Part of every stored file: raised with every change of the meshes made here.
GENERATOR = 1

BLOCK = 100  # meshes drawn together

PHENOTYPES = {
    "gender": (0.0, 1.0),
    "age": (0.6, 0.95),
    "muscle": (0.2, 0.8),
    "weight": (0.2, 0.8),
    "height": (0.3, 0.7),
    "proportions": (0.3, 0.9),
}
CHANGES = r"hand-(fingers|scale)|lowerarm-(fat|muscle|scale-(depth|horiz))|measure-wrist"

# Degrees from a relaxed open hand, in which joints of fingers are bent by 10 to 20 already.
LIMITS = {
    "knuckle": (-20, 70),
    "spread": (-6, 14),
    "middle": (-12, 90),
    "end": (-10, 60),
    "thumb_root": (-12, 22),
    "thumb_out": (-25, 12),
    "thumb_twist": (0, 20),
    "thumb_middle": (-15, 40),
    "thumb_end": (-15, 60),
    "wrist": (-25, 25),
    "wrist_side": (-12, 15),
}

# Axes of a hand with its fingers along y, its palm to z and its thumb along x. Fingers, from the
# index on, bend about their own width and spread away from the middle one.
BEND = ((0.99, -0.12, 0.0), (0.98, 0.18, 0.0), (0.94, 0.33, 0.0), (0.88, 0.48, 0.0))
SPREAD = ((0.0, 0.0, -1.0), (0.0, 0.0, -0.2), (0.0, 0.0, 0.6), (0.0, 0.0, 1.0))
THUMB_BEND = (0.0, -0.52, 0.86)  # towards the fingers
THUMB_OUT = (0.67, -0.74, 0.0)  # towards the palm
THUMB_AXIS = (0.42, 0.78, 0.47)
WRIST_BEND = (1.0, 0.0, 0.0)
WRIST_SIDE = (0.0, 0.0, -1.0)  # towards the thumb

# Flesh on the palm's side; of fingers it is that of the one from the index on.
MUSCLES = (
    Muscle(("finger1-1",), (0.5, 0, 1), "thumb_root", (-12, 22), 0.003),
    Muscle(
        ("metacarpal1", "metacarpal2", "metacarpal3", "metacarpal4"),
        (0, 0, 1),
        "knuckle",
        (0, 70),
        0.0015,
    ),
    *(Muscle((f"finger{i}-1",), (0, 0, 1), f"middle {i - 2}", (0, 90), 0.002) for i in range(2, 6)),
)
PEOPLE = 20  # whose skin hands have


class AnnyHands(AnnyMeshes):
    r"""Right hands of random shape and pose, laid out as the SYNHAND data set is: every mesh is
    drawn for itself. They are made on this computer, from the
    `Anny <https://arxiv.org/abs/2511.03589>`_ model of the package :obj:`anny` (Apache-2.0, on CC0
    data of MakeHuman), and stored for the next time. No network is needed.

    A mesh has 1,609 vertices and 3,196 faces: the hand of Anny's skin with its nails, open where
    the forearm begins. Its fingers point along :math:`+y`, its palm to :math:`+z` and its thumb to
    :math:`+x`, in metres, with the wrist at the origin. Joints turn within the limits of human
    ones: fingers bend more or less together and the last joint follows the one before it. Shapes
    are of adults, by phenotype and local changes. A mesh depends on its place and on :obj:`seed`
    alone, so that fewer meshes are the first of more. :meth:`split` keeps the first 10 of every 100
    for test unless told otherwise.

    Args:
        root (str or Path): The folder to store the data set in, as
            :obj:`processed/anny_hands_meshes{meshes}_seed{seed}.npz` and, for the vertices, which
            are mapped rather than read, :obj:`.npy`. Files that are damaged or of another version
            of this generator are made again.
        meshes (int, optional): The number of meshes; :obj:`3000` take 58 MB, :obj:`100000`,
            the size of SYNHAND, 1.9 GB. (default: :obj:`3000`)
        seed (int, optional): Seed of shapes and poses. (default: :obj:`0`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        detail (bool or Detail, optional): What scans have beside smooth shapes: folds where the
            skin is compressed, flesh that swells as joints bend, one of 20 surfaces, noise; see
            :class:`~pyg_attnpool.datasets.anny.Detail`. It is stored in a file of its own.
            (default: :obj:`False`)

    Raises:
        ImportError: If the data set is to be made and :obj:`anny` is not installed.
        ValueError: If :obj:`meshes` is not positive or :obj:`seed` negative.

    Example:
        >>> from pyg_attnpool.datasets import AnnyHands
        >>> dataset = AnnyHands("data/AnnyHands")  # doctest: +SKIP
        >>> dataset.vertices.shape  # doctest: +SKIP
        torch.Size([3000, 1609, 3])
    """

    kind = "hands"
    generator = GENERATOR
    default_split = "independent"

    def __init__(
        self,
        root: str | Path,
        meshes: int = 3000,
        seed: int = 0,
        transform: Callable | None = None,
        detail: bool | Detail = False,
    ):
        super().__init__(root, {"meshes": meshes}, seed, {}, transform, detail)

    @staticmethod
    def source(folder: Path, size: Mapping[str, int], seed: int, detail: Detail | None) -> Source:
        r"""What makes the hands, given a folder for temporary files."""
        return _Hands(folder, size["meshes"], seed, detail)


class _Hands:
    def __init__(self, folder: Path, meshes: int, seed: int, detail: Detail | None = None):
        self.model = AnnyModel(folder, "AnnyHands", rig="anny-hand.R", topology="hand.R")
        self.sizes = [min(BLOCK, meshes - i) for i in range(0, meshes, BLOCK)]
        self.labels: dict[str, list[Any]] = {}
        self.seed = seed
        # Anny turns the bones of a part of the body about the axes of the whole one.
        self.axes = self.model.model.reference_bone_orientations[0].numpy()
        self.template = self._turned(self.model(self.model.average_adult()))[0], self.model.faces
        self.skin = Skin(*self.template, HANDS, detail, seed) if detail else None
        if self.skin:
            self.people = [self.skin.subject(i) for i in range(PEOPLE)]
            weights, names = (
                self.model.model.dense_vertex_bone_weights,
                self.model.model.bone_labels,
            )
            self.muscles = [
                self.skin.muscle(
                    weights[:, [names.index(f"{b}.R") for b in muscle.bones]].sum(dim=1).numpy(),
                    np.array(muscle.side),
                )
                for muscle in MUSCLES
            ]

    def blocks(self, start: int) -> Iterator[ndarray]:
        for i in range(start, len(self.sizes)):
            rng = np.random.default_rng([self.seed, i])
            shapes = [self.model.draw_shape(rng, PHENOTYPES, CHANGES, 0.004) for _ in range(BLOCK)]
            shape = {key: np.concatenate([s[key] for s in shapes]) for key in shapes[0]}
            poses = draw_poses(rng, BLOCK)
            turns = rotation_vectors(poses, self.axes)
            hands = []
            for j in range(0, BLOCK, CHUNK):
                part = slice(j, j + CHUNK)
                angles = {bone: turn[part] for bone, turn in turns.items()}
                hands.append(self.model({k: v[part] for k, v in shape.items()}, angles=angles))
            block = self._turned(np.concatenate(hands)[: self.sizes[i]])
            yield block if self.skin is None else self._detailed(i, block, shape, poses)

    def _detailed(
        self, i: int, block: ndarray, shape: dict[str, ndarray], poses: dict[str, ndarray]
    ) -> ndarray:
        assert self.skin is not None
        bulges = np.zeros((BLOCK, block.shape[1]))
        for muscle, form in zip(MUSCLES, self.muscles, strict=True):
            name, _, finger = muscle.joint.partition(" ")
            angle = poses[name][:, int(finger)] if finger else poses[name]
            angle = angle.reshape(BLOCK, -1).mean(axis=1)
            low, high = muscle.degrees
            bulges += muscle.height * smoothstep((angle - low) / (high - low))[:, None] * form
        neutral = self._turned(self.model(shape))
        out = np.empty_like(block)
        for j in range(len(block)):
            person = self.people[(BLOCK * i + j) % PEOPLE]
            own = slice(j, j + 1)
            out[own] = self.skin(block[own], neutral[j], person, (i, j), bulges[own])
        return out

    @staticmethod
    def _turned(hands: ndarray) -> ndarray:
        # The model's fingers point back, its thumb up and its palm to the right.
        return np.stack([hands[..., 1], -hands[..., 2], -hands[..., 0]], axis=-1)


def draw_poses(rng: np.random.Generator, num: int) -> dict[str, ndarray]:
    r"""Random joint angles :obj:`[num]` in degrees, those of fingers :obj:`[num, 4]` from the index
    on."""

    def between(name: str, part: ndarray) -> ndarray:
        low, high = LIMITS[name]
        return low + (high - low) * np.clip(part, 0, 1)

    # From fingers that all do the same to fingers that each do something else.
    together = rng.random((num, 1))
    closed = together * rng.random((num, 1)) + (1 - together) * rng.random((num, 4))
    bent = closed + rng.normal(0, 0.12, (num, 4))
    spread = rng.random((num, 1)) * (1 - closed) + rng.normal(0, 0.08, (num, 4))
    thumb = 0.5 * closed[:, :1].mean(axis=1) + 0.5 * rng.random(num)
    return {
        "knuckle": between("knuckle", closed + rng.normal(0, 0.12, (num, 4))),
        "spread": between("spread", spread),
        "middle": between("middle", bent),
        "end": between("end", bent + rng.normal(0, 0.06, (num, 4))),
        "thumb_root": between("thumb_root", rng.random(num)),
        "thumb_out": between("thumb_out", rng.random(num)),
        "thumb_twist": between("thumb_twist", rng.random(num)),
        "thumb_middle": between("thumb_middle", thumb + rng.normal(0, 0.15, num)),
        "thumb_end": between("thumb_end", thumb + rng.normal(0, 0.2, num)),
        "wrist": between("wrist", rng.random(num)),
        "wrist_side": between("wrist_side", rng.random(num)),
    }


def rotation_vectors(angles: dict[str, ndarray], axes: ndarray) -> dict[str, ndarray]:
    r"""Joint angles of :meth:`draw_poses` to rotation vectors :obj:`[num, 3]` of bones, in degrees
    along Anny's axes, given the matrix that leads to them from those of the hand."""

    def turn(axis: tuple[float, float, float], angle: ndarray) -> Rotation:
        # Anny's hand has its fingers along y, its palm to -x and its thumb along z.
        x, y, z = axis
        return Rotation.from_rotvec(np.outer(angle, axes @ [-z, y, x]), degrees=True)

    turns = {
        "wrist.R": turn(WRIST_SIDE, angles["wrist_side"]) * turn(WRIST_BEND, angles["wrist"]),
        "finger1-1.R": turn(THUMB_OUT, angles["thumb_out"])
        * turn(THUMB_BEND, angles["thumb_root"])
        * turn(THUMB_AXIS, angles["thumb_twist"]),
        "finger1-2.R": turn(THUMB_BEND, angles["thumb_middle"]),
        "finger1-3.R": turn(THUMB_BEND, angles["thumb_end"]),
    }
    for i, (bend, spread) in enumerate(zip(BEND, SPREAD, strict=True)):
        knuckle = turn(spread, angles["spread"][:, i]) * turn(bend, angles["knuckle"][:, i])
        turns[f"finger{i + 2}-1.R"] = knuckle
        turns[f"finger{i + 2}-2.R"] = turn(bend, angles["middle"][:, i])
        turns[f"finger{i + 2}-3.R"] = turn(bend, angles["end"][:, i])
    return {bone: rotation.as_rotvec(degrees=True) for bone, rotation in turns.items()}
