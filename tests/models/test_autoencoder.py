import copy
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MappingPool, freeze
from pyg_attnpool.models import MeshAutoencoder, coma

COMA_SIZES = [5023, 1256, 314, 79, 20]
SMALL_SIZES = [40, 20, 9, 6, 5]


class RingHierarchy:
    r"""Rings of vertices in place of meshes: any sizes at no cost."""

    def __init__(self, num_vertices):
        self.num_vertices = num_vertices
        steps = list(pairwise(num_vertices))
        self.down = [self.mapping(fine, coarse, 1) for fine, coarse in steps]
        self.up = [self.mapping(coarse, fine, 3) for fine, coarse in steps]

    @staticmethod
    def mapping(num_source, num_target, k):
        weight = torch.rand(num_target, k).softmax(dim=1)
        return Mapping(torch.randint(num_source, (num_target, k)), weight, num_source)

    def edge_index(self, level):
        nodes = torch.arange(self.num_vertices[level])
        edge_index = torch.stack([nodes, nodes.roll(1)])
        return torch.cat([edge_index, edge_index.flip(0)], dim=1)

    def positions(self, level):
        angle = torch.linspace(0, 6, self.num_vertices[level])
        return torch.stack([angle.sin(), angle.cos(), angle], dim=1)


@pytest.fixture
def hierarchy():
    return RingHierarchy(SMALL_SIZES)


@pytest.fixture(scope="module")
def coma_hierarchy():
    return RingHierarchy(COMA_SIZES)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("wider,expected", [(False, 30_056), (True, 179_656)])
def test_parameter_counts_at_the_sizes_of_coma(wider, expected, coma_hierarchy):
    assert count(coma(coma_hierarchy, "qem", wider=wider)) == expected
    model = coma(coma_hierarchy, "attention", wider=wider, variant="published")
    assert count(model) == expected + 350_330
    # By default a temperature for each of the eight layers beside.
    assert count(coma(coma_hierarchy, "attention", wider=wider)) == expected + 350_338
    assert count(freeze(model)) == expected


def test_one_training_step_at_the_sizes_of_coma(coma_hierarchy):
    r"""The coarsest unpooling has more slots than source vertices there: 20 kept and 3."""
    model = coma(coma_hierarchy, "attention")
    assert model.unpools[0].k == 20
    x = torch.randn(2, 5023, 3)
    (model(x) - x).abs().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_layers_stand_between_the_levels_they_connect(hierarchy):
    model = MeshAutoencoder(hierarchy, down="attention", up_kwargs={"k": 7, "channels": 5})
    pairs = list(pairwise(SMALL_SIZES))
    assert [(p.num_source, p.num_target) for p in model.pools] == pairs
    assert [(p.num_target, p.num_source) for p in model.unpools] == pairs[::-1]
    assert all(type(p) is AttentionPool and (p.k, p.channels) == (2, 21) for p in model.pools)
    assert all(type(p) is AttentionUnpool and p.channels == 5 for p in model.unpools)
    assert [p.k for p in model.unpools] == [5, 6, 7, 7]  # at most all vertices of the level
    assert [c.num_nodes for c in model.down_convs] == SMALL_SIZES[:-1]
    assert [c.num_nodes for c in model.up_convs] == SMALL_SIZES[-2::-1]


def test_priors_are_those_of_the_hierarchy(hierarchy):
    model = MeshAutoencoder(hierarchy, down="attention", up="qem", down_kwargs={"fusion_weight": 0})
    for pool, mapping in zip(model.pools, hierarchy.down, strict=True):
        assert torch.equal(pool.mapping().to_dense(), mapping.to_dense())
    for pool, mapping in zip(reversed(model.unpools), hierarchy.up, strict=True):
        assert type(pool) is MappingPool
        assert torch.equal(pool.mapping().to_dense(), mapping.to_dense())


def test_published_keys_and_queries_start_at_the_positions_of_their_levels(hierarchy):
    model = MeshAutoencoder(hierarchy, down="attention", variant="published")
    for level in range(4):
        pool, unpool = model.pools[level], model.unpools[3 - level]
        for fine, coarse in ((pool.key, pool.query), (unpool.query, unpool.key)):
            for vectors, place in ((fine, level), (coarse, level + 1)):
                noise = vectors[:, :3] - 0.1 * hierarchy.positions(place)
                assert -1e-6 < noise.min() and noise.max() < 0.1 + 1e-6


def test_attention_without_weight_computes_what_qem_computes(hierarchy):
    zero = {"fusion_weight": 0}
    qem = coma(hierarchy)
    model = coma(hierarchy, "attention", down_kwargs=zero, up_kwargs=zero)
    model.load_state_dict(dict(qem.named_parameters()), strict=False)
    x = torch.randn(2, 40, 3)
    assert_close(model(x), qem(x))


def test_frozen_model_computes_the_same_and_loads_its_own_state(hierarchy):
    x = torch.randn(2, 40, 3)
    model = coma(hierarchy, "attention")
    expected = model(x)
    frozen = freeze(copy.deepcopy(model))
    assert_close(frozen(x), expected)
    other = freeze(coma(RingHierarchy(SMALL_SIZES), "attention"))
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x), frozen(x))


def test_latent_activation(hierarchy):
    x = torch.randn(64, 40, 3)
    published = coma(hierarchy, variant="published")
    linear = coma(hierarchy)
    linear.load_state_dict(published.state_dict())
    assert linear.encode(x).min() < 0
    assert torch.equal(published.encode(x), linear.encode(x).relu())
    z = torch.randn(3, 8)
    assert torch.equal(published.decode(z), linear.decode(z))
    assert torch.equal(published(x), published.decode(published.encode(x)))


def test_samples_do_not_mix(hierarchy):
    model = coma(hierarchy, "attention")
    x = torch.randn(3, 40, 3)
    for i in range(3):
        assert_close(model(x[i : i + 1]), model(x)[i : i + 1])


def test_initial_values_are_the_published_ones(coma_hierarchy):
    model = coma(coma_hierarchy, wider=True)
    for conv in [*model.down_convs, *model.up_convs, model.out_conv]:
        weight = torch.cat([lin.weight.flatten() for lin in conv.lins])
        assert weight.std().item() == pytest.approx(0.1, rel=0.15)
    assert all(conv.bias.abs().max() > 0 for conv in model.down_convs)
    assert model.out_conv.bias is None
    for lin in (model.to_latent, model.from_latent):
        assert lin.weight.mean().item() == pytest.approx(0, abs=5e-3)
        assert lin.weight.std().item() == pytest.approx(0.1, rel=0.02)
        assert torch.equal(lin.bias, torch.full_like(lin.bias, 0.1))


def test_compiles_without_graph_breaks(hierarchy, compiled, device):
    model = coma(hierarchy, "attention").to(device)
    x = torch.randn(2, 40, 3, device=device)
    parameters = list(model.parameters())
    out, expected = compiled(model)(x), model(x)
    assert_close(out, expected)
    found = torch.autograd.grad((out - x).abs().mean(), parameters)
    wanted = torch.autograd.grad((expected - x).abs().mean(), parameters)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)


BAD = {
    "conv": ({"conv": "graph"}, r"a convolution 'cheb'.*\(got 'graph'\)"),
    "down": ({"down": "max"}, r"a pooling of .*'variant'\] \(got 'max'\)"),
    "up": ({"up": "max"}, r"a pooling of .*'variant'\] \(got 'max'\)"),
    "encoder": ({"channels": (8,)}, r"4 'channels'.*5 levels \(got 1 and 2\)"),
    "decoder": ({"decoder_channels": (8, 3)}, r"5 'decoder_channels'.*5 levels \(got 4 and 2\)"),
    "variant": ({"variant": "paper"}, r"'default' or 'published' \(got 'paper'\)"),
    "latent": ({"latent_channels": 0}, r"positive 'latent_channels' \(got 0\)"),
    "activation": ({"latent_activation": "tanh"}, r"or None \(got 'tanh'\)"),
    "pooling arguments": ({"down_kwargs": {"k": 2}}, r"no pooling arguments.*\(got \['k'\]\)"),
    "K": ({"conv_kwargs": {"K": 0}}, r"at least 1 \(got 0\)"),
}


@pytest.mark.parametrize("kwargs,match", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(kwargs, match, hierarchy):
    with pytest.raises(ValueError, match=match):
        MeshAutoencoder(hierarchy, **kwargs)


def test_bad_inputs_are_named(hierarchy):
    model = coma(hierarchy)
    assert repr(model) == "MeshAutoencoder(num_vertices=[40, 20, 9, 6, 5], latent_channels=8)"
    for size in [(40, 3), (2, 41, 3), (40,)]:
        with pytest.raises(ValueError, match=r"shape \[B, 40, 3\]") as error:
            model(torch.zeros(size))
        assert f"(got {list(size)})" in str(error.value)
    with pytest.raises(ValueError, match=r"3 input channels \(got \[40, 2, 2\]\)|\[2, 40, 2\]"):
        model(torch.zeros(2, 40, 2))
    for size in [(8,), (2, 7)]:
        with pytest.raises(ValueError, match=r"latent codes of shape \[B, 8\]") as error:
            model.decode(torch.zeros(size))
        assert f"(got {list(size)})" in str(error.value)
