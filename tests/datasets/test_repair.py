import numpy as np
import pytest

from pyg_attnpool.datasets import RegisteredMeshes, repair_files
from pyg_attnpool.mesh import check_mesh, read_features, read_mesh, repair
from pyg_attnpool.mesh.formats import ply_bytes
from tests.mesh.meshes import icosphere


def broken():
    r"""A sphere with a face twice, a degenerate one and a vertex in no face."""
    vertices, faces = icosphere(1)
    return np.concatenate([vertices, [[9.0, 9, 9]]]), np.concatenate(
        [faces, faces[:1], [[1, 1, 2]]]
    )


def scans(folder, num=12):
    # Written by hand: `write_mesh` refuses such meshes.
    vertices, faces = broken()
    meshes = vertices + np.random.default_rng(0).normal(0, 0.05, (num, *vertices.shape))
    (folder / "a").mkdir(parents=True)
    for i, mesh in enumerate(meshes):
        columns = dict(zip("xyz", mesh.T, strict=True)) | {"heat": np.arange(len(mesh)) + i}
        (folder / "a" / f"scan{i}.ply").write_bytes(ply_bytes(columns, faces))
    return meshes


def test_registered_meshes_stay_registered(tmp_path):
    meshes = scans(tmp_path / "scans")
    with pytest.raises(ValueError, match="mends it, and takes registered meshes along"):
        check_mesh(*read_mesh(tmp_path / "scans" / "a" / "scan0.ply"))
    mesh, count = repair_files(tmp_path / "scans", tmp_path / "whole")
    assert count == 12 and mesh.changes["vertices without a face"] == 1
    index = np.load(tmp_path / "whole" / "index.npy", allow_pickle=False)
    found = RegisteredMeshes(tmp_path / "whole")
    assert found.name == [f"a/scan{i}.ply" for i in range(12)]
    np.testing.assert_allclose(found.vertices.numpy(), meshes[:, index], atol=1e-6)
    check_mesh(*found.template)
    path = tmp_path / "whole" / "a" / "scan7.ply"
    assert read_features(path)["heat"][:, 0].tolist() == (index + 7).tolist()


def test_a_single_file(tmp_path):
    scans(tmp_path / "scans", num=1)
    mesh, count = repair_files(tmp_path / "scans" / "a" / "scan0.ply", tmp_path / "mesh.obj")
    vertices, faces = read_mesh(tmp_path / "mesh.obj")
    assert count == 1 and np.array_equal(faces, mesh.faces)
    np.testing.assert_array_equal(vertices, mesh.vertices)
    assert repair(vertices, faces).changes == dict.fromkeys(mesh.changes, 0)


def test_what_is_not_registered_is_named(tmp_path):
    scans(tmp_path / "scans", num=3)
    columns = dict(zip("xyz", icosphere(1)[0].T, strict=True))
    (tmp_path / "scans" / "a" / "scan1.ply").write_bytes(ply_bytes(columns, icosphere(1)[1]))
    with pytest.raises(ValueError, match=r"scan0\.ply in .*scan1\.ply .got others.: they are not"):
        repair_files(tmp_path / "scans", tmp_path / "whole")


def test_nothing_is_written_over(tmp_path):
    scans(tmp_path / "scans", num=2)
    before = {p: p.read_bytes() for p in (tmp_path / "scans").rglob("*.ply")}
    for output in (tmp_path / "scans", tmp_path / "scans" / "a" / "scan0.ply"):
        with pytest.raises(ValueError, match="an empty folder to write repaired meshes to"):
            repair_files(tmp_path / "scans", output)
    assert {p: p.read_bytes() for p in (tmp_path / "scans").rglob("*.ply")} == before
    with pytest.raises(FileNotFoundError, match="none"):
        repair_files(tmp_path / "none.ply", tmp_path / "out.ply")
