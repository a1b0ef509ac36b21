import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pyg_attnpool.datasets import AnnyFaces, AnnyHands
from pyg_attnpool.datasets.anny import Detail, detail
from pyg_attnpool.datasets.anny import bodies as anny_bodies
from pyg_attnpool.datasets.anny import faces as anny_faces
from pyg_attnpool.datasets.anny.detail import FACES, Skin
from pyg_attnpool.mesh.normals import vertex_normals

SIDE = 41  # vertices of the sheet along each side, 3 mm apart
FEW = {"num_subjects": 2, "frames": 1}


def sheet():
    y, x = np.mgrid[:SIDE, :SIDE] * 0.003
    vertices = np.stack([x.ravel(), y.ravel(), np.zeros(SIDE**2)], axis=1)
    corner = np.arange(SIDE**2).reshape(SIDE, SIDE)[:-1, :-1].ravel()
    faces = [
        np.stack([corner, corner + 1, corner + SIDE], axis=1),
        np.stack([corner + 1, corner + SIDE + 1, corner + SIDE], axis=1),
    ]
    return vertices, np.concatenate(faces)


def skin(**kinds):
    return Skin(*sheet(), FACES, Detail(**{**dict.fromkeys(vars(Detail()), 0.0), **kinds}), 0)


def displacement(made, x, key=(0,)):
    # Along the normal of a sheet that stays flat, within its borders.
    out = made(x[None], sheet()[0], made.subject(0), key)[0] - x
    return out[:, 2].reshape(SIDE, SIDE)[4:-4, 4:-4]


@pytest.mark.parametrize("axis", [0, 1])
def test_crests_of_folds_lie_across_the_compression(axis):
    x, _ = sheet()
    x[:, axis] *= 0.8
    folds = displacement(skin(folds=1.0), x)
    along, across = (np.square(np.diff(folds, axis=i)).mean() for i in (1 - axis, axis))
    assert along > 2 * across
    assert 0.0002 < folds.std() < 0.003


def test_folds_take_up_no_more_length_than_there_is():
    # Of a sheet whose length is 0.8 times what it was, the sines are a quarter longer at most.
    x, _ = sheet()
    x[:, 0] *= 0.8
    folds = displacement(skin(folds=1.0), x)
    steps = np.diff(folds, axis=1)
    assert np.hypot(steps, 0.8 * 0.003).sum() < 0.003 * steps.size


def test_skin_that_is_stretched_or_turned_has_no_folds():
    x, _ = sheet()
    assert np.abs(displacement(skin(folds=1.0), 1.2 * x)).max() == 0
    turn = Rotation.from_rotvec([0.3, -0.5, 0.9]).as_matrix()
    made = skin(folds=1.0, tissue=1.0)
    turned = made((x @ turn.T)[None], x, made.subject(0), (0,))[0]
    np.testing.assert_allclose(turned, x @ turn.T, atol=1e-12)


def test_tissue_thickens_as_its_area_shrinks():
    made, (x, _) = skin(tissue=1.0), sheet()
    thickness = made.subject(0).thickness.reshape(SIDE, SIDE)[4:-4, 4:-4]
    small = displacement(made, 0.99 * x)
    np.testing.assert_allclose(small, thickness * (1 / 0.99**2 - 1), rtol=0.01)
    assert (displacement(made, 1.2 * x) < 0).all()
    assert (displacement(made, 0.3 * x) < 0.6 * thickness).all()


def test_fields_are_as_smooth_as_they_are_long():
    made, rng = skin(), np.random.default_rng(0)
    roughness = []
    for length in (0.01, 0.04):
        field = made.field(rng, length, 20).reshape(20, SIDE, SIDE)
        np.testing.assert_allclose(np.square(field).mean(axis=(1, 2)), 1)
        roughness.append(np.square(np.diff(field, axis=1)).mean())
    assert roughness[0] > 4 * roughness[1]


def test_the_surface_of_a_subject_is_its_own_and_stays():
    made, (x, _) = skin(identity=1.0), sheet()
    first, other = made.subject(0), made.subject(1)
    assert np.sqrt(np.square(first.own).mean()) == pytest.approx(FACES.identity)
    assert abs(np.corrcoef(first.own, other.own)[0, 1]) < 0.9
    np.testing.assert_allclose(skin(identity=1.0).subject(0).own, first.own)
    out = made(np.stack([x, x + 0.01]), x, first, (0,))
    np.testing.assert_allclose(out[0, :, 2], first.own * made.exposed, atol=1e-12)


def test_noise_is_of_its_size_and_differs_between_meshes():
    made, (x, _) = skin(noise=1.0), sheet()
    out = made(np.stack([x] * 40), x, made.subject(0), (0,)) - x
    assert out[..., 2].std() == pytest.approx(FACES.sensor, rel=0.05)
    assert out[..., :2].std() == pytest.approx(FACES.sliding, rel=0.1)
    assert abs(np.corrcoef(out[0, :, 2], out[1, :, 2])[0, 1]) < 0.1
    again, other = (made(x[None], x, made.subject(0), key) - x for key in ((0,), (1,)))
    np.testing.assert_array_equal(again[0, :, 2], made(x[None], x, made.subject(0), (0,))[0, :, 2])
    assert not np.allclose(again, other)


def test_skin_inside_a_mouth_is_left_alone():
    # Two sheets that face each other over a gap of 2 mm, and a part that is no skin.
    x, faces = sheet()
    above = x + np.array([0, 0, 0.002])
    bottom, top = np.concatenate([x, above]), np.concatenate([faces, faces[:, ::-1] + len(x)])
    apart = np.array([[0.5, 0, 0], [0.51, 0, 0], [0.5, 0.01, 0]])
    joined = np.concatenate([top, [[0, len(x), 1]]])  # one surface
    all_faces = np.concatenate([joined, [[2 * len(x), 2 * len(x) + 1, 2 * len(x) + 2]]])
    made = Skin(np.concatenate([bottom, apart]), all_faces, FACES, Detail(), 0)
    inner = made.exposed[: len(x)].reshape(SIDE, SIDE)[5:-5, 5:-5]
    assert inner.max() < 0.01
    assert (made.exposed[-3:] == 0).all()


@pytest.mark.slow
def test_no_detail_is_the_plain_set(loaded_once, tmp_path):
    pytest.importorskip("anny")
    plain = AnnyFaces(tmp_path, **FEW)
    none = AnnyFaces(tmp_path, detail=Detail(0, 0, 0, 0), **FEW)
    every = AnnyFaces(tmp_path, detail=True, **FEW)
    assert torch.equal(none.vertices, plain.vertices)
    distance = 1000 * (every.vertices - plain.vertices).norm(dim=-1)
    assert 0.3 < distance.mean() < 1.5 and distance.max() < 15
    np.testing.assert_array_equal(every.template[1], plain.template[1])
    again = AnnyFaces(tmp_path, detail=Detail(), **FEW)  # from the same file
    assert torch.equal(again.vertices, every.vertices)
    names = sorted(path.name for path in (tmp_path / "processed").glob("*.npz"))
    stem = "anny_faces_frames1_subjects2_seed0"
    assert names == [f"{stem}.npz", f"{stem}_detail0-0-0-0.npz", f"{stem}_detail1-1-1-1.npz"]


@pytest.mark.slow
def test_fewer_subjects_are_the_first_of_more(loaded_once, tmp_path):
    pytest.importorskip("anny")
    few, more = (
        anny_faces._Faces(tmp_path, 1, 0, Detail(), num_subjects) for num_subjects in (1, 3)
    )
    count = len(anny_faces.EXPRESSIONS)
    assert (len(few.sizes), len(more.sizes)) == (count, 3 * count)
    for a, b in zip(few.blocks(0), more.blocks(0), strict=False):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_hands_swell_as_they_close(loaded_once, tmp_path):
    pytest.importorskip("anny")
    plain = AnnyHands(tmp_path, meshes=60).vertices
    made = AnnyHands(tmp_path, meshes=60, detail=Detail(0, 1, 0, 0)).vertices
    distance = 1000 * (made - plain).norm(dim=-1).mean(dim=1)
    # A hand is the more closed the nearer its fingertips are to the wrist.
    reach = plain[..., 1].amax(dim=1)
    assert np.corrcoef(distance, reach)[0, 1] < -0.3
    assert distance.max() < 3


@pytest.mark.slow
def test_muscles_lie_where_they_are_and_flesh_lags(loaded_once, tmp_path):
    pytest.importorskip("anny")
    plain = anny_bodies._Bodies(tmp_path, 3, 0)
    made = anny_bodies._Bodies(tmp_path, 3, 0, Detail(0, 1, 0, 0))
    x, template = made.template[0], made.skin
    biceps = made.muscles[0, "L"]
    top = x[biceps.argmax()]
    assert biceps.max() == 1 and top[0] > 0.15  # on the left
    normal = vertex_normals(template.vertices, template.faces)[biceps.argmax()]
    assert normal[2] > 0.5  # and in front
    np.testing.assert_allclose(biceps @ x[:, 0], -(made.muscles[0, "R"] @ x[:, 0]), rtol=0.05)
    head = x[:, 1] > x[:, 1].max() - 0.15
    assert made.soft[head].max() < 0.01 < 0.5 < made.soft.max() <= 1
    still, moved = next(plain.blocks(2)), next(made.blocks(2))  # jiggle_on_toes
    distance = 1000 * np.linalg.norm(moved - still, axis=-1)
    assert distance[:, head].mean() < distance[:, made.soft > 0.5].mean()
    assert 1 < distance.max() < 60


def test_wrong_strengths_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a finite 'folds' of at least 0 \(got -1\)"):
        Detail(folds=-1)
    with pytest.raises(ValueError, match="'noise'"):
        Detail(noise=float("nan"))
    with pytest.raises(TypeError, match="Expected 'detail' as a flag or a Detail"):
        AnnyFaces(tmp_path, detail="much")
    with pytest.raises(ValueError, match=r"positive 'subjects'.*got 0"):
        AnnyFaces(tmp_path, num_subjects=0)
    assert not any(tmp_path.iterdir())
    assert detail.DETAIL_GENERATOR == 1
