import pytest

from benchmarks.paper.experiment import STARTS, layers, shortest, spectral
from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import coma
from tests.mesh.meshes import icosphere


def test_equal_models_have_equal_settings():
    for variant, start in STARTS.items():
        spelt_out = spectral("attention", K=6, wider=False, **layers(**start, channels=21))
        spelt_out["up_kwargs"] = {**spelt_out["up_kwargs"], "k": 32}
        assert shortest(spelt_out, variant) == spectral("attention")
    mixed = spectral("qem", up="attention", up_kwargs={**STARTS["default"], "init": "normal"})
    assert shortest(mixed, "default")["up_kwargs"] == {"init": "normal"}
    # What one variant has anyway sets a model of the other apart, and so does a None.
    other = spectral("attention", **layers(**STARTS["default"]))
    assert shortest(other, "published") == other
    alone = spectral("attention", latent_activation=None, **layers(prior=None, k=None))
    assert shortest(alone, "published") == alone


@pytest.mark.parametrize("variant", STARTS)
def test_starts_are_those_of_the_layers(variant):
    hierarchy = MeshHierarchy.from_template(icosphere(2), factors=[2.5] * 4)
    model = coma(hierarchy, "attention", variant=variant)
    for layer in (model.pools[0], model.unpools[-1]):
        found = {"init": layer.init, "normalization": layer.normalization}
        found["fusion_weight"] = pytest.approx(layer.fusion_weight.item())
        assert found == STARTS[variant]
        assert layer.channels == 21
    assert (model.pools[0].k, model.unpools[-1].k) == (2, 32)
