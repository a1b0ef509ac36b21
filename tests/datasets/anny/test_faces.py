import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool.datasets import AnnyFaces
from pyg_attnpool.datasets.anny import faces as anny_faces
from pyg_attnpool.datasets.anny import model as anny_model
from pyg_attnpool.mesh.io import check_mesh

pytest.importorskip("anny")
LOAD_ANNY = anny_model.load_anny
FRAMES = 3  # a sixth of the way, the peak, a sixth before the end
EXPRESSIONS = [
    "bareteeth",
    "cheeks_in",
    "eyebrow",
    "high_smile",
    "lips_back",
    "lips_up",
    "mouth_down",
    "mouth_extreme",
    "mouth_middle",
    "mouth_open",
    "mouth_side",
    "mouth_up",
]


@pytest.fixture(scope="module")
def faces(loaded_once, tmp_path_factory):
    return AnnyFaces(tmp_path_factory.mktemp("faces"), frames=FRAMES)


@pytest.fixture(scope="module")
def peaks(loaded_once, tmp_path_factory):
    return AnnyFaces(tmp_path_factory.mktemp("peaks"), frames=1)


@pytest.fixture(scope="module")
def moved(faces):
    # How vertices move within the head, in mm: from the first sixth of a sequence to its peak,
    # after the back of the head has been aligned.
    x = faces.vertices.double().view(12, 12, FRAMES, -1, 3).numpy()
    back = faces.template[0][:, 2] < -0.06
    out = np.empty_like(x[:, :, 0])
    for s in range(12):
        for e in range(12):
            start, peak = x[s, e, 0], x[s, e, 1]
            a, b = peak[back], start[back]
            u, _, v = np.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
            turn = u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v
            out[s, e] = (peak - a.mean(0)) @ turn + b.mean(0) - start
    return 1000 * out


def test_laid_out_as_coma(faces):
    assert len(faces) == 12 * 12 * FRAMES
    assert faces.expression == [e for _ in range(12) for e in EXPRESSIONS for _ in range(FRAMES)]
    assert faces.subject == [f"{s:02d}" for s in range(12) for _ in range(12 * FRAMES)]
    assert faces.frame == list(range(FRAMES)) * 144
    assert faces.vertices.dtype == torch.float32 and faces.vertices.is_contiguous()
    storage = faces.vertices.untyped_storage().data_ptr()
    assert faces[200].pos.untyped_storage().data_ptr() == storage
    assert torch.equal(faces[200].pos, faces.vertices[200])
    split = faces.split("extrapolation", expression="mouth_open")
    assert {faces.expression[i] for i in split.test} == {"mouth_open"}
    assert len(split.test) == 12 * FRAMES


def test_template_is_a_manifold_turned_outwards(faces):
    vertices, triangles = check_mesh(*faces.template)
    assert vertices.shape == (4538, 3) and triangles.shape == (9014, 3)
    for v in (vertices, faces.vertices[1].double().numpy(), faces.vertices[-1].double().numpy()):
        # A head displaces some litres; it would be as much less than nothing turned inside out.
        a, b, c = v[triangles].transpose(1, 0, 2)
        assert 2.5e-3 < (a * np.cross(b, c)).sum() / 6 < 5.5e-3


def test_upright_in_metres_around_the_origin(faces):
    for x in (torch.from_numpy(faces.template[0]), *faces.vertices[:: 12 * FRAMES].double()):
        assert x.mean(dim=0).abs().max() < 0.004
        width, height, depth = (x.amax(dim=0) - x.amin(dim=0)).tolist()
        assert 0.15 < width < 0.21 and 0.22 < height < 0.32 and 0.18 < depth < 0.28
        # The tip of the nose is in front, in the middle.
        nose = x[x[:, 2].argmax()]
        assert abs(nose[0]) < 0.01 and -0.05 < nose[1] < 0.04


def test_expressions_move_what_they_are_named_after(faces, moved):
    x, y, z = faces.template[0].T
    tip = z.argmax()  # of the nose
    up = dict(zip(EXPRESSIONS, moved[..., 1].transpose(1, 0, 2), strict=True))
    brow = up["eyebrow"].argmax(axis=1)
    assert (up["eyebrow"].max(axis=1) > 4).all()
    assert (y[brow] > y[tip] + 0.03).all() and (z[brow] > 0.02).all()
    for name in ("mouth_open", "mouth_extreme"):
        lip = up[name].argmin(axis=1)
        assert (up[name].min(axis=1) < -12).all()
        assert (y[lip] < y[tip] - 0.02).all() and (abs(x[lip]) < 0.03).all()
    corner = up["high_smile"].argmax(axis=1)
    assert (up["high_smile"].max(axis=1) > 6).all()
    assert (y[corner] < y[tip] + 0.01).all() and (abs(x[corner]) > 0.015).all()
    # The mouth goes to the side that the subject prefers.
    side = moved[:, EXPRESSIONS.index("mouth_side"), :, 0]
    mouth = (y < y[tip] - 0.02) & (y > y[tip] - 0.05) & (z > 0.03) & (abs(x) < 0.02)
    assert (abs(side[:, mouth].mean(axis=1)) > 3).all()

    largest = np.linalg.norm(moved, axis=-1).max(axis=(0, 2))
    assert (largest > 5).all() and (largest < 40).all()


def test_every_action_is_known_to_anny(loaded_once, tmp_path):
    head = anny_model.load_anny(tmp_path, "", **anny_faces.RIG)
    known = {"jawPitch", *head.facial_action_labels}
    for side in ("Left", "Right"):
        for peak in anny_faces.EXPRESSIONS.values():
            assert set(anny_faces._spell_out(peak, side)) <= known


def test_subjects_differ_as_people_do(faces):
    neutral = faces.vertices.view(12, 12, FRAMES, -1, 3)[:, :, 0].mean(dim=1)
    distance = 1000 * (neutral[:, None] - neutral[None]).norm(dim=-1).mean(dim=-1)
    apart = distance[~torch.eye(12, dtype=torch.bool)]
    assert apart.min() > 2 and apart.max() < 20


@pytest.mark.slow
def test_neither_shape_nor_motion_depends_on_frames(faces, peaks):
    # One frame is the peak, as is the second of three.
    torch.testing.assert_close(peaks.vertices, faces.vertices[1::FRAMES], atol=1e-6, rtol=0)
    assert np.array_equal(peaks.template[0], faces.template[0])


@pytest.mark.slow
def test_the_seed_decides_and_nothing_else(peaks, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    same = AnnyFaces(tmp_path, frames=1, seed=0)
    other = AnnyFaces(tmp_path, frames=1, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]

    assert torch.equal(same.vertices, peaks.vertices)
    assert np.array_equal(other.template[0], peaks.template[0])
    assert np.array_equal(other.template[1], peaks.template[1])
    apart = (other.vertices - peaks.vertices).norm(dim=-1).mean(dim=-1)
    assert (apart > 1e-3).all()


def stub(monkeypatch):
    # Counts what is made, and makes it quickly.
    made = []

    class Stub:
        labels = {}  # noqa: RUF012

        def __init__(self, folder, frames, seed, *_):
            made.append((frames, seed))
            self.sizes = [frames] * 144
            self.meshes = np.random.default_rng(seed).random((144, frames, 4, 3), dtype=np.float32)
            faces = np.array([[0, 1, 2], [0, 2, 3]])
            self.template = self.meshes[0, 0].astype(np.float64), faces

        def blocks(self, start):
            yield from self.meshes[start:]

    monkeypatch.setattr(anny_faces, "_Faces", Stub)
    return made


def test_stored_and_reused(monkeypatch, tmp_path, capsys):
    made = stub(monkeypatch)
    first = AnnyFaces(tmp_path, frames=10)
    size = (tmp_path / "processed" / "anny_faces_frames10_seed0.npz").stat().st_size
    assert capsys.readouterr().out == (
        f"Made 1,440 meshes of 4 vertices, {size / 1e6:.0f} MB in "
        f"{tmp_path}/processed/anny_faces_frames10_seed0.npz\n"
    )
    again = AnnyFaces(str(tmp_path), frames=10)
    assert made == [(10, 0)]
    assert capsys.readouterr().out == ""
    assert torch.equal(first.vertices, again.vertices)
    assert first.expression == again.expression
    AnnyFaces(tmp_path, frames=2)
    AnnyFaces(tmp_path, frames=10, seed=3)
    assert made == [(10, 0), (2, 0), (10, 3)]
    assert sorted(p.name for p in (tmp_path / "processed").iterdir()) == [
        "anny_faces_frames10_seed0.npz",
        "anny_faces_frames10_seed3.npz",
        "anny_faces_frames2_seed0.npz",
    ]


def damage_one_bit(path):
    # Within the vertices, under a checksum of the archive that fits.
    with np.load(path) as file:
        arrays = dict(file)
    arrays["vertices"].view(np.uint32)[5, 1, 2] ^= 1
    np.savez(path, **arrays)


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_all(path):
    path.write_bytes(b"")


def damage_missing(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"}
    np.savez(path, **arrays)


def damage_pickle(path):
    with np.load(path) as file:
        arrays = dict(file)
    arrays["vertices"] = np.array([{"a": 1}], dtype=object)
    np.savez(path, **arrays)


def damage_other_seed(path):
    AnnyFaces(path.parent.parent, frames=2, seed=1)
    path.with_name("anny_faces_frames2_seed1.npz").replace(path)


@pytest.mark.parametrize(
    "damage",
    [
        damage_one_bit,
        damage_bytes,
        damage_end,
        damage_all,
        damage_missing,
        damage_pickle,
        damage_other_seed,
    ],
)
def test_made_again_if_damaged(monkeypatch, tmp_path, capsys, damage):
    made = stub(monkeypatch)
    whole = AnnyFaces(tmp_path, frames=2)
    damage(tmp_path / "processed" / "anny_faces_frames2_seed0.npz")
    del made[:]
    capsys.readouterr()
    again = AnnyFaces(tmp_path, frames=2)
    assert made == [(2, 0)]
    assert "seed0.npz" in capsys.readouterr().out.splitlines()[0]
    assert torch.equal(again.vertices, whole.vertices)
    AnnyFaces(tmp_path, frames=2)
    assert made == [(2, 0)]


def test_made_again_by_another_generator(monkeypatch, tmp_path):
    made = stub(monkeypatch)
    AnnyFaces(tmp_path, frames=2)
    monkeypatch.setattr(AnnyFaces, "generator", AnnyFaces.generator + 1)
    AnnyFaces(tmp_path, frames=2)
    AnnyFaces(tmp_path, frames=2)
    assert made == [(2, 0), (2, 0)]


def test_nothing_is_left_of_a_build_that_fails(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    import anny

    cache = anny.paths.get_anny_cache_path()
    monkeypatch.setattr(anny, "Anny", fail)
    monkeypatch.setattr(anny_model, "load_anny", LOAD_ANNY)
    with pytest.raises(KeyboardInterrupt):
        AnnyFaces(tmp_path)
    assert list((tmp_path / "processed").iterdir()) == []
    assert anny.paths.get_anny_cache_path() == cache
    assert anny.models.full_model.load_blend_shape.__module__ == "anny.models.full_model"


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="positive 'frames' .got 0"):
        AnnyFaces(tmp_path, frames=0)
    with pytest.raises(ValueError, match="non-negative 'seed' .got -1"):
        AnnyFaces(tmp_path, seed=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["nose/nose-hump-incr", "macrodetails/universal-male-young-averagemuscle-averageweight"],
)
def test_files_are_read_as_anny_reads_them(name):
    import anny.models.full_model
    import roma

    file = Path(anny.__file__).parent / "data" / "mpfb2" / "targets" / f"{name}.target.gz"
    turn = roma.Linear(0.1 * roma.euler_to_rotmat("X", [90], degrees=True, dtype=torch.float64))
    arguments = file, 19158, turn[None], torch.float64
    expected = anny.models.full_model.load_blend_shape(*arguments)
    assert torch.equal(anny_model.load_blend_shape(*arguments), expected)


@pytest.mark.slow
def test_sequences_are_smooth_from_neutral_to_neutral(loaded_once, tmp_path):
    x = AnnyFaces(tmp_path, frames=60).vertices.view(12, 12, 60, -1, 3)
    first, last = x[:, :, 0], x[:, :, -1]
    assert (first - last).norm(dim=-1).max() < 2e-3
    assert (first - first.mean(dim=1, keepdim=True)).norm(dim=-1).max() < 2e-3
    step = (x[:, :, 1:] - x[:, :, :-1]).norm(dim=-1).amax(dim=(2, 3))
    assert step.max() < 4e-3


@pytest.mark.slow
def test_a_build_leaves_nothing_but_the_data_set(faces, tmp_path):
    home, temporary, root = (tmp_path / name for name in ("home", "temporary", "root"))
    home.mkdir()
    temporary.mkdir()
    code = f"from pyg_attnpool.datasets import AnnyFaces; AnnyFaces({str(root)!r}, {FRAMES})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(home.iterdir()) == []
    assert list(temporary.iterdir()) == []
    path = root / "processed" / f"anny_faces_frames{FRAMES}_seed0.npz"
    assert [p for p in root.rglob("*") if p.is_file()] == [path]
    assert run.stdout.startswith("Made 432 meshes of 4,538 vertices, 24 MB")
    assert run.stdout.count("\n") == 1
    assert "Making faces: 100%" in run.stderr and "arp" not in run.stderr
    assert torch.equal(AnnyFaces(root, FRAMES).vertices, faces.vertices)
