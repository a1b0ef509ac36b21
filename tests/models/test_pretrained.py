import json

import pytest
import torch

from pyg_attnpool import MorphableModel
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces, AnnyHands
from pyg_attnpool.models.hub import OWN

NAMES = {
    f"{kind}{suffix}": size
    for kind in ("faces", "bodies", "hands")
    for suffix, size in (("", 8), ("-32", 32))
}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_whole_small_and_says_where_it_comes_from(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no folder has its name
    model = MorphableModel.from_pretrained(name)
    assert model.latent_channels == NAMES[name]
    # Mean and samples are near the template: of its size, in metres.
    size = (model.template.amax(0) - model.template.amin(0)).norm()
    for mesh in (*model.decode(model.latent_mean[None]), *model.sample(3)):
        assert 0.5 * size < (mesh.amax(0) - mesh.amin(0)).norm() < 1.5 * size
    card = (OWN / name / "README.md").read_text()
    assert "\nlicense: cc0-1.0\n" in card and "python -m benchmarks.pretrained" in card
    config = json.loads((OWN / name / "config.json").read_text())
    ours, linear = (config["training"][f"test error{of} (mm)"]["mean"] for of in ("", " of PCA"))
    assert ours < linear


def test_all_together_are_small():
    assert sum(path.stat().st_size for path in OWN.rglob("*") if path.is_file()) < 15 * 2**20
    assert {path.name for path in OWN.iterdir()} == set(NAMES)


def test_another_name_is_refused_with_theirs():
    with pytest.raises(ValueError, match="one of .*'faces', 'faces-32'.*the folder of a model"):
        MorphableModel.from_pretrained("cats")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, make",
    [
        ("faces", lambda root: AnnyFaces(root, frames=1)),
        ("bodies", lambda root: AnnyBodies(root, frames=1)),
        ("hands", lambda root: AnnyHands(root, meshes=30)),
    ],
)
def test_errors_are_about_those_that_the_card_tells(name, make, tmp_path):
    pytest.importorskip("anny")
    model = MorphableModel.from_pretrained(name)
    data = make(tmp_path)
    assert torch.equal(torch.from_numpy(data.template[1]), model.faces)
    error = model.evaluate(data)["mean"]
    assert error < 2 * model.summary["test error (mm)"]["mean"]


def test_a_folder_does_not_hide_a_model_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hands").mkdir()
    assert MorphableModel.from_pretrained("hands").latent_channels == 8
    MorphableModel.from_pretrained("hands-32").save("hands/model")
    assert MorphableModel.from_pretrained("./hands").latent_channels == 32
    assert MorphableModel.from_pretrained("hands").latent_channels == 8
