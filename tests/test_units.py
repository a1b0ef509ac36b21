import warnings

import numpy as np
import pytest
import torch

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.metrics import error_quantiles, generation
from pyg_attnpool.units import metres, one_warning, warn_millimetres
from tests.mesh.meshes import blob

TEMPLATE = blob(1, seed=0)


def meshes(num, seed=0):
    r"""The template, of some 20 cm, stretched along its axes."""
    stretch = np.random.default_rng(seed).uniform(0.09, 0.11, size=(num, 1, 3))
    return torch.from_numpy(stretch * TEMPLATE[0]).float()


def network(template=TEMPLATE):
    hierarchy = MeshHierarchy.from_template(template, factors=[3])
    return MorphableModel.coma(hierarchy, 2, "qem", channels=(4,))


def fitted(device="cpu"):
    return MorphableModel.pca(TEMPLATE, 3).fit(meshes(20)).to(device)


def test_units_are_metres():
    assert [metres(unit) for unit in ("m", "cm", "mm")] == [1, 0.01, 0.001]
    with pytest.raises(ValueError, match=r"'unit' to be one of .*\(got 'inch'\)"):
        metres("inch")


def test_millimetres_are_noticed():
    x = meshes(2)
    assert not warn_millimetres("meshes", x)
    with pytest.warns(UserWarning, match="Expected scans in metres .*millimetres"):
        assert warn_millimetres("scans", 1000 * x)
    assert not warn_millimetres("meshes", x + 1e6)  # far away, but small
    assert not warn_millimetres("meshes", x[:0])
    with pytest.warns(UserWarning, match="Expected scans") as found, one_warning():
        assert warn_millimetres("scans", 1000 * x) and warn_millimetres("meshes", 1000 * x)
        with one_warning():
            assert warn_millimetres("meshes", 1000 * x)
    assert len(found) == 1
    with pytest.warns(UserWarning, match="Expected meshes"):  # the next call warns again
        warn_millimetres("meshes", 1000 * x)


MANY = 1000 * meshes(300)
CALLS = {
    "encode": lambda model, _: model.encode(MANY),
    "forward": lambda model, _: model(MANY),
    "evaluate": lambda model, _: model.evaluate(MANY),
    "evaluate a data set": lambda model, _: model.evaluate(MeshDataset(MANY, TEMPLATE)),
    "quantiles": lambda model, _: error_quantiles(model, MANY, [0.1, 0.9]),
    "generation": lambda model, _: generation(model, MANY, MANY, n=70),
    "latent statistics": lambda model, _: model.set_latent_statistics(MANY),
    "interpolate": lambda model, _: model.interpolate(MANY, MANY, 2),
    "transfer": lambda model, _: model.transfer(MANY, MANY, MANY[0]),
    "edit": lambda model, _: model.edit(MANY[0], {0: MANY[0, 0], 5: MANY[0, 5]}),
    "fit_to": lambda model, _: model.fit_to(MANY[:100], max_iterations=1),
    "fit_to a part": lambda model, _: model.fit_to(
        MANY[0].masked_fill(torch.arange(len(MANY[0])).view(-1, 1) < 9, torch.nan),
        weight=torch.arange(len(MANY[0])) >= 9,
        max_iterations=1,
    ),
    "write_mesh": lambda model, folder: model.write_mesh(folder / "mesh.ply", MANY[0]),
    "template": lambda *_: MorphableModel.pca((1000 * TEMPLATE[0], TEMPLATE[1]), 3),
    "hierarchy": lambda *_: network((1000 * TEMPLATE[0], TEMPLATE[1])),
    "fit PCA": lambda *_: MorphableModel.pca(TEMPLATE, 3).fit(MANY),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_call_warns_once(name, tmp_path):
    model = fitted()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        CALLS[name](model, tmp_path)
    (one,) = found
    assert "look like millimetres" in str(one.message) and one.filename == __file__


def test_a_training_warns_once():
    pytest.importorskip("pytorch_lightning")
    kwargs = dict(epochs=1, batch_size=64, accelerator="cpu", compile=False)
    for train, val in ((MANY, MANY), (0.001 * MANY, MANY), (MANY, None)):
        model = network()
        with pytest.warns(UserWarning, match="look like millimetres") as found:
            model.fit(train, val, **kwargs)
        assert len([w for w in found if "millimetres" in str(w.message)]) == 1


def test_a_call_on_another_device_warns_once(device):
    model = fitted(device)
    for x in (MANY, MANY.to(device)):
        with pytest.warns(UserWarning, match="look like millimetres") as found:
            model.evaluate(x)
        assert len(found) == 1


def test_a_fit_of_any_size_needs_no_unit():
    fitted().fit_to(MANY[0], motion="similarity")
