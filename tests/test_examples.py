import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyg_attnpool import MorphableModel
from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.mesh import write_mesh
from tests.mesh.meshes import blob

EXAMPLES = Path(__file__).parents[1] / "examples"
for name in ("tyro", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)


def run(script, *args):
    command = [sys.executable, EXAMPLES / f"{script}.py", "--device", "cpu", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def scans(folder):
    r"""Options for 60 stretched blobs of about 10 cm, in millimetres."""
    vertices, faces = blob(4, seed=0)
    write_mesh(folder / "template.obj", vertices, faces)
    stretch = np.random.default_rng(0).uniform(90, 110, size=(60, 1, 3))
    np.save(folder / "meshes.npy", (stretch * vertices).astype(np.float32))
    args = ["--data", folder / "meshes.npy", "--template", folder / "template.obj"]
    return [*args, "--unit", "mm", "--latent", 3, "--output", folder / "out"]


@pytest.mark.slow
def test_coma_on_meshes_of_your_own(tmp_path):
    output = tmp_path / "out"
    args = [*scans(tmp_path), "--epochs", 2]

    first = run("coma", *args)
    assert first.returncode == 0, first.stderr
    assert (output / "errors.png").read_bytes().startswith(b"\x89PNG")
    with open(output / "results.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["qem", "attention", "pca"]
    assert rows["qem"]["shipped"] == rows["attention"]["shipped"] == rows["qem"]["trained"]
    assert rows["pca"]["alive"] == "3"
    for row in rows.values():
        assert f"{float(row['mean']):8.3f}" in first.stdout

    # What is on disk are the models of the table.
    test = torch.from_numpy(np.load(tmp_path / "meshes.npy"))[:7] * 0.001  # 11 of 100
    for name, row in rows.items():
        model = MorphableModel.load(output / name / "model")
        assert model.evaluate(test)["mean"] == pytest.approx(float(row["mean"]), rel=1e-4)
        assert model.unit == "mm"

    # The folder of the run knows its meshes.
    report = ["report", str(output), "-o", str(tmp_path / "report.html"), "--no-open"]
    assert importlib.import_module("pyg_attnpool.cli").main(report) == 0
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "7 test meshes" in text and f"<td>{float(rows['pca']['mean']):.3f}</td>" in text

    # A second run with --resume finds everything done.
    results = (output / "results.csv").read_bytes()
    assert run("coma", *args, "--resume").returncode == 0
    assert (output / "results.csv").read_bytes() == results


@pytest.mark.slow
def test_neural3dmm_with_the_other_poolings(tmp_path):
    pools = ["variant", "average", "full"]
    args = ["--epochs", 1, "--hops", 2, "--dilation", 2, 2, 1, 1, "--pool", *pools]
    result = run("neural3dmm", *scans(tmp_path), *args)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [*pools, "pca"]
    assert all(0 < float(row["median"]) < 100 for row in rows)


def load(script):
    spec = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.parametrize("positions", [True, False])
def test_a_model_of_others_is_swapped_trained_and_frozen(monkeypatch, capsys, positions):
    example = load("swap_qem")
    vertices, faces = blob(3, seed=0)
    stretch = np.random.default_rng(0).uniform(0.09, 0.11, size=(60, 1, 3))
    meshes = torch.from_numpy((stretch * vertices).astype(np.float32))
    stand_in = MeshDataset(meshes, (0.1 * vertices, faces))
    monkeypatch.setattr(example, "AnnyFaces", lambda root: stand_in)
    example.main(steps=3, batch_size=4, positions=positions)
    out = capsys.readouterr().out
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:before|after|frozen)", out)]
    before, after, frozen = sizes
    assert before == frozen < after
    errors = {name: float(mm) for name, mm in re.findall(r"^(\w+) +([\d.]+) mm on test", out, re.M)}
    assert errors.keys() == {"before", "after"} and all(0 < mm < 20 for mm in errors.values())
    (shipped,) = re.findall(r"frozen, ([\d.]+) mm", out)
    assert float(shipped) == pytest.approx(errors["after"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* components end before")  # eyeballs
def test_a_walk_through_the_latent_space(tmp_path):
    example = load("latent")
    options = example.Options(root=tmp_path, frames=6, steps=1, output=tmp_path, device="cpu")
    example.main(options)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["qem", "attention", "modal"]
    for name in ("interpolation", "extrapolation", "transfer"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # The straight line and the transfer of offsets know nothing of a model.
    for name in ("straight line", "transfer of offsets"):
        assert len({row[name] for row in rows.values()}) == 1
        assert 0 < float(rows["qem"][name]) < 10
    test = example.AnnyFaces(tmp_path / "AnnyFaces", frames=6)
    test = test[test.split("sequence")[2]]
    for pool, row in rows.items():
        model = MorphableModel.load(tmp_path / f"model_{pool}")
        assert float(row["reconstruction"]) == pytest.approx(model.evaluate(test)["mean"])


def test_what_the_latent_example_counts():
    example = load("latent")
    # Two triangles that cross, and a third beside them.
    x = [[0, 0, 0], [2, 0, 0], [0, 2, 0], [0.5, 0.5, -1], [0.5, 0.5, 1], [3, 3, 1.0]]
    x += [[9, 0, 0], [10, 0, 0], [9, 1, 0.0]]
    mesh, faces = torch.tensor([x]), torch.arange(9).view(3, 3)
    assert example.crossing(mesh[0], faces) == 1
    apart = mesh.clone()
    apart[0, 3:6, 2] += 2
    assert example.crossing(apart[0], faces) == 0
    turned = mesh.clone()
    turned[0, 6:] = turned[0, [6, 8, 7]]
    assert example.flipped(turned, mesh, faces) == pytest.approx(1 / 3)
    assert example.flipped(mesh, mesh, faces) == 0

    # Frames on a line, and a model whose code is the mesh.
    time = torch.arange(9.0).view(1, 9, 1, 1)
    model = SimpleNamespace(interpolate=lambda a, b, n: torch.stack([a] * n, dim=1))
    found, line = example.interpolation(model, time.expand(2, 9, 5, 3))
    assert line == pytest.approx(0, abs=1e-3)
    assert found == pytest.approx(1000 * 3**0.5 * 2)  # one, two and three frames off, in mm


def test_errors_end_the_run_before_any_work(tmp_path):
    result = run("coma", "--data", tmp_path / "none", "--output", tmp_path / "out")
    assert result.returncode != 0
    assert "none" in result.stderr
    assert not (tmp_path / "out").exists()
