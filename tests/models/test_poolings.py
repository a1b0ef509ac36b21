import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool, MeshHierarchy, freeze_attention
from pyg_attnpool.models import MeshAutoencoder
from pyg_attnpool.nn import DiffPool, FullPool, MappingPool, WeightedPool
from pyg_attnpool.nn.learned_pools import average_mapping, ring_mapping
from pyg_attnpool.nn.resolver import POOLINGS
from tests.mesh.meshes import blob

SMALL = dict(channels=(4, 5), decoder_channels=(6, 4, 3), latent_channels=3)
CLASSES = {
    "qem": (MappingPool, MappingPool),
    "attention": (AttentionPool, AttentionUnpool),
    "full": (FullPool, FullPool),
    "diffpool": (DiffPool, DiffPool),
    "average": (MappingPool, MappingPool),
    "variant": (WeightedPool, WeightedPool),
}


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


@pytest.mark.parametrize("down", POOLINGS)
@pytest.mark.parametrize("up", POOLINGS)
def test_any_mixture_trains(hierarchy, down, up):
    # No ReLU, which in so small a network may be dead from the start.
    activations = dict(activation="elu", latent_activation=None, expand_activation=None)
    model = MeshAutoencoder(hierarchy, down=down, up=up, **activations, **SMALL)
    assert {type(pool) for pool in model.pools} == {CLASSES[down][0]}
    assert {type(pool) for pool in model.unpools} == {CLASSES[up][1]}
    x = torch.randn(2, hierarchy.num_vertices[0], 3)
    (model(x) - x).abs().mean().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("log_beta"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_poolings_are_those_of_the_hierarchy(hierarchy):
    n = hierarchy.num_vertices
    for method, down, up in (
        ("qem", hierarchy.down, hierarchy.up),
        (
            "average",
            [average_mapping(hierarchy, level, up=False) for level in (0, 1)],
            [average_mapping(hierarchy, level, up=True) for level in (0, 1)],
        ),
        (
            "variant",
            [ring_mapping(hierarchy, level, up=False) for level in (0, 1)],
            [ring_mapping(hierarchy, level, up=True) for level in (0, 1)],
        ),
    ):
        model = MeshAutoencoder(hierarchy, down=method, **SMALL)
        for level in (0, 1):
            x = torch.randn(2, n[level], 3)
            assert_close(model.pools[level](x), down[level].to_dense().float() @ x)
            x = torch.randn(2, n[level + 1], 3)
            assert_close(model.unpools[1 - level](x), up[level].to_dense().float() @ x)


def test_attention_without_a_prior(hierarchy):
    alone = dict(prior=None, channels=5)
    model = MeshAutoencoder(
        hierarchy, down="attention", down_kwargs=alone, up_kwargs=alone, **SMALL
    )
    for layer in [*model.pools, *model.unpools]:
        assert layer.fusion_weight is None
        assert_close(layer.mapping().to_dense(), layer.attention().to_dense())
    freeze_attention(model)(torch.randn(1, hierarchy.num_vertices[0], 3))


def test_attention_over_all_sources(hierarchy):
    every = dict(k=None, channels=5, fusion_weight=0.5, normalization="sum")
    model = MeshAutoencoder(
        hierarchy, down="attention", down_kwargs=every, up_kwargs=every, **SMALL
    )
    for layer in [*model.pools, *model.unpools]:
        x = torch.randn(2, layer.num_source, 3)
        assert layer.attention().to_dense().count_nonzero() == layer.num_source * layer.num_target
        assert_close(layer(x), layer.mapping().to_dense() @ x, atol=1e-5, rtol=1e-5)


def test_arguments_of_a_pooling_that_takes_none(hierarchy):
    for method in ("qem", "full", "average", "variant"):
        with pytest.raises(ValueError, match=rf"no pooling arguments with '{method}'"):
            MeshAutoencoder(hierarchy, down=method, down_kwargs={"k": 2}, **SMALL)
    model = MeshAutoencoder(hierarchy, down="diffpool", down_kwargs={"K": 3}, **SMALL)
    assert len(model.pools[0].conv.lins) == 3
