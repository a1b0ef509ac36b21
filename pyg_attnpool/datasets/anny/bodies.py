from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from pyg_attnpool.datasets.anny.meshes import AnnySequences
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
    def source(folder: Path, number: int, seed: int) -> Source:
        return _Bodies(folder, number, seed)


class _Bodies:
    def __init__(self, folder: Path, frames: int, seed: int):
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

    def blocks(self, start: int) -> Iterator[ndarray]:
        first, skipped = divmod(start, len(MOTIONS))
        for s in range(first, NUM_SUBJECTS):
            shape = self._shape(s)
            for m in range(skipped, len(MOTIONS)):
                yield self._sequence(s, m, shape)
            skipped = 0

    def transferred(self, source: int, target: int, expression: int) -> ndarray:
        r"""The sequence of a motion as one subject makes it, on the shape of another."""
        return self._sequence(source, expression, self._shape(target))

    def _shape(self, s: int) -> dict[str, ndarray]:
        rng = np.random.default_rng([self.seed, s, 0])
        ranges = {"gender": GENDERS["mf"[s % 2]], **PHENOTYPES}
        return self.model.draw_shape(rng, ranges, CHANGES, 0.01)

    def _sequence(self, s: int, m: int, shape: dict[str, ndarray]) -> ndarray:
        rng = np.random.default_rng([self.seed, s, m + 1])
        turns = rotation_vectors(draw_motion(rng, list(MOTIONS)[m], self.time))
        block = np.empty((len(self.time), NUM_VERTICES, 3), dtype=np.float32)
        for i in range(0, len(block), CHUNK):
            angles = {bone: turn[i : i + CHUNK] for bone, turn in turns.items()}
            block[i : i + CHUNK] = self.model(shape, angles=angles)
        return block
