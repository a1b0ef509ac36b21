import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("playwright")


@pytest.mark.slow
def test_pages_of_all_models(tmp_path):
    # In a process of its own: another browser may run in this one.
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        pytest.skip("needs a browser")
    command = [sys.executable, "-m", "benchmarks.viewer", "--num-vertices", "700", "--repeat", "5"]
    subprocess.run(
        [*command, "--output", tmp_path], cwd=Path(__file__).parents[2], check=True, timeout=300
    )
    rows = json.loads((tmp_path / "viewer.json").read_text("utf-8"))["rows"]
    assert [row["model"].split(",")[0] for row in rows] == [
        *("modal", "modal", "CoMA", "CoMA", "Neural3DMM", "PCA")
    ]
    # A page computes in single precision, and not in the order of Python's operations.
    assert all(0 < row["difference"] < 1e-4 for row in rows)
    text = (tmp_path / "viewer.md").read_text("utf-8")
    assert "python -m benchmarks.viewer --num-vertices 700" in text
