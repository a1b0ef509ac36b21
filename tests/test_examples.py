import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyg_attnpool.mesh import MeshHierarchy, write_mesh
from pyg_attnpool.models import coma
from tests.mesh.meshes import blob

EXAMPLES = Path(__file__).parents[1] / "examples"
for name in ("tyro", "openmesh", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)


def run(*args):
    command = [sys.executable, EXAMPLES / "coma.py", "--device", "cpu", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_coma_on_meshes_of_your_own(tmp_path):
    from pyg_attnpool.training import Standardized, evaluate

    vertices, faces = blob(4, seed=0)
    write_mesh(tmp_path / "template.obj", vertices, faces)
    stretch = np.random.default_rng(0).uniform(90, 110, size=(60, 1, 3))
    np.save(tmp_path / "meshes.npy", (stretch * vertices).astype(np.float32))
    output = tmp_path / "out"
    args = ["--data", tmp_path / "meshes.npy", "--template", tmp_path / "template.obj"]
    args += ["--scale", 0.001, "--epochs", 2, "--latent", 3, "--output", output]

    first = run(*args)
    assert first.returncode == 0, first.stderr
    assert (output / "errors.png").read_bytes().startswith(b"\x89PNG")
    with open(output / "results.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["qem", "attention", "pca"]
    assert rows["qem"]["shipped"] == rows["attention"]["shipped"] == rows["qem"]["trained"]
    assert rows["pca"]["alive"] == "3"
    for row in rows.values():
        assert f"{float(row['mean']):8.3f}" in first.stdout

    # What is on disk is the model of the table, and loads into the QEM twin.
    hierarchy = MeshHierarchy.load(output / "hierarchy.npz")
    state = torch.load(output / "attention/frozen.pt", weights_only=True)
    twin = coma(hierarchy, latent_channels=3, latent_activation=None)
    twin = Standardized(twin, state["mean"], state["std"])
    twin.load_state_dict(state)
    test = torch.from_numpy(np.load(tmp_path / "meshes.npy"))[:7] * 0.001  # 11 of 100
    assert evaluate(twin, test)["mean"] == pytest.approx(float(rows["attention"]["mean"]), rel=1e-4)

    # A second run with --resume finds everything done.
    results = (output / "results.csv").read_bytes()
    assert run(*args, "--resume").returncode == 0
    assert (output / "results.csv").read_bytes() == results


def test_errors_end_the_run_before_any_work(tmp_path):
    result = run("--data", tmp_path / "none", "--output", tmp_path / "out")
    assert result.returncode != 0
    assert "none" in result.stderr
    assert not (tmp_path / "out").exists()
