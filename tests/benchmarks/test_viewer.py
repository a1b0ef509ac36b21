import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pyg_attnpool import MorphableModel
from pyg_attnpool.visualize import write_report
from tests.mesh.meshes import blob

pytest.importorskip("playwright")


def call(*command):
    # In a process of its own: another browser may run in this one.
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        pytest.skip("needs a browser")
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", *command], cwd=root, check=True, timeout=300)


@pytest.mark.slow
def test_pages_of_all_models(tmp_path):
    command = ["benchmarks.viewer", "--num-vertices", "700", "--repeat", "5"]
    call(*command, "--output", tmp_path)
    rows = json.loads((tmp_path / "viewer.json").read_text("utf-8"))["rows"]
    assert [row["model"].split(",")[0] for row in rows] == [
        *("modal", "modal", "CoMA", "CoMA", "Neural3DMM", "PCA")
    ]
    # A page computes in single precision, and not in the order of Python's operations.
    assert all(0 < row["difference"] < 1e-4 for row in rows)
    text = (tmp_path / "viewer.md").read_text("utf-8")
    assert "python -m benchmarks.viewer --num-vertices 700" in text


@pytest.mark.slow
def test_screenshots_show_the_pages(tmp_path):
    template = blob(4, seed=0)
    x = torch.from_numpy(template[0]).float() * (1 + 0.1 * torch.randn(40, 1, 3))
    model = MorphableModel.pca(template, 2).fit(x)
    write_report(tmp_path / "report.html", {"PCA": model}, x)
    call("benchmarks.screenshots", tmp_path / "report.html", "--output", tmp_path)
    sizes = {"page": (760, 1200), "page-dark": (844, 390), "report": (760, 1200)}
    for name, size in sizes.items():
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[:2] == size
        # A mesh is shaded, where a page without one has few colours.
        assert len(np.unique(picture[..., 0])) > 100
