from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from pyg_attnpool.datasets.anny.detail import BODIES, Detail, Muscle, Skin, Surface
from pyg_attnpool.datasets.anny.meshes import AnnySequences, smoothstep
from pyg_attnpool.datasets.anny.model import CHUNK, AnnyModel
from pyg_attnpool.datasets.anny.motions import MOTIONS, draw_motion, rotation_vectors
from pyg_attnpool.datasets.cache import Source
from pyg_attnpool.mesh.qem import decimate

# Part of every stored file: raised with every change of the meshes made here, which those of
# `decimate` are too.
GENERATOR = 1

NUM_SUBJECTS = 10
NUM_VERTICES = 6890

PHENOTYPES = {
    "age": (0.6, 0.85),
    "muscle": (0.25, 0.85),
    "weight": (0.2, 0.85),
    "height": (0.25, 0.55),
    "proportions": (0.3, 0.9),
    "cupsize": (0.3, 0.7),
    "firmness": (0.4, 0.7),
}
GENDERS = {"m": (0.0, 0.1), "f": (0.9, 1.0)}
CHANGES = (
    r"(?!.*(height|length|vert|nape))"
    r"(buttocks-volume|hip-(scale|waist)|lowerarm|lowerleg|measure-(?!neck)|stomach-tone|"
    r"torso-(muscle|scale|vshape)|upperarm|upperleg|chin|ear|forehead|head-(fat|scale)|mouth|nose)"
)

# Of the left side; those of limbs are on the right, too. A body faces z.
MUSCLES = (
    Muscle(("upperarm01", "upperarm02"), (0, 0, 1), "elbow", (0, 100), 0.012),
    Muscle(("shoulder01", "upperarm01"), (0.5, 1, 0), "arm_out", (-25, 100), 0.010),
    Muscle(("lowerarm01",), (0, 0, 1), "fist", (15, 90), 0.005),
    Muscle(("upperleg01", "upperleg02"), (0, 0, 1), "leg_front", (0, 90), 0.012),
    Muscle(("upperleg01", "upperleg02"), (0, 0, -1), "knee", (0, 100), 0.010),
    Muscle(("lowerleg01",), (0, 0, -1), "toes_up", (0, -30), 0.008),
)

# Flesh that lags behind: where it is, and how far it swings, of that of a belly.
SOFT = (
    (("spine05", "spine04"), (0, 0, 1), 1.0),
    (("spine02", "spine01"), (0, 0, 1), 0.8),
    (("pelvis.L", "pelvis.R", "root"), (0, 0, -1), 0.8),
    (("upperleg01.L", "upperleg01.R"), (0, 0, 1), 0.5),
    (("upperarm01.L", "upperarm01.R"), (0, -1, 0), 0.4),
)
DURATION = 4.0  # seconds of a sequence
STEP = 0.02  # seconds between the frames that accelerations are taken from
LAG = 0.06  # seconds by which flesh is late
FREQUENCY = 4.5  # at which flesh swings by itself, in hertz
LARGEST = 0.02  # metres


class AnnyBodies(AnnySequences):
    r"""Bodies of 10 subjects, five men and five women of different build, in 14 motions, laid out
    as the `Dynamic FAUST <https://dfaust.is.tue.mpg.de>`_ data set is, with the names of its
    motions. They are made on this computer, from the
    `Anny <https://arxiv.org/abs/2511.03589>`_ model of the package :obj:`anny` (Apache-2.0, on CC0
    data of MakeHuman), and stored for the next time. No network is needed.

    A mesh has 6,890 vertices and 13,776 faces, one closed surface: Anny's skin without eyeballs and
    tongue, simplified from 13,348 vertices by :meth:`~pyg_attnpool.mesh.qem.decimate`, and moved
    with all of them. These are the numbers of Dynamic FAUST's own meshes, so that the levels of
    a hierarchy, the parameters of a model and its running time are those of the published
    experiments, at half the memory of Anny's full resolution, 13,718 vertices.

    A body faces :math:`+z` with :math:`+y` up, in metres, with the root of its skeleton, between
    the hips, at the origin in every frame. Joints follow smooth curves within human ranges; soft
    tissue and expressions do not move. Subjects differ by phenotype, local changes of shape and
    their style of moving; neither depends on :obj:`frames`. Meshes are ordered by subject, motion
    and frame, and :meth:`split` holds out whole sequences unless told otherwise.

    Args:
        root (str or Path): The folder to store the data set in, as
            :obj:`processed/anny_bodies_frames{frames}_seed{seed}.npz` and, for the vertices, which
            are mapped rather than read, :obj:`.npy`. Files that are damaged or of another version
            of this generator are made again.
        frames (int, optional): Meshes per sequence; :obj:`20` makes 2,800 meshes (231 MB),
            :obj:`286` makes 40,040 (3.3 GB), the size of Dynamic FAUST. (default: :obj:`20`)
        seed (int, optional): Seed of the subjects and their motion. (default: :obj:`0`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        detail (bool or Detail, optional): What scans have beside smooth shapes: folds where the
            skin is compressed, muscles that swell as joints bend and flesh that lags behind, a
            surface of every subject's own, noise; see
            :class:`~pyg_attnpool.datasets.anny.Detail`. It is stored in a file of its own.
            (default: :obj:`False`)

    Raises:
        ImportError: If the data set is to be made and :obj:`anny` is not installed.
        ValueError: If :obj:`frames` is not positive or :obj:`seed` negative.

    Example:
        >>> from pyg_attnpool.datasets import AnnyBodies
        >>> dataset = AnnyBodies("data/AnnyBodies")  # doctest: +SKIP
        >>> dataset.vertices.shape  # doctest: +SKIP
        torch.Size([2800, 6890, 3])
    """

    kind = "bodies"
    generator = GENERATOR
    default_split = "sequence"
    subjects = tuple(f"{s:02d}{'mf'[s % 2]}" for s in range(NUM_SUBJECTS))
    expressions = tuple(MOTIONS)

    @staticmethod
    def source(folder: Path, size: Mapping[str, int], seed: int, detail: Detail | None) -> Source:
        r"""What makes the bodies, given a folder for temporary files."""
        return _Bodies(folder, size["frames"], seed, detail)


class _Bodies:
    def __init__(self, folder: Path, frames: int, seed: int, detail: Detail | None = None):
        self.model = AnnyModel(folder, "AnnyBodies", rig="anny", topology="anny-noeyes-notongue")
        self.sizes = [frames] * (NUM_SUBJECTS * len(MOTIONS))
        self.labels: dict[str, list[Any]] = {}
        # 'frames' decides where the sequences are sampled, never what is drawn for them.
        self.time = (np.arange(frames) + 0.5) / frames
        self.seed = seed
        adult = self.model(self.model.average_adult())[0]
        ((kept, faces),) = decimate(adult, self.model.faces, [NUM_VERTICES])
        self.template = adult[kept], faces
        self.model.keep(kept)
        self.skin = Skin(*self.template, BODIES, detail, seed) if detail else None
        if self.skin:
            self.muscles = {
                (i, side): self.skin.muscle(
                    self._belonging([f"{bone}.{side}" for bone in muscle.bones]),
                    np.array(muscle.side) * [1 if side == "L" else -1, 1, 1],
                )
                for i, muscle in enumerate(MUSCLES)
                for side in "LR"
            }
            shapes = [
                share * self.skin.muscle(self._belonging(bones), np.array(side))
                for bones, side, share in SOFT
            ]
            self.soft = np.max(shapes, axis=0)

    def blocks(self, start: int) -> Iterator[ndarray]:
        first, skipped = divmod(start, len(MOTIONS))
        for s in range(first, NUM_SUBJECTS):
            shape = self._shape(s)
            surface = self.skin.subject(s) if self.skin else None
            for m in range(skipped, len(MOTIONS)):
                x = self._sequence(s, m, shape)
                yield x if surface is None else self._detailed(s, m, x, shape, surface)
            skipped = 0

    def transferred(self, source: int, target: int, expression: int) -> ndarray:
        r"""The sequence of a motion as one subject makes it, on the shape of another."""
        return self._sequence(source, expression, self._shape(target))

    def _shape(self, s: int) -> dict[str, ndarray]:
        rng = np.random.default_rng([self.seed, s, 0])
        ranges = {"gender": GENDERS["mf"[s % 2]], **PHENOTYPES}
        return self.model.draw_shape(rng, ranges, CHANGES, 0.01)

    def _belonging(self, bones: Sequence[str]) -> ndarray:
        # How much of every vertex moves with these bones.
        model = self.model.model
        numbers = [model.bone_labels.index(bone) for bone in bones]
        return model.dense_vertex_bone_weights[:, numbers].sum(dim=1).numpy()

    def _detailed(
        self, s: int, m: int, x: ndarray, shape: dict[str, ndarray], surface: Surface
    ) -> ndarray:
        assert self.skin is not None
        angles = self._angles(s, m, self.time)
        bulges = np.zeros(x.shape[:2])
        for (i, side), muscle in self.muscles.items():
            low, high = MUSCLES[i].degrees
            bent = smoothstep((angles[f"{MUSCLES[i].joint}.{side}"] - low) / (high - low))
            bulges += MUSCLES[i].height * bent[:, None] * muscle
        # Flesh swings as far as its inertia bends a spring, a little later.
        step = STEP / DURATION
        late = self.time - LAG / DURATION
        before, now, after = (
            self._posed(self._angles(s, m, late + i * step), shape).astype(float)
            for i in (-1, 0, 1)
        )
        # The root of a skeleton stands still here; the ground is where the lowest vertex is.
        for mesh in (before, now, after):
            mesh[..., 1] -= mesh[..., 1].min(axis=1, keepdims=True)
        acceleration = (after - 2 * now + before) / STEP**2
        swing = -acceleration / (2 * np.pi * FREQUENCY) ** 2
        length = np.linalg.norm(swing, axis=-1, keepdims=True)
        swing *= LARGEST * np.tanh(length / LARGEST) / np.maximum(length, 1e-9)
        jiggle = self.soft[:, None] * swing
        neutral = self.model(shape)[0]
        return self.skin(x.astype(float), neutral, surface, (s, m), bulges, jiggle)

    def _angles(self, s: int, m: int, time: ndarray) -> dict[str, ndarray]:
        rng = np.random.default_rng([self.seed, s, m + 1])
        return draw_motion(rng, list(MOTIONS)[m], time)

    def _sequence(self, s: int, m: int, shape: dict[str, ndarray]) -> ndarray:
        return self._posed(self._angles(s, m, self.time), shape)

    def _posed(self, angles: dict[str, ndarray], shape: dict[str, ndarray]) -> ndarray:
        turns = rotation_vectors(angles)
        block = np.empty((len(self.time), NUM_VERTICES, 3), dtype=np.float32)
        for i in range(0, len(block), CHUNK):
            part = {bone: turn[i : i + CHUNK] for bone, turn in turns.items()}
            block[i : i + CHUNK] = self.model(shape, angles=part)
        return block
