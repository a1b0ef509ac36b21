r"""How people move: the joint angles of the motions of Dynamic FAUST."""

from typing import Any

import numpy as np
from numpy import ndarray
from scipy.spatial.transform import Rotation

from pyg_attnpool.datasets.anny.meshes import smoothstep

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
