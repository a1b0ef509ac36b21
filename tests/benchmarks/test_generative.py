import pytest
import torch

for name in ("tyro", "pytorch_lightning"):
    pytest.importorskip(name)

from benchmarks import generative  # noqa: E402
from benchmarks.peers.rows import read_rows  # noqa: E402
from pyg_attnpool import MeshHierarchy, MorphableModel  # noqa: E402
from tests.mesh.meshes import blob  # noqa: E402

# So small a template has levels of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The factors lead to levels")


@pytest.fixture
def options(monkeypatch, tmp_path):
    r"""Of stretched blobs, which three components explain."""

    def load(data, root):
        vertices, faces = blob(3, seed=0)
        stretch = 0.85 + 0.3 * torch.rand(40, 1, 3, generator=torch.Generator().manual_seed(0))
        meshes = (0.1 * stretch * torch.from_numpy(vertices)).float()
        hierarchy = MeshHierarchy.from_template((0.1 * vertices, faces))
        return hierarchy, meshes.split([24, 8, 8]), None

    monkeypatch.setattr(generative, "load", load)
    return generative.Options(("blobs",), latent=3, steps=1, samples=8, output=tmp_path)


def test_rows_are_written_once(options, monkeypatch, capsys):
    monkeypatch.setattr(generative, "MODELS", {"PCA": MorphableModel.pca})
    generative.main(options)
    rows = read_rows(options.output / "generative.csv", generative.COLUMNS)
    real, pca = rows
    assert (real["model"], pca["model"]) == (generative.REAL, "PCA")
    # PCA explains these meshes; nobody has samples that are closer to them than they are.
    assert float(pca["generalisation"]) < 0.01 and real["generalisation"] == ""
    assert 0.3 < float(pca["diversity"]) / float(real["diversity"]) < 3
    assert pca["collapsed latent channels"] == ""
    text = (options.output / "generative.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and "| real meshes | - |" in text

    # Cut off in its second line, a call goes on with that one.
    path = options.output / "generative.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:9], encoding="utf-8")
    generative.main(options)
    assert read_rows(path, generative.COLUMNS) == rows
    monkeypatch.setattr(generative, "load", None)
    generative.main(options)  # nothing is left to do


@pytest.mark.slow
def test_all_models(options):
    generative.main(options)
    rows = read_rows(options.output / "generative.csv", generative.COLUMNS)
    assert [row["model"] for row in rows] == [generative.REAL, *generative.MODELS]
    collapsed = {row["model"]: row["collapsed latent channels"] for row in rows}
    assert collapsed.pop("CoMA, learned, variational") in {"0.0", "1.0", "2.0", "3.0"}
    assert set(collapsed.values()) == {""}
