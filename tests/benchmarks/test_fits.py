import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

for name in ("tyro", "pytorch_lightning"):
    pytest.importorskip(name)

from benchmarks import fits  # noqa: E402
from pyg_attnpool.mesh.closest import closest_points  # noqa: E402
from tests.mesh.meshes import blob  # noqa: E402

# So small a template has levels of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The factors lead to levels")


class Blobs:
    r"""Stretched blobs of some 20 cm, which three components explain, as a data set."""

    def __init__(self, root):
        self.template = 0.1 * blob(3, seed=0)[0], blob(3, seed=0)[1]
        stretch = np.random.default_rng(0).uniform(0.85, 1.15, size=(40, 1, 3))
        self.meshes = torch.from_numpy(stretch * self.template[0]).float()

    def split(self):
        return torch.arange(24), torch.arange(24, 32), torch.arange(32, 40)

    def read(self, part):
        return self.meshes[part]


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setitem(fits.DATA, "faces", Blobs)
    return fits.Options(
        latent=3, steps=1, meshes=2, scans=1, root=tmp_path, output=tmp_path / "out"
    )


def untimed(options):
    with open(options.output / "fits.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_pca_finds_what_it_explains_and_a_run_goes_on(options, monkeypatch, capsys):
    cases = ("reconstruction", "5 % of vertices", "10 % of vertices", "one half", "20 landmarks")
    monkeypatch.setattr(fits, "MODELS", {"pca": "PCA"})
    monkeypatch.setattr(fits, "CASES", cases)
    fits.main(options)
    rows = untimed(options)
    assert [row["case"] for row in rows] == list(cases)
    for row in rows:
        assert float(row["mean"]) < 0.01 and row["converged"] == row["fits"] == "2"
    text = (options.output / "fits.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and "| 20 landmarks |" in text

    # Cut off in its fourth case, it goes on with that one.
    path = options.output / "fits.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:9], encoding="utf-8")
    first = path.read_text(encoding="utf-8").splitlines()[:4]
    fits.main(options)
    assert untimed(options) == rows
    assert path.read_text(encoding="utf-8").splitlines()[:4] == first
    assert "several calls" not in text
    fits.main(replace(options, seeds=(1,)))
    text = (options.output / "fits.md").read_text(encoding="utf-8")
    assert "seeds 0 1" in text and "Rows of several calls; headings tell the seeds." in text
    monkeypatch.setattr(fits, "measured", None)
    fits.main(options)  # nothing is left to do


@pytest.mark.slow
def test_all_models(options):
    fits.main(options)
    rows = untimed(options)
    assert {row["model"] for row in rows} == set(fits.MODELS)
    assert len(rows) == len(fits.MODELS) * len(fits.CASES)
    # PCA explains these meshes. A scan has noise of half a millimetre and one side alone.
    (scan,) = (row for row in rows if row["model"] == "pca" and row["case"] == "partial scan")
    assert float(scan["mean"]) < 2 and scan["fits"] == "1"


def test_a_scan_lies_on_the_moved_mesh():
    mesh, faces = Blobs(None).meshes[0], Blobs(None).template[1]
    points, found, rotation, translation = fits.scan(mesh, faces, np.random.default_rng(0))
    moved = (mesh @ rotation.t() + translation).double().numpy()
    distance = 1000 * closest_points(points, moved, faces)[2]  # mm
    assert distance.mean() < 1 and len(points) < 0.7 * len(mesh) and found.max() < len(points)
    angle = torch.arccos(((rotation.trace() - 1) / 2).clamp(-1, 1))
    assert 0 <= angle <= torch.pi / 3


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="positive"):
        fits.Options(scans=0)
