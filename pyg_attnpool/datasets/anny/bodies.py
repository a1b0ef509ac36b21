from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.spatial.transform import Rotation

from pyg_attnpool.datasets.anny.meshes import (
    CHUNK,
    AnnyMeshes,
    AnnyModel,
    sequence_labels,
    smoothstep,
)
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

# The joint angles of a motion: bones with their shares, and the axis, for limbs that of the left
# side, of a body that stands with arms and legs apart; x points left, y up and z to the front.
# Turns of one bone follow one another in this order. Limbs also follow the pelvis the other way, so
# that feet stay where they are.
SPINE = {"spine05": 0.25, "spine04": 0.25, "spine03": 0.2, "spine02": 0.15, "spine01": 0.15}
NECK = {"neck01": 0.3, "neck02": 0.2, "neck03": 0.2, "head": 0.3}
FIST = {f"finger{i}-{j}": share for i in range(2, 6) for j, share in ((1, 0.9), (2, 1), (3, 0.6))}
PELVIS = {"root": 1, "spine05": -0.5, "spine04": -0.5, "upperleg01.L": -1, "upperleg01.R": -1}
CENTER: dict[str, Any] = {
    "pelvis_bend": (PELVIS, (1, 0, 0)),
    "pelvis_lean": (PELVIS, (0, 0, -1)),
    "pelvis_turn": (PELVIS, (0, 1, 0)),
    "bend": (SPINE, (1, 0, 0)),
    "lean": (SPINE, (0, 0, -1)),
    "turn": (SPINE, (0, 1, 0)),
    "nod": (NECK, (1, 0, 0)),
    "tilt": (NECK, (0, 0, -1)),
    "look": (NECK, (0, 1, 0)),
}
LIMB: dict[str, Any] = {
    "arm_turn": ({"upperarm01": 1}, (0.65, -0.76, 0)),
    "arm_out": ({"clavicle": 0.1, "shoulder01": 0.2, "upperarm01": 0.7}, (0, 0, 1)),
    "arm_front": ({"shoulder01": 0.2, "upperarm01": 0.8}, (-1, 0, 0)),
    "shrug": ({"clavicle": 1}, (0, 0, 1)),
    "elbow": ({"lowerarm01": 1}, (-0.76, -0.65, 0)),
    "forearm_turn": ({"lowerarm02": 0.6, "wrist": 0.4}, (0.52, -0.52, 0.68)),
    "wrist": ({"wrist": 1}, (0.47, -0.54, -0.7)),
    "fist": (FIST, (0.47, -0.54, -0.7)),
    "leg_turn": ({"upperleg01": 1}, (0, 1, 0)),
    "leg_out": ({"upperleg01": 1}, (0, 0, 1)),
    "leg_front": ({"upperleg01": 1}, (-1, 0, 0)),
    "knee": ({"lowerleg01": 1}, (1, 0, 0)),
    "toes_up": ({"foot": 1}, (-1, 0, 0)),
}

# Degrees of where bodies stand at rest, and between which joints stay: of elbows and arms less than
# of a straight one that hangs down, since Anny's stand off by 45 and are bent by 40.
REST = {"arm_out": -25, "elbow": -15, "leg_out": -4, "fist": 15}
LIMITS = {
    "pelvis_bend": (-25, 25),
    "pelvis_lean": (-20, 20),
    "pelvis_turn": (-25, 25),
    "bend": (-25, 60),
    "lean": (-30, 30),
    "turn": (-45, 45),
    "nod": (-50, 45),
    "tilt": (-35, 35),
    "look": (-70, 70),
    "arm_turn": (-60, 70),
    "arm_out": (-45, 130),
    "arm_front": (-50, 120),
    "shrug": (-10, 25),
    "elbow": (-40, 105),
    "forearm_turn": (-70, 70),
    "wrist": (-60, 60),
    "fist": (0, 90),
    "leg_turn": (-35, 40),
    "leg_out": (-15, 40),
    "leg_front": (-25, 115),
    "knee": (0, 135),
    "toes_up": (-45, 25),
}

# Every motion: how often it is repeated, and the degrees between which joints move. "*" stands for
# both sides, "~" for both, the right half a turn later, "+" for the side that a subject prefers and
# "-" for the other. A third number delays a joint, in parts of a turn.
MOTIONS: dict[str, Any] = {
    "chicken_wings": (
        4,
        {"arm_out*": (-10, 50), "arm_turn*": (45, 35), "elbow*": (85, 90), "fist*": (50, 50)},
    ),
    "hips": (
        3,
        {
            "pelvis_lean": (-12, 12),
            "pelvis_bend": (-10, 12, 0.25),
            "arm_out*": (5, 12),
            "arm_turn*": (40, 45),
            "elbow*": (45, 50),
            "knee*": (8, 16, 0.25),
            "leg_front*": (4, 8, 0.25),
        },
    ),
    "jiggle_on_toes": (
        9,
        {
            "toes_up*": (-14, -28),
            "knee*": (6, 16, 0.5),
            "leg_front*": (3, 8, 0.5),
            "shrug*": (0, 5, 0.1),
            "bend": (0, 4, 0.3),
        },
    ),
    "jumping_jacks": (
        4,
        {
            "arm_out*": (-30, 105),
            "leg_out*": (-6, 18),
            "knee*": (4, 18, 0.25),
            "leg_front*": (2, 9, 0.25),
            "toes_up*": (8, -20, 0.25),
            "elbow*": (-20, -5),
        },
    ),
    "knees": (
        4,
        {
            "leg_front~": (-5, 85),
            "knee~": (4, 95),
            "toes_up~": (0, -15),
            "arm_front~": (-20, 30, 0.5),
            "elbow*": (25, 40),
            "bend": (2, 8),
        },
    ),
    "light_hopping_loose": (
        7,
        {
            "knee*": (8, 36),
            "leg_front*": (4, 20),
            "toes_up*": (-22, 12),
            "arm_out*": (-32, -18, 0.15),
            "elbow*": (-25, 5, 0.2),
            "shrug*": (0, 7, 0.1),
            "nod": (-2, 6, 0.2),
            "wrist*": (-12, 18, 0.3),
        },
    ),
    "light_hopping_stiff": (
        8,
        {
            "knee*": (2, 10),
            "leg_front*": (1, 5),
            "toes_up*": (-26, 4),
            "arm_out*": (-34, -30),
            "shrug*": (0, 5, 0.1),
        },
    ),
    "one_leg_jump": (
        5,
        {
            "leg_front-": (30, 42, 0.1),
            "knee-": (75, 90, 0.1),
            "leg_front+": (4, 26),
            "knee+": (8, 45),
            "toes_up+": (-24, 15),
            "leg_out+": (-8, -8),
            "arm_out*": (0, 28, 0.1),
            "elbow*": (-10, 20, 0.1),
            "bend": (2, 12),
            "pelvis_lean": (-3, 3),
        },
    ),
    "one_leg_loose": (
        3,
        {
            "leg_front-": (5, 60),
            "knee-": (25, 85, 0.1),
            "leg_out-": (0, 14, 0.25),
            "toes_up-": (-20, 5),
            "knee+": (2, 10, 0.2),
            "leg_out+": (-9, -7),
            "arm_out*": (-15, 25, 0.15),
            "elbow*": (-20, 10, 0.3),
            "lean": (-4, 4),
        },
    ),
    "punching": (
        4,
        {
            "arm_front~": (25, 75),
            "arm_out*": (-38, -32),
            "arm_turn*": (15, 25),
            "elbow~": (85, -25),
            "fist*": (75, 75),
            "turn": (22, -22),
            "look": (-15, 15),
            "knee*": (12, 20),
            "leg_front*": (8, 12),
            "pelvis_turn": (8, -8),
        },
    ),
    "running_on_spot": (
        6,
        {
            "leg_front~": (-8, 58),
            "knee~": (12, 95, 0.08),
            "toes_up~": (-22, 10, 0.1),
            "arm_front~": (-38, 32, 0.5),
            "elbow*": (45, 55),
            "fist*": (50, 50),
            "turn": (-8, 8),
            "bend": (6, 10),
        },
    ),
    "shake_arms": (
        8,
        {
            "arm_out*": (5, 30),
            "elbow*": (-20, 15, 0.15),
            "wrist*": (-25, 25, 0.3),
            "forearm_turn*": (-20, 20, 0.2),
            "shrug*": (0, 6),
            "nod": (-2, 4),
        },
    ),
    "shake_hips": (
        6,
        {
            "pelvis_lean": (-13, 13),
            "pelvis_turn": (-8, 8, 0.2),
            "knee~": (3, 16, 0.5),
            "leg_front~": (2, 9, 0.5),
            "arm_out*": (0, 8),
            "elbow*": (20, 30),
        },
    ),
    "shake_shoulders": (
        7,
        {
            "shrug~": (-5, 16),
            "turn": (-14, 14),
            "arm_out*": (-18, -10),
            "elbow~": (5, 20, 0.1),
            "knee*": (4, 9),
        },
    ),
}


class AnnyBodies(AnnyMeshes):
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
    """

    default_split = "sequence"

    def __init__(
        self,
        root: str | Path,
        frames: int = 20,
        seed: int = 0,
        transform: Callable | None = None,
    ):
        super().__init__(
            root,
            "anny_bodies",
            GENERATOR,
            {"frames": frames},
            seed,
            lambda folder: _Bodies(folder, frames, seed),
            sequence_labels(
                [f"{s:02d}{'mf'[s % 2]}" for s in range(NUM_SUBJECTS)], list(MOTIONS), frames
            ),
            transform,
        )


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


def draw_motion(rng: np.random.Generator, motion: str, time: ndarray) -> dict[str, ndarray]:
    r"""Joint angles in degrees over a sequence, with :obj:`.L` and :obj:`.R` for limbs. It starts
    and ends at rest.

    Args:
        rng (numpy.random.Generator): Where chance comes from.
        motion (str): One of the motions.
        time (numpy.ndarray): The part of the sequence that has passed at every frame.
    """
    repeats, joints = MOTIONS[motion]
    turns = repeats * rng.uniform(0.9, 1.1) * time
    strength = rng.uniform(0.9, 1.1)
    preferred = "L" if rng.random() < 0.5 else "R"
    start, end = rng.uniform([0.1, 0.84], [0.16, 0.9])
    moving = smoothstep(time / start) * smoothstep((1 - time) / (1 - end))
    angles = {
        name: np.full(len(time), float(REST.get(name.split(".")[0], 0)))
        for name in [*CENTER, *(f"{name}.{side}" for name in LIMB for side in "LR")]
    }
    for key, (low, high, *lag) in joints.items():
        name, kind = key.rstrip("*~+-"), key[-1]
        rest = REST.get(name, 0)
        middle = (low + high) / 2 + rng.normal(0, 1.5)
        swing = (high - low) / 2 * strength * np.exp(np.clip(rng.normal(0, 0.08), -0.16, 0.16))
        lag = sum(lag) + np.clip(rng.normal(0, 0.02), -0.05, 0.05)
        sides = {"+": preferred, "-": "RL"["LR".index(preferred)], "*": "LR", "~": "LR"}
        for side in sides.get(kind, [""]):
            late = lag + (0.5 if (kind, side) == ("~", "R") else 0)
            curve = middle - swing * np.cos(2 * np.pi * (turns - late))
            angles[f"{name}.{side}" if side else name] += moving * (curve - rest)
    for name in angles:
        size = 0.6 if name.startswith(("knee", "toes_up", "pelvis")) else 1.5
        waves = size * rng.standard_normal(3) / np.arange(1, 4)
        angles[name] += waves @ np.sin(np.pi * np.outer(np.arange(1, 4), time))
        angles[name] = np.clip(angles[name], *LIMITS[name.split(".")[0]])
    return angles


def rotation_vectors(angles: dict[str, ndarray]) -> dict[str, ndarray]:
    r"""Joint angles of :meth:`draw_motion` to rotation vectors :obj:`[B, 3]` of bones, in degrees
    along Anny's axes."""
    turns: dict[str, Rotation] = {}

    def turn(bone: str, axis: ndarray, angle: ndarray) -> None:
        # Anny's x, y, z point left, back and up.
        axis = axis[[0, 2, 1]] * [1, -1, 1] / np.linalg.norm(axis)
        rotation = Rotation.from_rotvec(np.outer(angle, axis), degrees=True)
        turns[bone] = rotation * turns[bone] if bone in turns else rotation

    for name, (shares, axis) in CENTER.items():
        for bone, share in shares.items():
            turn(bone, np.array(axis, float), share * angles[name])
    for name, (shares, axis) in LIMB.items():
        for side, mirror in (("L", [1, 1, 1]), ("R", [1, -1, -1])):
            for bone, share in shares.items():
                turn(f"{bone}.{side}", np.array(axis) * mirror, share * angles[f"{name}.{side}"])
    return {bone: rotation.as_rotvec(degrees=True) for bone, rotation in turns.items()}
