import numpy as np
import pytest
import torch

for name in ("tyro", "pytorch_lightning"):
    pytest.importorskip(name)

from benchmarks import pretrained  # noqa: E402
from pyg_attnpool import MeshHierarchy, MorphableModel  # noqa: E402
from tests.mesh.meshes import blob  # noqa: E402


@pytest.mark.slow
def test_a_model_is_written_with_what_it_was_made_of(tmp_path, monkeypatch):
    vertices, faces = blob(3, seed=0)
    hierarchy = MeshHierarchy.from_template((0.1 * vertices, faces), factors=[4])
    stretch = np.random.default_rng(0).uniform(0.85, 1.15, size=(40, 1, 3))
    meshes = torch.from_numpy(0.1 * stretch * vertices).float()
    parts = meshes[:24], meshes[24:32], meshes[32:]
    monkeypatch.setattr(pretrained, "load", lambda data, root: (hierarchy, parts, None))
    folders = dict(runs=tmp_path / "runs", output=tmp_path / "models")
    pretrained.main(data=("faces",), latent=(8, 2), steps=2, hidden_channels=16, **folders)
    assert {path.name for path in folders["output"].iterdir()} == {"faces", "faces-2"}
    model = MorphableModel.load(folders["output"] / "faces-2")
    told = model.summary["test error (mm)"]
    found = model.evaluate(parts[2])
    assert told == {name: pytest.approx(found[name], rel=1e-3) for name in told}
    linear = MorphableModel.pca(hierarchy, 2).fit(parts[0]).evaluate(parts[2])
    assert model.summary["test error of PCA (mm)"]["mean"] == pytest.approx(
        linear["mean"], rel=1e-3
    )
    assert "CC0" in (folders["output"] / "faces-2" / "README.md").read_text()
    # A second call finds all done.
    again = MorphableModel.load(folders["output"] / "faces").state_dict()
    pretrained.main(data=("faces",), latent=(8,), steps=2, hidden_channels=16, **folders)
    now = MorphableModel.load(folders["output"] / "faces").state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in again.items())
