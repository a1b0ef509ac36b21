r"""Attention without a top-k: every source vertex is kept (:obj:`k=None`)."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MappingPool
from pyg_attnpool.ops import attention as ops
from pyg_attnpool.ops import reference

N, M = 23, 11  # source and target vertices


def random_prior(num_source=N, num_target=M):
    # With unused slots, as a barycentric mapping has.
    weight = torch.rand(num_target, 3, dtype=torch.float64)
    weight[::2, 1:] = 0
    return Mapping(torch.randint(num_source, (num_target, 3)), weight, num_source)


def make(device="cpu", dtype=torch.float64, layer=AttentionPool, prior=True, **kwargs):
    kwargs = {"channels": 6, "k": None, "init": "normal", **kwargs}
    out = layer(N, M, prior=random_prior() if prior else None, **kwargs)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return out.to(device, dtype)


def dense(layer):
    r"""The mapping of a layer, computed from its parameters by the reference."""
    out = reference.attention(layer.query, layer.key, N, layer.log_beta)
    if layer.prior_index is None:
        return out
    prior = torch.zeros_like(out)
    for row, (index, weight) in enumerate(zip(layer.prior_index, layer.prior_weight, strict=True)):
        for i, w in zip(index, weight, strict=True):
            prior[row, i] += w
    return reference.fuse(out, prior, layer.fusion_weight)


VARIANTS = [
    {"normalization": "sum"},
    {"normalization": "softmax"},
    {"normalization": "sum", "prior": False},
    {"normalization": "softmax", "prior": False, "layer": AttentionUnpool},
]


@pytest.fixture(params=VARIANTS, ids=str)
def layer(request, device):
    return make(device, **request.param)


def features(*size, device):
    return torch.randn(*size, dtype=torch.float64, device=device).requires_grad_()


def check(function, layer, size):
    r"""Output and all gradients of a function are those of the reference."""
    x = features(*size, device=layer.key.device)
    out = function(x)
    expected = reference.apply(dense(layer), x.view(-1, N, size[-1])).reshape(out.shape)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(out, (x, *parameters), cotangent)
    wanted = torch.autograd.grad(expected, (x, *parameters), cotangent)
    for name, grad, other in zip(("x", *names), found, wanted, strict=True):
        assert grad.abs().max() > 1e-3, name
        assert_close(grad, other, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", [(N, 5), (3, N, 5), (1, N, 1), (3 * N, 5)], ids=str)
def test_output_and_all_gradients_equal_reference(layer, size):
    check(layer, layer, size)


def test_equals_the_layer_that_keeps_all_in_slots(layer, device):
    slots = type(layer)(
        N,
        M,
        channels=6,
        k=N,
        prior=None if layer.prior_index is None else random_prior(),
        normalization=layer.normalization,
    ).to(device, torch.float64)
    slots.load_state_dict(layer.state_dict())  # the same parameters and buffers
    x = features(2, N, 5, device=device)
    assert_close(layer(x), slots(x))
    assert_close(layer.mapping().to_dense(), slots.mapping().to_dense())


def test_mapping_has_a_slot_for_every_source_vertex(layer):
    mapping, learned = layer.mapping(), layer.attention()
    assert learned.k == N and mapping.k == N + (0 if layer.prior_index is None else 3)
    assert_close(mapping.to_dense(), dense(layer))
    expected = reference.attention(layer.query, layer.key, N, layer.log_beta)
    assert_close(learned.to_dense(), expected)
    (grad,) = torch.autograd.grad(mapping.to_dense().square().sum(), layer.query)
    (wanted,) = torch.autograd.grad(dense(layer).square().sum(), layer.query)
    assert_close(grad, wanted)


def test_freeze_computes_the_same_without_parameters(layer, device):
    x = features(2, N, 5, device=device)
    frozen = layer.freeze()
    assert type(frozen) is MappingPool and not list(frozen.parameters())
    assert_close(frozen(x), layer(x))
    expected = frozen(x)
    with torch.no_grad():
        layer.key.neg_()
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_state_and_copies(copied, layer, device):
    x = features(2, N, 5, device=device)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    other.reset_parameters()
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    names = {"key", "query"}
    names |= {"log_beta"} if layer.normalization == "softmax" else set()
    if layer.prior_index is not None:
        names |= {"fusion_weight", "prior_index", "prior_weight"}
    assert set(layer.state_dict()) == names


def test_repr():
    assert repr(AttentionPool(9, 4, k=None)) == "AttentionPool(9, 4, channels=21, k=None)"


@pytest.mark.parametrize("cls,k", [(AttentionPool, 2), (AttentionUnpool, 32)])
@pytest.mark.parametrize("num_source", [7, 50])
def test_softmax_starts_as_with_the_default_k(cls, k, num_source):
    layer = cls(num_source, M, k=None, init="normal", normalization="softmax")
    score, _ = reference.cosine_topk(layer.query, layer.key, min(k, num_source))
    expected = 3 / (score[:, 0] - score[:, -1]).mean().item()
    assert layer.log_beta.exp().item() == pytest.approx(expected, rel=1e-5)


def test_one_source_vertex_takes_all():
    layer = AttentionPool(1, M, k=None, normalization="softmax")
    assert layer.log_beta.item() == 0
    assert torch.equal(layer(torch.ones(1, 2)), torch.ones(M, 2))


def test_literal_weights():
    # Cosines 1, 0.8 and -1; the last is clamped, so it gets nothing.
    query, key = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.8, 0.6], [-5.0, 0.0]])
    weight = ops.dense_attention(query, key)
    assert_close(weight, torch.tensor([[1 / 1.8, 0.8 / 1.8, 0.0]]))
    weight = ops.dense_attention(query, key, torch.tensor(5.0).log())
    exp = torch.tensor([[5.0, 4.0, -5.0]]).exp()
    assert_close(weight, exp / exp.sum())


def test_autocast_leaves_type_and_weights_exact(layer, device):
    layer, x = layer.float(), torch.randn(2, N, 5, device=device)
    expected = reference.apply(dense(layer), x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(N, 5), (2, N, 5), (2 * N, 5)], ids=str)
def test_compiles_without_graph_breaks(size, layer, compiled):
    check(compiled(layer), layer, size)


@pytest.mark.parametrize("size", [(M, 5), (2, M, 5), (N,)], ids=str)
def test_features_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"\[{N}, F\].*\(got \["):
        make()(torch.zeros(size, dtype=torch.float64))
