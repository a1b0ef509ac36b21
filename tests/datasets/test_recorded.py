import json
import os

import numpy as np
import pytest

from pyg_attnpool.datasets import RegisteredMeshes, record_dataset, recorded, recorded_dataset
from pyg_attnpool.mesh import write_mesh
from tests.mesh.meshes import blob


def test_meshes_are_found_from_elsewhere(tmp_path, monkeypatch):
    vertices, faces = blob(2, seed=0)
    for i in range(12):
        write_mesh(tmp_path / "scans" / f"{i:02d}.ply", (1 + i) * vertices, faces)
    monkeypatch.chdir(tmp_path)
    record_dataset("run", "RegisteredMeshes", root="scans", template=None, unit="mm")
    monkeypatch.chdir(os.sep)
    found = recorded_dataset(tmp_path / "run")
    expected = RegisteredMeshes(tmp_path / "scans", unit="mm")
    assert isinstance(found, RegisteredMeshes)
    np.testing.assert_array_equal(found.vertices, expected.vertices)


def test_arguments_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(recorded.KNOWN, "AnnyFaces", lambda **arguments: arguments)
    record_dataset(tmp_path, "AnnyFaces", root=tmp_path / "faces", frames=7)
    assert recorded_dataset(tmp_path) == {"root": str(tmp_path / "faces"), "frames": 7}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"dataset": "os.system", "arguments": {}}',
        '{"dataset": "AnnyFaces"}',
        '{"dataset": "RegisteredMeshes", "arguments": {"root": "x", "colour": 3}}',
    ],
)
def test_something_else_is_named(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json .got something else"):
        recorded_dataset(tmp_path)


def test_bad_calls(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.json .got no such file"):
        recorded_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"'dataset' to be one of .*got 'MeshDataset'"):
        record_dataset(tmp_path, "MeshDataset")
    record_dataset(tmp_path, "RegisteredMeshes", root=tmp_path / "gone")
    assert json.loads((tmp_path / "data.json").read_text())["arguments"]
    with pytest.raises((FileNotFoundError, ValueError), match="gone"):
        recorded_dataset(tmp_path)
