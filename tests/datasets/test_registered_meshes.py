import numpy as np
import pytest
import torch

from pyg_attnpool.datasets import RegisteredMeshes

pytest.importorskip("openmesh")
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
    write_off(tmp_path / "a10.off", meshes[0])
    write_obj(tmp_path / "a9.OBJ", meshes[1])
    (tmp_path / "notes.txt").write_text("no mesh")
    dataset = RegisteredMeshes(tmp_path)
    assert dataset.name == ["a10.off", "a9.OBJ", "b.obj", "z/a.obj"]
    assert dataset.vertices.dtype == torch.float32
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes, atol=1e-6)
    np.testing.assert_allclose(dataset.template[0], meshes[0], atol=1e-6)
    assert dataset.template[1].tolist() == FACES.tolist()
    assert dataset.subject is None and dataset.expression is None and dataset.frame is None
    assert dataset[3].name == "z/a.obj"
    assert dataset[3].face.t().tolist() == FACES.tolist()


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


def test_scale_takes_meshes_and_template_to_metres(tmp_path):
    meshes = tetrahedra(3)
    for i, mesh in enumerate(meshes):
        write_obj(tmp_path / f"{i}.obj", 1000 * mesh)
    dataset = RegisteredMeshes(tmp_path, scale=0.001)
    np.testing.assert_allclose(dataset.vertices.numpy(), meshes, atol=1e-6)
    np.testing.assert_allclose(dataset.template[0], meshes[0], atol=1e-6)
    for scale in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="positive 'scale'"):
            RegisteredMeshes(tmp_path, scale=scale)


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
    dataset = RegisteredMeshes(tmp_path / "a.npy", (1000 * meshes[0], FACES), scale=1e-3)
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
    with pytest.raises(ValueError, match="'template' faces of vertices 0 to 3"):
        RegisteredMeshes(path, (template[0], FACES + 1))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"whole file of arrays in .*meshes\.npz"):
        RegisteredMeshes(path, template)
    for bad in (meshes[0], meshes[..., :2], meshes[:0]):
        np.savez(path, vertices=bad)
        with pytest.raises(ValueError, match=r"\[M, N, 3\] in .*meshes\.npz"):
            RegisteredMeshes(path, template)
    for bad in (np.nan, np.inf, 1e300):
        broken = meshes.copy()
        broken[4, 1, 2] = bad
        np.savez(path, vertices=broken)
        with pytest.raises(ValueError, match=r"meshes\.npz \(got NaN or infinity in mesh 4\)"):
            RegisteredMeshes(path, template)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "meshes.npy"
    np.save(path, np.array([{"vertices": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"meshes\.npy .*Python objects"):
        RegisteredMeshes(path, (tetrahedra(1)[0], FACES))
