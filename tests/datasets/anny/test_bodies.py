from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool.datasets import AnnyBodies
from pyg_attnpool.datasets.anny import bodies as anny_bodies
from pyg_attnpool.datasets.anny.motions import CENTER, LIMB, LIMITS, MOTIONS, REST, draw_motion
from pyg_attnpool.mesh.io import check_mesh

pytest.importorskip("anny")
FRAMES = 60
NAMES = sorted(MOTIONS)


@pytest.fixture(scope="module")
def source(loaded_once, tmp_path_factory):
    return anny_bodies._Bodies(tmp_path_factory.mktemp("bodies"), FRAMES, 0)


@pytest.fixture(scope="module")
def sequences(source):
    # Motion i of subject i % 10.
    return {
        motion: next(source.blocks(14 * (i % 10) + i)).astype(float)
        for i, motion in enumerate(MOTIONS)
    }


@pytest.fixture(scope="module")
def parts(source):
    # Vertices of the template by what they belong to; x points left.
    x, y, _ = source.template[0].T
    low, high = y.min(), y.max()
    height = (y - low) / (high - low)
    return {
        "left hand": x > 0.9 * x.max(),
        "right hand": x < 0.9 * x.min(),
        "left foot": (height < 0.05) & (x > 0),
        "right foot": (height < 0.05) & (x < 0),
        "left hip": (height > 0.5) & (height < 0.56) & (x > 0.1) & (x < 0.25),
        "right hip": (height > 0.5) & (height < 0.56) & (x < -0.1) & (x > -0.25),
        "left shoulder": (height > 0.78) & (height < 0.82) & (x > 0.14) & (x < 0.22),
        "right shoulder": (height > 0.78) & (height < 0.82) & (x < -0.14) & (x > -0.22),
        "head": height > 0.9,
    }


def place(sequence, part):
    return sequence[:, part].mean(axis=1)


def volume(meshes, faces):
    a, b, c = meshes[:, faces].transpose(2, 0, 1, 3)
    return (a * np.cross(b, c)).sum(axis=(1, 2)) / 6


def test_template_is_a_closed_manifold_of_dynamic_fausts_size(source):
    vertices, faces = check_mesh(*source.template)
    assert vertices.shape == (6890, 3) and faces.shape == (13776, 3)
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    _, count = np.unique(edges, axis=0, return_counts=True)
    assert (count == 2).all()
    assert len(vertices) - len(count) + len(faces) == 2
    assert 0.045 < volume(vertices[None], faces)[0] < 0.11  # cubic metres, turned outwards


def test_people_upright_in_metres(source, sequences, parts):
    faces = source.template[1]
    for sequence in sequences.values():
        assert 1.45 < np.ptp(sequence[0, :, 1]) < 2.05
        # Skin neither collapses nor swells where it bends.
        inside = volume(sequence, faces)
        assert 0.04 < inside.min() and inside.max() < 0.15
        assert np.ptp(inside) < 0.06 * inside.mean()
        # Toes in front of heels, the head above them all.
        foot = sequence[0][parts["left foot"]]
        assert np.ptp(foot[:, 2]) > 0.2
        assert place(sequence, parts["head"])[:, 1].min() > 0.5


def test_the_root_stays_at_the_origin(source, sequences):
    belt = np.abs(source.template[0][:, 1]) < 0.03
    belt &= np.abs(source.template[0][:, 0]) < 0.25
    for motion, sequence in sequences.items():
        middle = sequence[:, belt].mean(axis=1)
        assert np.linalg.norm(middle - middle[0], axis=1).max() < 0.06, motion


def test_men_and_women_of_different_build(source):
    rest = np.stack([next(source.blocks(14 * s))[0].astype(float) for s in range(10)])
    faces, heights = source.template[1], np.ptp(rest[:, :, 1], axis=1)
    assert np.ptp(heights) > 0.12
    assert heights[::2].mean() > heights[1::2].mean() + 0.05  # men come first
    inside = volume(rest, faces)
    assert inside.max() > 1.25 * inside.min()
    apart = np.linalg.norm(rest[:, None] - rest[None], axis=-1).mean(axis=-1)
    assert apart[~np.eye(10, dtype=bool)].min() > 0.008


def test_motions_are_what_they_are_called(sequences, parts):
    at = {
        motion: {name: place(sequence, part) for name, part in parts.items()}
        for motion, sequence in sequences.items()
    }

    def reach(motion, part, axis):
        return np.ptp(at[motion][part][:, axis])

    def together(motion, part, axis):
        left, right = (at[motion][f"{side} {part}"][:, axis] for side in ("left", "right"))
        return np.corrcoef(left, right)[0, 1]

    jump = at["jumping_jacks"]
    assert np.ptp(jump["left foot"][:, 0] - jump["right foot"][:, 0]) > 0.3
    assert jump["left hand"][:, 1].max() > jump["left shoulder"][:, 1].max() + 0.2
    assert together("jumping_jacks", "hand", 1) > 0.9
    for motion in ("knees", "running_on_spot"):
        assert min(reach(motion, f"{side} foot", 1) for side in ("left", "right")) > 0.2
        assert together(motion, "foot", 1) < -0.2
    for motion in ("one_leg_jump", "one_leg_loose"):
        feet = sorted(at[motion][f"{side} foot"][:, 1].mean() for side in ("left", "right"))
        assert feet[1] - feet[0] > 0.1
    assert min(reach("punching", f"{side} hand", 2) for side in ("left", "right")) > 0.25
    assert together("punching", "hand", 2) < 0
    assert reach("light_hopping_loose", "left foot", 1) > reach(
        "light_hopping_stiff", "left foot", 1
    )
    assert together("shake_shoulders", "shoulder", 1) < -0.3
    assert together("shake_hips", "hip", 1) < -0.5
    assert np.ptp(at["hips"]["left hip"][:, 1]) > 0.03
    assert reach("shake_arms", "left hand", 1) > 0.15
    assert reach("jiggle_on_toes", "head", 1) < 0.05
    assert reach("chicken_wings", "left hand", 1) > 0.1


def test_joints_stay_within_human_limits_and_move_smoothly():
    time = (np.arange(2000) + 0.5) / 2000
    largest = dict.fromkeys(LIMITS, 0.0)
    for seed in range(20):
        for motion in MOTIONS:
            angles = draw_motion(np.random.default_rng(seed), motion, time)
            assert angles.keys() == {*CENTER, *(f"{n}.{s}" for n in LIMB for s in "LR")}
            for name, angle in angles.items():
                low, high = LIMITS[name.split(".")[0]]
                assert low <= angle.min() and angle.max() <= high, (motion, name)
                rest = REST.get(name.split(".")[0], 0)
                assert abs(angle[[0, -1]] - rest).max() < 0.1
                # Ten turns a sequence at most, of amplitudes below 70: velocities in degrees a
                # sequence, and no jumps in them but where a limit is touched.
                step = np.abs(np.diff(angle)).max() * 2000
                largest[name.split(".")[0]] = max(largest[name.split(".")[0]], step)
    assert max(largest.values()) < 70 * 2 * np.pi * 10


def test_sequences_start_and_end_at_rest(sequences):
    for motion, sequence in sequences.items():
        moved = np.linalg.norm(sequence[0] - sequence[-1], axis=-1)
        assert moved.max() < 0.03, motion
        middle = np.linalg.norm(sequence[FRAMES // 4 : -FRAMES // 4] - sequence[0], axis=-1)
        assert middle.max() > 0.05, motion
        # An eighth of a turn a frame at most: no vertex flies.
        assert np.linalg.norm(np.diff(sequence, axis=0), axis=-1).max() < 0.45, motion


def test_neither_shape_nor_motion_depends_on_frames(source, loaded_once, tmp_path):
    few = anny_bodies._Bodies(tmp_path, FRAMES // 3, 0)
    assert np.array_equal(few.template[0], source.template[0])
    for start in (4, 30):  # the middle one of three frames
        many = next(source.blocks(start))
        np.testing.assert_allclose(next(few.blocks(start)), many[1::3], atol=1e-6)


def test_the_seed_decides(source, loaded_once, tmp_path):
    np.random.seed(1)
    same, other = (anny_bodies._Bodies(tmp_path, FRAMES, seed) for seed in (0, 1))
    first = next(source.blocks(17))
    assert np.array_equal(next(same.blocks(17)), first)
    assert np.linalg.norm(next(other.blocks(17)) - first, axis=-1).mean(axis=1).min() > 0.005
    # A block that is gone on with is the one of a sequence made in one go.
    through = next(islice(same.blocks(13), 4, None))
    assert np.array_equal(through, first)


@pytest.fixture(scope="module")
def bodies(loaded_once, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anny_bodies, "NUM_SUBJECTS", 3)
        return AnnyBodies(tmp_path_factory.mktemp("stored"), frames=1)


def test_laid_out_as_dynamic_faust(bodies, source):
    assert list(source.sizes) == [FRAMES] * 10 * 14
    assert len(bodies) == 42 and bodies.vertices.shape == (42, 6890, 3)
    assert bodies.vertices.dtype == torch.float32
    assert bodies.subject == [s for s in ("00m", "01f", "02m") for _ in range(14)]
    assert bodies.expression == list(MOTIONS) * 3 and list(MOTIONS) == NAMES
    assert bodies.frame == [0] * 42
    assert np.array_equal(bodies.template[0], source.template[0])
    files = sorted(p.name for p in (Path(bodies.root) / "processed").iterdir())
    assert files == ["anny_bodies_frames1_seed0.npy", "anny_bodies_frames1_seed0.npz"]


def test_whole_sequences_are_held_out(bodies):
    split = bodies.split()
    assert split.test.tolist() == [0, 10, 20, 30, 40]
    assert split.val.tolist() == [1, 11, 21, 31, 41]
    assert {bodies.subject[i] for i in split.test} == set(bodies.subject)
    assert len({bodies.expression[i] for i in split.test}) == 5
    held_out = bodies.split("extrapolation", expression="punching").test
    assert held_out.tolist() == [9, 23, 37]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="positive 'frames' .got 0"):
        AnnyBodies(tmp_path, frames=0)
    with pytest.raises(ValueError, match="non-negative 'seed' .got -1"):
        AnnyBodies(tmp_path, seed=-1)
    assert list(tmp_path.iterdir()) == []
