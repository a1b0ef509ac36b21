r"""The command line, from a folder of scans to a file that is sent."""

import importlib
import json

import numpy as np
import pytest
import torch

from pyg_attnpool import MorphableModel
from pyg_attnpool.datasets import RegisteredMeshes
from pyg_attnpool.mesh import read_mesh, write_mesh
from tests.mesh.meshes import blob

for name in ("tyro", "pytorch_lightning"):
    pytest.importorskip(name)
main = importlib.import_module("pyg_attnpool.cli").main


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    r"""A folder of 40 stretched blobs of some 10 cm, in millimetres."""
    folder = tmp_path_factory.mktemp("scans")
    vertices, faces = blob(4, seed=0)
    stretch = np.random.default_rng(0).uniform(90, 110, size=(40, 1, 3))
    for i, mesh in enumerate(stretch * vertices):
        write_mesh(folder / f"{i}.ply", mesh, faces)
    return folder


@pytest.fixture(scope="module")
def run(scans, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "blobs"
    assert main(["train", str(scans), "-o", str(output), "--unit", "mm", "--steps", "4"]) == 0
    return output


def test_train_saves_a_frozen_model_that_python_loads(run, scans):
    model = MorphableModel.load(run / "model")
    meshes = RegisteredMeshes(scans, unit="mm")
    errors = model.evaluate(meshes[meshes.split().test])
    shown = model.summary["test error (mm)"]
    assert shown == {name: pytest.approx(errors[name], rel=1e-3) for name in shown}
    assert model.unit == "mm" and not any("key" in name for name, _ in model.named_parameters())


def test_evaluate_prints_the_error_in_millimetres(run, scans, capsys):
    assert main(["evaluate", str(run), str(scans), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, meshes = MorphableModel.load(run / "model"), RegisteredMeshes(scans, unit="mm").vertices
    with torch.no_grad():
        distances = 1000 * (model(meshes) - meshes).double().norm(dim=-1)
    assert found["mean"] == pytest.approx(distances.mean().item(), rel=1e-4)
    assert found["std"] == pytest.approx(distances.std(correction=0).item(), rel=1e-4)


def test_pca_is_exact_for_shapes_that_three_numbers_make(scans, tmp_path, capsys):
    command = ["train", str(scans), "-o", str(tmp_path), "--unit", "mm"]
    assert main([*command, "--model", "pca", "--latent", "3"]) == 0
    assert main(["evaluate", str(tmp_path), str(scans), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("model\n")[-1])["mean"] < 1e-3


def test_info_says_what_the_model_is(run, capsys):
    assert main(["info", str(run / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latent channels"] == 8 and found["unit of files"] == "mm"
    assert found["vertices"] == len(blob(4, seed=0)[0]) and found["epochs"] >= 2


def test_meshes_that_are_only_moved_are_noticed(scans, tmp_path, capsys):
    vertices, faces = blob(4, seed=0)
    for i, move in enumerate(np.random.default_rng(1).uniform(-1, 1, size=(20, 3))):
        write_mesh(tmp_path / "moved" / f"{i}.ply", vertices + 3 * move, faces)
    command = ["train", str(tmp_path / "moved"), "-o", str(tmp_path / "run"), "--model", "pca"]
    assert main(command) == 0 and "--align" in capsys.readouterr().out
    assert main([*command, "--align"]) == 0 and "--align" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, line",
    [
        (["train", "nowhere", "-o", "run"], "nowhere"),
        (["train", "empty", "-o", "run"], "empty"),
        (["train", "{scans}", "-o", "run", "--steps", "0"], "positive steps"),
        (
            ["train", "{scans}", "-o", "run", "--unit", "mm", "--model", "pca", "--latent", "0"],
            "latent",
        ),
        (["info", "nowhere"], "nowhere"),
        (["info", "empty"], "config.json"),
        (["evaluate", "{run}", "other"], "vertices"),
        (["export", "{run}", "model.stl"], ".stl"),
    ],
)
def test_mistakes_are_one_line(command, line, run, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_mesh(tmp_path / "other" / "a.ply", *blob(2, seed=0))
    assert main([part.format(run=run, scans=scans) for part in command]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pyg-attnpool: ") and line in error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["train"], ["train", "a"], ["nothing"], ["info", "a", "--b"]])
def test_wrong_arguments_end_with_code_two(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2 and capsys.readouterr().err


def test_repair_says_what_it_has_done(scans, tmp_path, capsys):
    vertices, faces = read_mesh(scans / "0.ply")
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()] + ["v 0 0 0"]
    lines += [f"f {a} {b} {c}" for a, b, c in [*(faces + 1).tolist(), [1, 1, 2]]]
    (tmp_path / "broken.obj").write_text("\n".join(lines) + "\n")
    out = tmp_path / "whole.obj"
    assert main(["repair", str(tmp_path / "broken.obj"), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 degenerate faces" in said and "1 vertices without a face" in said
    for found, wanted in zip(read_mesh(out), (vertices, faces), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert main(["repair", str(tmp_path / "none.obj"), "-o", str(out)]) == 1
    assert "none.obj" in capsys.readouterr().err


def test_every_command_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in ("train", "evaluate", "info", "export"):
        assert f"Example: pyg-attnpool {command}" in shown
