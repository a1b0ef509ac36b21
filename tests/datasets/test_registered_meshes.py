import os

import numpy as np
import pytest
import torch

from pyg_attnpool.datasets import RegisteredMeshes, looks_unaligned
from tests.mesh.meshes import icosphere

FACES = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])


def tetrahedra(num, seed=0):
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    return corners + np.random.default_rng(seed).uniform(-0.1, 0.1, (num, 4, 3))


def write_obj(path, vertices, faces=FACES):
    # By hand, so that nothing here is read by what wrote it.
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (faces + 1).tolist()]
    path.write_text("\n".join(lines) + "\n")


def write_off(path, vertices, faces=FACES):
    lines = ["OFF", f"{len(vertices)} {len(faces)} 0"]
    lines += [f"{x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
    lines += [f"3 {a} {b} {c}" for a, b, c in faces.tolist()]
    path.write_text("\n".join(lines) + "\n")


def test_folder_in_sorted_order(tmp_path):
    meshes = tetrahedra(4)
    # Written in another order than sorted; not all of one format or depth.
    write_obj(tmp_path / "b.obj", meshes[2])
    write_obj(tmp_path / "z" / "a.obj", meshes[3])
    write_off(tmp_path / "a10.off", meshes[1])
    write_obj(tmp_path / "a9.OBJ", meshes[0])
    write_obj(tmp_path / ".a8.obj", meshes[0])  # hidden, as temporary files are
    write_obj(tmp_path / ".old" / "a.obj", meshes[0])
    (tmp_path / "notes.txt").write_text("no mesh")
    dataset = RegisteredMeshes(tmp_path)
    assert dataset.name == ["a9.OBJ", "a10.off", "b.obj", "z/a.obj"]
    assert dataset.vertices.dtype == torch.float32
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes, atol=1e-6)
    np.testing.assert_allclose(dataset.template[0], meshes[0], atol=1e-6)
    assert dataset.template[1].tolist() == FACES.tolist()
    assert dataset.subject is None and dataset.expression is None and dataset.frame is None
    assert dataset[3].name == "z/a.obj"
    assert dataset[3].face.t().tolist() == FACES.tolist()


@pytest.mark.parametrize("cached", [False, True])
def test_a_single_file(tmp_path, cached):
    meshes = tetrahedra(2)
    write_obj(tmp_path / "a.obj", meshes[0])
    write_off(tmp_path / "b.off", meshes[1])
    cache = tmp_path / "cache" if cached else None
    dataset = RegisteredMeshes(tmp_path / "b.off", unit="cm", cache=cache)
    assert dataset.name == ["b.off"]
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes[1:] / 100, atol=1e-6)
    np.testing.assert_allclose(dataset.template[0], meshes[1] / 100, atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"c\.off"):
        RegisteredMeshes(tmp_path / "c.off")


def test_coma_folders_give_labels(tmp_path):
    meshes = iter(tetrahedra(7))
    for name in ("s2/open/1", "s1/smile/000002", "s1/smile/000007", "s1/open/1", "s1/open/2"):
        write_obj(tmp_path / f"{name}.obj", next(meshes))
    dataset = RegisteredMeshes(tmp_path)
    assert dataset.subject == ["s1", "s1", "s1", "s1", "s2"]
    assert dataset.expression == ["open", "open", "smile", "smile", "open"]
    assert dataset.frame == [0, 1, 0, 1, 0]
    assert dataset.split("identity", subject="s2").test.tolist() == [4]
    assert dataset.split("extrapolation", expression="open").test.tolist() == [0, 1, 4]

    # One file at another depth: the folders mean something else.
    write_obj(tmp_path / "s1" / "template.obj", next(meshes))
    assert RegisteredMeshes(tmp_path).subject is None


def test_unit_takes_meshes_and_template_to_metres(tmp_path):
    meshes = tetrahedra(3)
    for i, mesh in enumerate(meshes):
        write_obj(tmp_path / f"{i}.obj", 1000 * mesh)
    dataset = RegisteredMeshes(tmp_path, unit="mm")
    assert dataset.unit == "mm"
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes, atol=1e-6)
    np.testing.assert_allclose(dataset.template[0], meshes[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"'unit' to be one of \['m', 'cm', 'mm'\] .got 'inch'"):
        RegisteredMeshes(tmp_path, unit="inch")


def test_folder_with_a_template_of_its_own(tmp_path):
    meshes = tetrahedra(3)
    for i, mesh in enumerate(meshes[1:]):
        write_obj(tmp_path / "data" / f"{i}.obj", mesh)
    write_obj(tmp_path / "template.obj", meshes[0])
    dataset = RegisteredMeshes(tmp_path / "data", template=tmp_path / "template.obj")
    np.testing.assert_allclose(dataset.template[0], meshes[0], atol=1e-6)
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes[1:], atol=1e-6)
    write_obj(tmp_path / "template.obj", meshes[0], FACES[:, [0, 2, 1]])
    with pytest.raises(ValueError, match=r"0\.obj \(got \[0, 1, 2\] instead of \[0, 2, 1\]"):
        RegisteredMeshes(tmp_path / "data", template=tmp_path / "template.obj")


def corrupt_count(path, mesh):
    write_obj(path, np.concatenate([mesh, mesh[:1] + 2]), np.concatenate([FACES, [[0, 1, 4]]]))


def corrupt_faces(path, mesh):
    write_obj(path, mesh, FACES[[1, 0, 2, 3]])


def corrupt_number_of_faces(path, mesh):
    write_obj(path, mesh, FACES[:3])


def corrupt_nan(path, mesh):
    mesh = mesh.copy()
    mesh[2, 1] = np.nan
    write_obj(path, mesh)


def corrupt_infinity(path, mesh):
    mesh = mesh.copy()
    mesh[2, 1] = np.inf
    write_obj(path, mesh)


def corrupt_end(path, mesh):
    write_off(path.with_suffix(".off"), mesh)
    text = path.with_suffix(".off").read_text()
    path.with_suffix(".off").write_text(text[: len(text) // 2])


def corrupt_content(path, mesh):
    path.write_bytes(b"\x00\x01\x02 no mesh at all")


@pytest.mark.parametrize(
    "corrupt",
    [
        corrupt_count,
        corrupt_faces,
        corrupt_number_of_faces,
        corrupt_nan,
        corrupt_infinity,
        corrupt_end,
        corrupt_content,
    ],
)
def test_a_bad_file_is_named(tmp_path, corrupt):
    meshes = tetrahedra(5)
    for i in (0, 1, 3, 4):
        write_obj(tmp_path / f"mesh{i}.obj", meshes[i])
    RegisteredMeshes(tmp_path)
    corrupt(tmp_path / "mesh2.obj", meshes[2])
    with pytest.raises(ValueError, match="mesh2"):
        RegisteredMeshes(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} \(got none\)"):
        RegisteredMeshes(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        RegisteredMeshes(tmp_path / "absent.npz", template=(tetrahedra(1)[0], FACES))
    with pytest.raises(ValueError, match=r"a \.npy file \(got .*meshes\.mat\)"):
        RegisteredMeshes(tmp_path / "meshes.mat", template=(tetrahedra(1)[0], FACES))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_array_beside_a_template(tmp_path, dtype):
    meshes = tetrahedra(6).astype(dtype)
    write_obj(tmp_path / "template.obj", tetrahedra(1, seed=1)[0])
    np.save(tmp_path / "a.npy", meshes)
    np.savez(tmp_path / "b.npz", anything=meshes)
    np.savez_compressed(tmp_path / "c.npz", vertices=meshes, other=np.zeros(3))
    for name in ("a.npy", "b.npz", "c.npz"):
        dataset = RegisteredMeshes(tmp_path / name, template=tmp_path / "template.obj")
        assert torch.equal(dataset.vertices, torch.from_numpy(meshes).float())
        np.testing.assert_allclose(dataset.template[0], tetrahedra(1, seed=1)[0], atol=1e-6)
    dataset = RegisteredMeshes(tmp_path / "a.npy", (1000 * meshes[0], FACES), unit="mm")
    np.testing.assert_allclose(dataset.template[0], meshes[0], rtol=1e-6)
    np.testing.assert_allclose(dataset.vertices.numpy(), 1e-3 * meshes, rtol=1e-6)


def test_bad_arrays(tmp_path):
    template, meshes = (tetrahedra(1)[0], FACES), tetrahedra(6)
    path = tmp_path / "meshes.npz"

    np.savez(path, a=meshes, b=meshes)
    with pytest.raises(ValueError, match=r"'vertices' in .*meshes\.npz \(got \['a', 'b'\]\)"):
        RegisteredMeshes(path, template)
    np.savez(path, vertices=meshes)
    with pytest.raises(ValueError, match=r"'template' .*meshes\.npz"):
        RegisteredMeshes(path)
    with pytest.raises(ValueError, match=r"5 vertices .*meshes\.npz \(got 4\)"):
        RegisteredMeshes(path, (np.zeros((5, 3)), FACES))
    with pytest.raises(ValueError, match="faces of vertices 0 to 3"):
        RegisteredMeshes(path, (template[0], FACES + 1))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"whole file of arrays in .*meshes\.npz"):
        RegisteredMeshes(path, template)
    for bad in (meshes[0], meshes[..., :2], meshes[:0]):
        np.savez(path, vertices=bad)
        with pytest.raises(ValueError, match=r"\[M, N, 3\] in .*meshes\.npz"):
            RegisteredMeshes(path, template)
    infinite = r"meshes\.npz \(got NaN or infinity in mesh 4\)"
    too_large = r"mesh 4 in .*meshes\.npz near the origin"
    for bad, match in ((np.nan, infinite), (np.inf, infinite), (1e300, too_large)):
        broken = meshes.copy()
        broken[4, 1, 2] = bad
        np.savez(path, vertices=broken)
        with pytest.raises(ValueError, match=match):
            RegisteredMeshes(path, template)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "meshes.npy"
    np.save(path, np.array([{"vertices": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"meshes\.npy .*Python objects"):
        RegisteredMeshes(path, (tetrahedra(1)[0], FACES))


def write_ply(path, vertices, **properties):
    # Text, by hand.
    lines = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property double {name}" for name in "xyz"]
    kinds = {name: "uchar" if name in ("red", "green", "blue") else "float" for name in properties}
    lines += [f"property {kind} {name}" for name, kind in kinds.items()]
    lines += [f"element face {len(FACES)}", "property list uchar int vertex_indices", "end_header"]
    columns = [*vertices.T.tolist(), *(np.asarray(p).tolist() for p in properties.values())]
    lines += [" ".join(map(repr, row)) for row in zip(*columns, strict=True)]
    lines += [f"3 {a} {b} {c}" for a, b, c in FACES.tolist()]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("cached", [False, True])
def test_features_of_ply_files_are_further_channels(tmp_path, cached):
    pytest.importorskip("plyfile")
    meshes, rng = tetrahedra(70), np.random.default_rng(0)
    colors, quality = rng.integers(0, 256, (70, 3, 4)), rng.random((70, 4))
    (tmp_path / "scans").mkdir()
    for i, mesh in enumerate(meshes):
        red, green, blue = colors[i]
        extra = dict(red=red, green=green, blue=blue, quality=quality[i])
        write_ply(tmp_path / "scans" / f"{i}.ply", mesh, **extra)
    dataset = RegisteredMeshes(
        tmp_path / "scans",
        unit="cm",
        features=["quality", "color"],
        cache=tmp_path / "cache" if cached else None,
    )
    assert dataset.vertices.shape == (70, 4, 7)
    np.testing.assert_allclose(dataset.pos, 0.01 * meshes, rtol=1e-5)
    np.testing.assert_allclose(dataset.vertices[..., 3], quality, rtol=1e-5)
    expected = colors.transpose(0, 2, 1) / 255
    np.testing.assert_allclose(dataset.vertices[..., 4:], expected, rtol=1e-6)
    assert torch.equal(dataset[3].x, dataset.vertices[3, :, 3:])
    with pytest.raises(ValueError, match=r"features \['normal'\] in .*0.ply"):
        RegisteredMeshes(tmp_path / "scans", features=["normal"])


def test_arrays_of_more_than_coordinates(tmp_path):
    x = np.random.default_rng(0).random((5, 4, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    dataset = RegisteredMeshes(tmp_path / "x.npy", (x[0, :, :3], FACES), unit="mm")
    np.testing.assert_allclose(dataset.vertices[..., :3], 0.001 * x[..., :3], rtol=1e-6)
    np.testing.assert_array_equal(dataset.vertices[..., 3:], x[..., 3:])


def test_folders_of_one_name_have_caches_of_their_own(tmp_path):
    meshes = tetrahedra(4)
    for i, place in enumerate(("a", "b")):
        write_obj(tmp_path / place / "scans" / "0.obj", meshes[2 * i])
        write_obj(tmp_path / place / "scans" / "1.obj", meshes[2 * i + 1])
    sets = [RegisteredMeshes(tmp_path / p / "scans", cache=tmp_path / "c") for p in ("a", "b")] * 2
    for dataset, expected in zip(sets, [meshes[:2], meshes[2:]] * 2, strict=True):
        np.testing.assert_allclose(dataset.vertices.numpy(), expected, atol=1e-6)


def test_aligned_on_the_template(tmp_path):
    scipy = pytest.importorskip("scipy.spatial.transform")
    mesh = tetrahedra(1)[0]
    for i, turn in enumerate(scipy.Rotation.random(5, random_state=0)):
        write_obj(tmp_path / f"{i}.obj", turn.apply(mesh) + i)
    moved, aligned = (RegisteredMeshes(tmp_path, align=flag) for flag in (False, True))
    assert looks_unaligned(moved.vertices) and not looks_unaligned(aligned.vertices)
    expected = np.broadcast_to(aligned.template[0], (5, 4, 3))
    np.testing.assert_allclose(aligned.vertices.numpy(), expected, atol=1e-5)


def test_a_transform_is_applied_when_meshes_are_read(tmp_path):
    for i, mesh in enumerate(tetrahedra(6)):
        write_obj(tmp_path / f"{i}.obj", mesh)

    def flip(data):
        data.pos = data.pos * torch.tensor([-1.0, 1, 1])
        return data

    dataset = RegisteredMeshes(tmp_path, transform=flip)
    read = dataset[1:].read(torch.tensor([0, 2]))
    expected = tetrahedra(6)[[1, 3]] * [-1, 1, 1]
    np.testing.assert_allclose(read.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(dataset[1].pos.numpy(), expected[0], atol=1e-6)
    assert torch.equal(dataset.face, torch.from_numpy(FACES.T))


def test_numbers_sort_by_size_folder_by_folder(tmp_path):
    names = [
        "a/1.obj",
        "a/2.obj",
        "a/10.obj",
        "a2/1.obj",
        "a10/frame9.obj",
        "a10/frame09b.obj",
        "a10/frame10.obj",
        "a b/0.obj",
        "b.obj",
        "mesh_1_20.obj",
        "mesh_2_3.obj",
        "\u00b21.obj",  # a superscript, a digit to str.isdigit alone
        "\u0663.obj",  # three in Arabic
    ]
    meshes = dict(zip(names, tetrahedra(len(names)), strict=True))
    for name in sorted(names):
        write_obj(tmp_path / name, meshes[name])
    dataset = RegisteredMeshes(tmp_path)
    assert dataset.name == names
    np.testing.assert_allclose(dataset.vertices.numpy(), list(meshes.values()), atol=1e-6)


def test_hidden_and_temporary_files_are_no_meshes(tmp_path):
    mesh = tetrahedra(1)[0]
    write_obj(tmp_path / "1.obj", mesh)
    skipped = (".1.obj", "~$1.obj", "1.tmp.obj", "1.part.obj", ".git/1.obj", "__MACOSX/s/._1.obj")
    for name in (*skipped, "1.obj~", "1.obj.part", "~old/1.obj"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no mesh")
    assert RegisteredMeshes(tmp_path).name == ["1.obj"]


def test_a_link_to_nowhere_is_a_missing_mesh(tmp_path):
    write_obj(tmp_path / "1.obj", tetrahedra(1)[0])
    try:
        (tmp_path / "2.obj").symlink_to(tmp_path / "gone.obj")
    except OSError:
        pytest.skip("no links here")
    with pytest.raises(FileNotFoundError, match=r"2\.obj"):
        RegisteredMeshes(tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_the_same_surface_in_another_order(tmp_path, cached):
    meshes, rng = tetrahedra(4), np.random.default_rng(1)
    cache = tmp_path / "cache" if cached else None
    write_obj(tmp_path / "s" / "0.obj", meshes[0])
    for i, mesh in enumerate(meshes[1:], start=1):
        faces = [np.roll(face, rng.integers(3)) for face in rng.permutation(FACES)]
        write_obj(tmp_path / "s" / f"{i}.obj", mesh, np.array(faces))
    dataset = RegisteredMeshes(tmp_path / "s", same_surface=True, cache=cache)
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes, atol=1e-6)
    assert np.array_equal(dataset.template[1], FACES)
    # What was stored for those who take it is not for those who do not.
    with pytest.raises(ValueError, match=r"1\.obj .got .* at face 2, the same surface: 'same_surf"):
        RegisteredMeshes(tmp_path / "s", cache=cache)


def test_another_surface_is_refused_by_its_first_face(tmp_path):
    meshes = tetrahedra(2)
    write_obj(tmp_path / "0.obj", meshes[0])
    turned = FACES[[3, 2, 1, 0]][:, [1, 2, 0]]
    flipped = turned.copy()
    flipped[2] = flipped[2, ::-1]
    twice = turned.copy()
    twice[3] = twice[1]
    for faces, got in (
        (flipped, rf"\[{flipped[2, 0]}, {flipped[2, 1]}, {flipped[2, 2]}\] at face 2, which"),
        (twice, r"at face 3, which it does not have"),
        (turned[:3], "3 instead of 4"),
    ):
        write_obj(tmp_path / "1.obj", meshes[1], faces)
        with pytest.raises(ValueError, match=rf"surface of .*0\.obj in .*1\.obj .got {got}|{got}"):
            RegisteredMeshes(tmp_path, same_surface=True)
        with pytest.raises(ValueError, match=r"faces of .*0\.obj in .*1\.obj"):
            RegisteredMeshes(tmp_path)


def test_the_cache_knows_files_by_their_content(tmp_path, capsys):
    # Large enough that the change is neither at the beginning nor at the end of the file.
    vertices, faces = icosphere(4)
    write_obj(tmp_path / "s" / "0.obj", vertices, faces)
    path = tmp_path / "s" / "0.obj"
    first = RegisteredMeshes(tmp_path / "s", cache=tmp_path / "c").vertices.clone()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    lines = path.read_text().splitlines()
    middle = len(vertices) // 2
    lines[middle] = "v " + "0.125".ljust(len(lines[middle]) - 11, "0") + " 0.5 0.75"
    size = path.stat().st_size
    path.write_text("\n".join(lines) + "\n")
    assert path.stat().st_size == size
    os.utime(path, ns=times)
    changed = RegisteredMeshes(tmp_path / "s", cache=tmp_path / "c").vertices.clone()
    assert (changed != first).any(dim=-1)[0].nonzero().flatten().tolist() == [middle]
    # Files that are as they were are not read again, whatever their times say.
    capsys.readouterr()
    os.utime(path, ns=(0, 0))
    again = RegisteredMeshes(tmp_path / "s", cache=tmp_path / "c")
    assert torch.equal(again.vertices, changed) and capsys.readouterr().out == ""


def test_folders_alike_but_for_their_content(tmp_path):
    meshes = np.round(tetrahedra(2), 3) + 1
    for place, mesh in zip("ab", meshes, strict=True):
        write_obj(tmp_path / place / "scans" / "0.obj", mesh)
        path = tmp_path / place / "scans" / "0.obj"
        path.write_text(path.read_text().ljust(400))
        os.utime(path, (10**9, 10**9))
    for place, mesh in zip("abab", [*meshes, *meshes], strict=True):
        dataset = RegisteredMeshes(tmp_path / place / "scans", cache=tmp_path / "c")
        np.testing.assert_allclose(dataset.vertices[0].numpy(), mesh, atol=1e-6)
    # One in the place of the other.
    (tmp_path / "a").rename(tmp_path / "d")
    (tmp_path / "b").rename(tmp_path / "a")
    dataset = RegisteredMeshes(tmp_path / "a" / "scans", cache=tmp_path / "c")
    np.testing.assert_allclose(dataset.vertices[0].numpy(), meshes[1], atol=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_coordinates_of_maps_are_refused_or_moved_in_double_precision(tmp_path, cached):
    place, meshes = np.array([500_000.25, 5_400_000.125, 100]), tetrahedra(3)
    for i, mesh in enumerate(meshes):
        write_obj(tmp_path / "scans" / f"{i}.obj", mesh + place)
    cache = {"cache": tmp_path / "cache"} if cached else {}
    with pytest.raises(ValueError, match=r"0\.obj near the origin.* around .500000\.., 5400000"):
        RegisteredMeshes(tmp_path / "scans", **cache)
    for shift in (0, 1):
        dataset = RegisteredMeshes(tmp_path / "scans", origin=place + shift, **cache)
        np.testing.assert_allclose(dataset.vertices.numpy(), meshes - shift, atol=1e-7)
        np.testing.assert_allclose(dataset.template[0], meshes[0] - shift, atol=1e-9)
    millimetres = RegisteredMeshes(tmp_path / "scans", unit="mm", origin=place, **cache)
    np.testing.assert_allclose(millimetres.vertices.numpy(), 0.001 * meshes, atol=1e-10)
    for origin in ([0, 0], [0, 0, np.nan], "here", [0, 0, 1j]):
        with pytest.raises(ValueError, match="three finite numbers"):
            RegisteredMeshes(tmp_path / "scans", origin=origin)

    np.save(tmp_path / "scans.npy", meshes + place)
    with pytest.raises(ValueError, match=r"mesh 0 in .*scans\.npy near the origin"):
        RegisteredMeshes(tmp_path / "scans.npy", (meshes[0], FACES))
    with pytest.raises(ValueError, match="'features' or 'origin' of mesh files"):
        RegisteredMeshes(tmp_path / "scans.npy", (meshes[0], FACES), origin=place)


def test_the_motion_taken_away_is_kept(tmp_path):
    scipy = pytest.importorskip("scipy.spatial.transform")
    shapes = tetrahedra(6)
    turns = scipy.Rotation.random(6, random_state=0)
    moved = np.stack(
        [turn.apply(mesh) + i for i, (turn, mesh) in enumerate(zip(turns, shapes, strict=True))]
    )
    for i, mesh in enumerate(moved[:5]):
        write_obj(tmp_path / f"{i}.obj", 1000 * mesh)
    dataset = RegisteredMeshes(tmp_path, unit="mm", align=True)
    motion = dataset.alignment
    assert torch.equal(motion.vertices, dataset.vertices)
    back = motion.undo(dataset.vertices)
    np.testing.assert_allclose(back.numpy(), moved[:5], atol=1e-5)
    part = dataset[torch.tensor([3, 1])].alignment
    np.testing.assert_allclose(part.undo(part.vertices).numpy(), moved[[3, 1]], atol=1e-5)

    # A scan that was not there comes into the pose, and what is made of it goes back.
    scan = torch.from_numpy(moved[5:]).float()
    brought = motion.bring(scan)
    assert (brought.vertices - motion.mean).norm() < 0.6 < (scan - motion.mean).norm()
    np.testing.assert_allclose(brought.undo(brought.vertices), scan, atol=1e-5)
    np.testing.assert_allclose(
        brought.undo(brought.vertices + 0.01)[0],
        (scan[0] + 0.01 * brought.rotation[0].float().sum(dim=0)),
        atol=1e-5,
    )
    assert RegisteredMeshes(tmp_path).alignment is None
