r"""The README's own snippets, and the stories that it tells, run."""

import functools
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool import (
    AttentionPool,
    AttentionUnpool,
    MeshHierarchy,
    MorphableModel,
    datasets,
)
from pyg_attnpool.mesh import write_mesh
from tests.datasets.test_coma import TEMPLATE, write_zip
from tests.mesh.meshes import blob, icosphere

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


@pytest.mark.slow
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


def test_a_model_that_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(snippet('from_pretrained("faces")'), {"MorphableModel": MorphableModel})
    assert Path("faces.html").stat().st_size < 4e6


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


def test_data_sets_are_read_while_training(tmp_path, monkeypatch):
    code = snippet('AnnyBodies("data/AnnyBodies")')
    monkeypatch.chdir(tmp_path)
    write_zip(Path("data/CoMA"))  # 72 meshes of 42 vertices, as COMA's archive holds them
    made = {}
    for name in ("AnnyBodies", "AnnyHands"):  # which take a while to make
        signature = inspect.signature(getattr(datasets, name))

        def stand_in(*args, name=name, signature=signature, **kwargs):
            made[name] = signature.bind(*args, **kwargs).arguments

        monkeypatch.setattr(datasets, name, stand_in)
        (size,) = re.findall(rf"{name}\(.*# (\w+)=[\d_]+", code)
        signature.bind("data", **{size: 10})  # what the comment beside it names
    fit = MorphableModel.fit
    few = dict(epochs=1, accelerator="cpu", enable_progress_bar=False)
    monkeypatch.setattr(MorphableModel, "fit", lambda self, *a, **k: fit(self, *a, **k, **few))
    hierarchy = MeshHierarchy.from_template(icosphere(1), factors=[3, 2])
    model = MorphableModel.coma(hierarchy, 2, channels=(4, 4), decoder_channels=(4, 4, 4))
    names = {"model": model}
    exec(code, names)
    assert {name: given["root"] for name, given in made.items()} == {
        "AnnyBodies": "data/AnnyBodies",
        "AnnyHands": "data/AnnyHands",
    }
    dataset, split = names["dataset"], names["split"]
    assert type(dataset) is datasets.CoMA and dataset.vertices.size(1) == len(TEMPLATE)
    assert sorted(torch.cat(tuple(split)).tolist()) == list(range(72))
    assert model.summary["meshes"] == len(split.train)
    assert (tmp_path / "runs/big/best.ckpt").exists()


def test_the_command_line_knows_every_command_and_option(monkeypatch):
    pytest.importorskip("tyro")
    from pyg_attnpool.cli import app

    called = []

    def recorded(command):
        @functools.wraps(command)
        def record(*args, **kwargs):
            called.append((command.__name__, inspect.signature(command).bind(*args, **kwargs)))

        return record

    monkeypatch.setattr(app, "COMMANDS", [recorded(command) for command in app.COMMANDS])
    lines = re.findall(r"^pyg-attnpool .*", README, re.MULTILINE)
    for line in lines:
        _, name, *rest = shlex.split(line, comments=True)
        assert app.main([name, *rest]) == 0 and called[-1][0] == name
    assert len(called) == len(lines) >= 10
    edited = next(given for name, given in called if name == "edit")
    assert edited.arguments["by"] == ((17, 0.0, 0.0, 5.0),)
    with pytest.raises(SystemExit):
        app.main(["sample", "faces/", "-o", "new/", "--number", "20"])
