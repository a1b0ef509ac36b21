import numpy as np
import pytest
import torch

from pyg_attnpool.datasets import AnnyHands, align, looks_unaligned
from pyg_attnpool.datasets.anny import hands as anny_hands
from pyg_attnpool.datasets.anny.hands import LIMITS, draw_poses, rotation_vectors
from pyg_attnpool.mesh.io import check_mesh

pytest.importorskip("anny")


@pytest.fixture(scope="module")
def source(loaded_once, tmp_path_factory):
    return anny_hands._Hands(tmp_path_factory.mktemp("hands"), 250, 0)


@pytest.fixture(scope="module")
def hands(loaded_once, tmp_path_factory):
    return AnnyHands(tmp_path_factory.mktemp("stored"), meshes=250)


@pytest.fixture(scope="module")
def tips(source):
    # Of the vertices of the last bone of each finger, thumb first, the one farthest from the wrist.
    model, distance = source.model.model, np.linalg.norm(source.template[0], axis=1)
    owner = model.dense_vertex_bone_weights.numpy().argmax(axis=1)
    bones = [model.bone_labels.index(f"finger{i}-3.R") for i in range(1, 6)]
    return [int(np.where(owner == bone, distance, 0).argmax()) for bone in bones]


def posed(source, **angles):
    # The hand of an average adult with some joints turned, all others at rest.
    pose = {name: 0 * value for name, value in draw_poses(np.random.default_rng(0), 1).items()}
    for name, value in angles.items():
        pose[name] = pose[name] + value
    turns = rotation_vectors(pose, source.axes)
    return source._turned(source.model(source.model.average_adult(), angles=turns))[0]


def volume(vertices, faces):
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def boundary(faces):
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    edge, count = np.unique(edges, axis=0, return_counts=True)
    return edge[count == 1]


def test_template_is_a_right_hand_open_at_the_wrist(source, tips):
    vertices, faces = check_mesh(*source.template)
    assert vertices.shape == (1609, 3) and faces.shape == (3196, 3)
    loop = boundary(faces)
    assert len(loop) == 20 and len(np.unique(loop)) == 20
    assert 2e-4 < volume(vertices, faces) < 6e-4  # cubic metres, turned outwards
    assert 0.16 < np.ptp(vertices[:, 1]) < 0.23
    assert np.abs(vertices[np.unique(loop)]).max() < 0.06  # the wrist, at the origin
    # Of a right hand with its palm to us, the thumb is on our right.
    assert len(tips) == 5
    assert (vertices[tips[0], 0] > vertices[tips[1:], 0] + 0.01).all()
    assert vertices[tips[0], 1] < vertices[tips[1:], 1].min()


def test_joints_turn_as_they_are_called(source, tips):
    rest = posed(source)
    np.testing.assert_allclose(rest, source.template[0], atol=1e-12)
    ring = np.unique(boundary(source.template[1]))

    def moved(name, value):
        now = posed(source, **{name: value})
        # The forearm's end stays where it is.
        if not name.startswith("wrist"):
            assert np.linalg.norm(now - rest, axis=1)[ring].max() < 0.004, name
        return (now - rest)[tips]

    for name in ("knuckle", "middle", "end"):
        fingers = moved(name, 40)[1:]
        assert (fingers[:, 2] > 0.007).all(), name  # towards the palm
        assert (fingers[:, 1] < 0).all(), name
        assert (np.abs(fingers[:, 0]) < 0.5 * fingers[:, 2]).all(), name
        assert fingers[0, 0] <= 0 < fingers[3, 0], name  # and together
        assert np.abs(moved(name, 40)[0]).max() < 0.002
    spread = moved("spread", 10)[1:, 0]
    assert spread[0] > 0.008 and spread[3] < -0.006 and (np.diff(spread) < 0).all()
    for name in ("thumb_root", "thumb_middle", "thumb_end"):
        assert moved(name, 30)[0, 0] < -0.004, name  # towards the fingers
        assert np.abs(moved(name, 30)[1:]).max() < 0.004
    assert moved("thumb_out", 15)[0, 2] > 0.008
    assert (moved("wrist", 20)[:, 2] > 0.02).all()
    assert (moved("wrist_side", 10)[1:, 0] > 0.015).all()


def test_fingers_keep_their_length(source, hands):
    # Skin stretches where it bends, and elsewhere edges keep their length.
    faces = source.template[1]
    edges = np.unique(np.sort(faces[:, :2], axis=1), axis=0)

    def lengths(vertices):
        return np.linalg.norm(vertices[edges[:, 0]] - vertices[edges[:, 1]], axis=1)

    rest, rng = lengths(posed(source)), np.random.default_rng(3)
    for _ in range(20):
        pose = {name: value[0] for name, value in draw_poses(rng, 1).items()}
        ratio = lengths(posed(source, **pose)) / rest
        assert 0.97 < np.median(ratio) < 1.03
        assert np.quantile(ratio, 0.1) > 0.75 and np.quantile(ratio, 0.9) < 1.3


def test_poses_fill_the_limits_of_joints():
    poses = draw_poses(np.random.default_rng(0), 20_000)
    assert poses.keys() == LIMITS.keys()
    for name, angle in poses.items():
        low, high = LIMITS[name]
        assert low <= angle.min() and angle.max() <= high
        assert np.ptp(angle) > 0.95 * (high - low), name
        assert np.isfinite(angle).all() and angle.std() > 0.08 * (high - low), name
    # The last joint of a finger follows the one before; fingers follow one another less.
    middle, end = poses["middle"], poses["end"]
    assert np.corrcoef(middle[:, 1], end[:, 1])[0, 1] > 0.9
    assert 0.2 < np.corrcoef(middle[:, 0], middle[:, 3])[0, 1] < 0.8


def test_every_hand_is_another_and_of_a_human_size(hands):
    x = hands.vertices.double().numpy()
    assert x.shape == (250, 1609, 3) and np.isfinite(x).all()
    apart = np.linalg.norm(x[:100, None, ::10] - x[None, :100, ::10], axis=-1).mean(axis=-1)
    assert apart[~np.eye(100, dtype=bool)].min() > 1e-3
    inside = np.array([volume(v, hands.template[1]) for v in x])
    assert 1.5e-4 < inside.min() and inside.max() < 8e-4
    assert inside.std() > 0.05 * inside.mean()
    assert np.abs(x).max() < 0.26


def test_fewer_are_the_first_of_more(loaded_once, hands, tmp_path):
    few = AnnyHands(tmp_path, meshes=130)
    assert torch.equal(few.vertices, hands.vertices[:130])
    assert np.array_equal(few.template[0], hands.template[0])
    other = AnnyHands(tmp_path, meshes=30, seed=1)
    assert (other.vertices - hands.vertices[:30]).norm(dim=-1).mean(dim=-1).min() > 1e-3


def test_nine_tenths_are_for_training_and_validation(hands):
    split = hands.split()
    assert split.test.tolist() == [i for i in range(250) if i % 100 < 10]
    assert not set(split.val.tolist()) & set(split.test.tolist())
    assert hands.subject is None
    with pytest.raises(ValueError, match="known 'subject'"):
        hands.split("sequence")


def test_hands_that_bend_are_aligned(hands):
    x = hands.vertices
    assert not looks_unaligned(x) and not any(looks_unaligned(part) for part in x.split(25))
    # A motion of the whole would bring them closer all the same.
    aligned = align(x).vertices
    spread = [float((v - v.mean(dim=0)).square().sum()) for v in (x, aligned)]
    assert spread[1] < 0.5 * spread[0]
    assert looks_unaligned(x + 0.1 * torch.randn(len(x), 1, 3))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="positive 'meshes' .got 0"):
        AnnyHands(tmp_path, meshes=0)
    with pytest.raises(ValueError, match="non-negative 'seed' .got -1"):
        AnnyHands(tmp_path, seed=-1)
    assert list(tmp_path.iterdir()) == []
