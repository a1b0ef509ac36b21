r"""The README's own snippets, and the stories that it tells, run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool import AttentionPool, AttentionUnpool, MeshHierarchy, MorphableModel
from pyg_attnpool.mesh import write_mesh
from tests.mesh.meshes import blob

pytest.importorskip("pytorch_lightning")
README = (Path(__file__).parents[1] / "README.md").read_text()


def snippet(start):
    r"""The one block of Python that holds a line."""
    (found,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if start in b)
    return found


@pytest.fixture
def scans(tmp_path, monkeypatch):
    r"""A folder of 60 blobs of some 10 cm, in millimetres."""
    monkeypatch.chdir(tmp_path)
    vertices, faces = blob(4, seed=0)
    write_mesh("template.ply", 0.1 * vertices, faces)
    stretch = np.random.default_rng(0).uniform(90, 110, size=(60, 1, 3))
    for i, mesh in enumerate(stretch * vertices):
        write_mesh(Path("my_scans") / f"{i}.ply", mesh, faces)
    return tmp_path


def test_from_a_folder_of_scans_to_a_model_that_is_sent(scans, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    story = snippet('RegisteredMeshes("my_scans"')
    assert len([line for line in story.splitlines() if line.strip()]) <= 8
    fit = MorphableModel.fit
    few = dict(epochs=2, accelerator="cpu", enable_progress_bar=False)
    monkeypatch.setattr(MorphableModel, "fit", lambda self, *a, **k: fit(self, *a, **k, **few))
    names = {}
    exec(story, names)
    model, meshes = names["model"], names["scans"].vertices[:3]
    assert model.unit == "mm" and 0.05 < meshes.abs().max() < 0.2  # metres
    again = {"MorphableModel": MorphableModel, "meshes": meshes}
    exec(snippet('MorphableModel.load("my_model")'), again)
    assert torch.equal(again["x"], model(meshes)) and again["z"].shape == (3, 8)

    import onnxruntime

    session = onnxruntime.InferenceSession("my_model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": meshes.numpy()})
    np.testing.assert_allclose(out, model(meshes).detach().numpy(), atol=1e-5)


def test_layers_in_a_network_of_your_own(scans):
    hierarchy = MeshHierarchy.from_template("template.ply", factors=[4])
    names = {"x": torch.randn(2, hierarchy.num_vertices[0], 5)}
    code = snippet("pool.mapping().to_sparse_tensor()")
    exec(code, names)
    pool, unpool = names["pool"], names["unpool"]
    assert type(pool) is AttentionPool and type(unpool) is AttentionUnpool
    expected = unpool.mapping().to_dense() @ (
        pool.mapping().to_dense() @ torch.eye(pool.num_source)
    )
    x = torch.randn(2, pool.num_source, 5)
    torch.testing.assert_close(unpool(pool(x)), expected @ x, atol=1e-4, rtol=1e-4)


def test_matrices_of_another_model_are_swapped_and_frozen(scans):
    hierarchy = MeshHierarchy.from_template("template.ply", factors=[4, 4])

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.D, self.U = (
                [m.to(torch.float32).to_dense() for m in ms]
                for ms in (hierarchy.down, hierarchy.up)
            )

        def forward(self, x):
            return self.U[0] @ (self.U[1] @ (self.D[1] @ (self.D[0] @ x)))

    model, x = Model(), torch.randn(1, hierarchy.num_vertices[0], 3)
    before = model(x)
    exec(snippet("swap_pooling(model.D"), {"model": model, "hierarchy": hierarchy})
    assert not list(model.parameters()) and model.D[0].mapping().k == 3
    assert not torch.allclose(model(x), before)  # it starts sharper than the matrices
