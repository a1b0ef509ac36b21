import copy
import pickle
import warnings

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MappingPool
from pyg_attnpool.ops import reference

N, M = 23, 11  # source and target vertices


def random_prior(num_source=N, num_target=M, k=3, dtype=torch.float64):
    index = torch.randint(num_source, (num_target, k))
    return Mapping(index, torch.rand(num_target, k, dtype=dtype), num_source)


def make(device="cpu", dtype=torch.float64, layer=AttentionPool, prior=True, **kwargs):
    r"""A layer in mid-training: nothing stands at its initial value."""
    kwargs = {"channels": 6, "k": 4, "init": "normal", **kwargs}
    out = layer(N, M, prior=random_prior() if prior else None, **kwargs)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return out.to(device, dtype)


def dense(layer):
    r"""The mapping of a layer, computed from its parameters by the reference."""
    out = reference.attention(layer.query, layer.key, layer.k, layer.log_beta)
    if layer.prior_index is not None:
        prior = Mapping(layer.prior_index, layer.prior_weight, layer.num_source).to_dense()
        out = reference.fuse(out, prior, layer.fusion_weight)
    return out


def features(*size, device="cpu", dtype=torch.float64):
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_()


VARIANTS = [
    {"normalization": "sum"},
    {"normalization": "softmax"},
    {"normalization": "sum", "prior": False},
    {"normalization": "softmax", "prior": False},
    {"layer": AttentionUnpool},
    {"layer": AttentionUnpool, "k": 1},
    {"normalization": "sum", "k": N},  # with the prior more slots than source vertices
    {"normalization": "softmax", "k": N},
]


@pytest.fixture(params=VARIANTS, ids=str)
def layer(request, device):
    return make(device, **request.param)


# Forward and backward ################################################################


def test_output_and_all_gradients_equal_reference(layer, device):
    x = features(3, N, 5, device=device)
    out, expected = layer(x), reference.apply(dense(layer), x)
    assert_close(out, expected)

    cotangent = torch.randn_like(out)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(out, (x, *parameters), cotangent)
    wanted = torch.autograd.grad(expected, (x, *parameters), cotangent)
    for name, grad, other in zip(("x", *names), found, wanted, strict=True):
        # Over one kept source alone, attention is constant.
        constant = layer.k == 1 and name in ("key", "query", "log_beta")
        assert (grad.abs().max() > 1e-3) != constant, name
        assert_close(grad, other, msg=lambda m, name=name: f"{name}: {m}")


def test_parameters_are_the_documented_ones(device):
    table = [
        ({"normalization": "sum"}, {"key", "query", "fusion_weight"}),
        ({"normalization": "sum", "prior": False}, {"key", "query"}),
        ({}, {"key", "query", "fusion_weight", "log_beta"}),
        ({"prior": False}, {"key", "query", "log_beta"}),
    ]
    for kwargs, names in table:
        layer = make(device, **kwargs)
        assert set(dict(layer.named_parameters())) == names
        buffers = {"prior_index", "prior_weight"} if kwargs.get("prior", True) else set()
        assert set(layer.state_dict()) == names | buffers
    assert layer.key.shape == (N, 6) and layer.query.shape == (M, 6)


def test_published_settings_are_those_of_the_paper():
    pos = {"source_pos": positions(50), "target_pos": positions(40)}
    pool = AttentionPool.published(50, 40, prior=random_prior(50, 40), **pos)
    unpool = AttentionUnpool.published(40, 50)
    assert type(pool) is AttentionPool and type(unpool) is AttentionUnpool
    assert (pool.channels, pool.k, unpool.channels, unpool.k) == (21, 2, 21, 32)
    assert pool.fusion_weight.item() == pytest.approx(0.2) and pool.log_beta is None
    assert pool.init == "positions"
    assert AttentionPool.published(50, 40, fusion_weight=0.5).initial_fusion_weight == 0.5


def test_default_starts_as_an_unsharp_mask_of_the_prior():
    prior = random_prior(50, 40)
    pos = {"source_pos": positions(50), "target_pos": positions(40)}
    for kwargs, init in ((pos, "lifted"), ({}, "prior")):
        pool = AttentionPool(50, 40, prior=prior, **kwargs)
        assert pool.init == init and pool.fusion_weight.item() == -2
        attention = pool.attention().to_dense()
        assert_close(pool.mapping().to_dense(), 3 * prior.to_dense().float() - 2 * attention)
    assert AttentionPool(50, 40).init == "normal"
    pool, unpool = AttentionPool(50, 40), AttentionUnpool(40, 50)
    assert (pool.channels, pool.k, unpool.channels, unpool.k) == (21, 2, 21, 32)
    assert repr(pool) == "AttentionPool(50, 40, channels=21, k=2)"
    assert repr(unpool) == "AttentionUnpool(40, 50, channels=21, k=32)"


def test_the_three_layouts_agree(layer, device):
    x = features(4, N, 5, device=device)
    expected = reference.apply(dense(layer), x)
    assert_close(layer(x), expected)
    assert_close(layer(x.flatten(0, 1)), expected.flatten(0, 1))  # a PyG mini-batch
    for sample, row in zip(x, expected, strict=True):
        assert_close(layer(sample), row)
    assert_close(layer(x.mT.contiguous().mT), expected)


def test_mapping_is_what_forward_applies(layer):
    assert_close(layer.mapping().to_dense(), dense(layer))
    learned = layer.attention().to_dense()
    assert_close(learned, reference.attention(layer.query, layer.key, layer.k, layer.log_beta))
    assert_close(learned.sum(dim=1), torch.ones_like(learned[:, 0]))
    (grad,) = torch.autograd.grad(layer.mapping().to_dense().square().sum(), layer.query)
    (expected,) = torch.autograd.grad(dense(layer).square().sum(), layer.query)
    assert_close(grad, expected)


def test_prior_may_be_any_matrix():
    prior = random_prior()
    for matrix in (prior.to_dense(), prior.to_scipy(), prior.to_torch_csr()):
        layer = AttentionPool(N, M, prior=matrix, fusion_weight=0)
        assert torch.equal(layer.mapping().to_dense(), prior.to_dense().to(torch.float32))


def test_fusion_weight_zero_starts_as_the_prior_alone(device):
    prior = random_prior(dtype=torch.float32).to(device)
    layer = AttentionPool(N, M, prior=prior, fusion_weight=0).to(device)
    assert torch.equal(layer.mapping().to_dense(), prior.to_dense())
    x = torch.randn(2, N, 5, device=device)
    assert torch.equal(layer(x), prior @ x)
    layer(x).square().sum().backward()
    assert layer.fusion_weight.grad.abs() > 1e-3  # and leaves it at the first step


def test_float32_and_float64_agree(layer, device):
    x = features(2, N, 5, device=device)
    out = layer(x)
    single = copy.deepcopy(layer).to(torch.float32)
    assert all(p.dtype == torch.float32 for p in single.parameters())
    assert_close(single(x.float()).double(), out, rtol=1e-5, atol=1e-5)
    assert_close(single.to(torch.float64)(x), out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
def test_bfloat16_autocast_is_close_to_float32(normalization, device):
    layer = make(device, torch.float32, normalization=normalization)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), layer, torch.nn.Linear(8, 3)).to(device)
    x = torch.randn(2, N, 5, device=device)
    cotangent = torch.randn(2, M, 3, device=device)

    def run(autocast):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            out = net(x)
        net.zero_grad()
        out.backward(cotangent.to(out.dtype))
        return out, {name: p.grad.clone() for name, p in net.named_parameters()}

    (out, grads), (expected, wanted) = run(True), run(False)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        error = (grad - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < 0.06, f"{name}: {error}"


def test_backward_saves_no_dense_matrix(saved_numel, device):
    layer = AttentionPool(311, 299, channels=7, k=3, prior=random_prior(311, 299)).to(device)
    sizes = saved_numel(layer, torch.randn(2, 311, 5, device=device, requires_grad=True))
    assert sizes and max(sizes) <= 311 * 10 < 311 * 299


# State ###############################################################################


def test_state_dict_holds_everything(layer, device):
    x = features(2, N, 5, device=device)
    torch.manual_seed(1)
    kwargs = {"channels": 6, "k": layer.k, "normalization": layer.normalization}
    prior = None if layer.prior_index is None else random_prior(k=3)
    other = type(layer)(N, M, prior=prior, init="uniform", **kwargs).to(device, torch.float64)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(copied, layer, device):
    x = features(2, N, 5, device=device)
    expected = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.zero_()
    assert torch.equal(other(x), expected)
    other(x).sum().backward()
    assert other.key.grad is not None and layer.key.grad is None


def test_prior_is_a_copy():
    prior = random_prior()
    layer = AttentionPool(N, M, prior=prior, fusion_weight=0)
    assert layer.prior_weight.dtype == torch.float32  # that of the layer
    expected = prior.to_dense().float()
    prior.weight.zero_()
    assert_close(layer.mapping().to_dense(), expected)


def test_freeze_computes_the_same_without_parameters(layer, device):
    x = features(2, N, 5, device=device)
    frozen = layer.eval().freeze()
    assert type(frozen) is MappingPool and not list(frozen.parameters())
    assert_close(frozen(x), layer(x), rtol=1e-7, atol=1e-7)
    expected = frozen(x)
    with torch.no_grad():
        layer.key.neg_()
    assert torch.equal(frozen(x), expected)


# Initial values ######################################################################


def positions(num_nodes):
    return torch.randn(num_nodes, 3, dtype=torch.float64)


@pytest.mark.parametrize("init", ["positions", "lifted", "normal", "uniform"])
@pytest.mark.parametrize("normalization", ["sum", "softmax"])
def test_reset_parameters_repeats_under_a_seed(init, normalization):
    kwargs = {"source_pos": positions(N), "target_pos": positions(M), "init": init}
    torch.manual_seed(3)
    layer = AttentionPool(N, M, prior=random_prior(), normalization=normalization, **kwargs)
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)

    def reset(seed):
        torch.manual_seed(seed)
        layer.reset_parameters()
        return copy.deepcopy(dict(layer.named_parameters()))

    first, again, other = reset(4), reset(4), reset(5)
    for name in first:
        assert torch.equal(first[name], again[name])
        if name in ("key", "query"):
            assert not torch.equal(first[name], other[name])
            assert not torch.equal(first[name], state[name])
    assert torch.equal(first["fusion_weight"], state["fusion_weight"])


def assert_uniform(x):
    r"""U(0, 0.1), by range, mean and standard deviation."""
    assert 0 <= x.min() and x.max() <= 0.1
    assert x.mean().item() == pytest.approx(0.05, abs=1e-3)
    assert x.std().item() == pytest.approx(0.1 / 12**0.5, abs=1e-3)


def assert_normal(x, std):
    assert x.mean().item() == pytest.approx(0, abs=0.02 * std)
    assert x.std().item() == pytest.approx(std, rel=0.02)
    assert (x.abs() < std).double().mean().item() == pytest.approx(0.683, abs=0.01)


def test_init_positions():
    source, target = positions(2000), positions(1500)
    pos = {"source_pos": source, "target_pos": target}
    layer = AttentionPool(2000, 1500, init="positions", **pos).double()
    for vectors, pos in ((layer.key, source), (layer.query, target)):
        noise = vectors.detach().clone()
        noise[:, :3] -= 0.1 * pos
        assert -1e-7 < noise.min() and noise.max() < 0.1 + 1e-7
        assert_uniform(noise.clamp(0, 0.1))
        assert_uniform(noise[:, :3].clamp(0, 0.1))


def test_init_uniform_and_normal():
    for init in ("positions", "uniform"):
        layer = AttentionPool(2000, 1500, init=init)
        assert_uniform(layer.key), assert_uniform(layer.query)
    for kwargs in ({}, {"init": "normal"}):
        layer = AttentionPool(2000, 1500, **kwargs)
        assert_normal(layer.key.detach(), 0.1), assert_normal(layer.query.detach(), 0.1)


@pytest.mark.parametrize("num_target", [200, 60])
def test_init_prior_looks_at_what_the_prior_takes(num_target):
    r"""On a ring, where every target lies between two neighbouring sources: the first receptive
    fields contain both, and the sources about them rather than those across."""
    num_source = 50
    place = torch.arange(num_target) * num_source / num_target
    left = place.long() % num_source
    index = torch.stack([left, (left + 1) % num_source], dim=1)
    weight = torch.stack([1 - place % 1, place % 1], dim=1)
    layer = AttentionUnpool(num_source, num_target, k=8, prior=Mapping(index, weight, num_source))
    found = layer.attention().index
    used = weight > 0
    taken = (index.unsqueeze(2) == found.unsqueeze(1)).any(dim=2)
    assert taken[used].all()
    distance = (found - place.unsqueeze(1)).abs()
    distance = torch.minimum(distance, num_source - distance)
    assert distance.median() < 4  # of random ones 12.5


def test_init_lifted_is_the_inverse_stereographic_projection():
    source, target = positions(2000), positions(1500)
    layer = AttentionPool(2000, 1500, source_pos=source, target_pos=target, init="lifted")
    for vectors, pos in ((layer.key, source), (layer.query, target)):
        noise = vectors.detach().double()
        square = (pos**2).sum(dim=1)
        lifted = torch.stack([*(2 * pos).unbind(1), square - 1], dim=1) / (square + 1)[:, None]
        assert_close(lifted.norm(dim=1), torch.ones(pos.size(0), dtype=torch.float64))
        noise[:, :4] -= lifted
        assert_normal(noise, 0.02), assert_normal(noise[:, :4], 0.02)


def test_init_lifted_looks_at_the_nearest_vertices():
    source = torch.nn.functional.normalize(positions(200), dim=1) * 3**0.5
    target = source[:50]
    layer = AttentionPool(200, 50, k=4, source_pos=source, target_pos=target, init="lifted")
    rank = torch.cdist(target, source).argsort(dim=1).argsort(dim=1)
    rank = rank.gather(1, layer.attention().index)
    assert (rank < 4).double().mean() > 0.8
    assert (rank < 8).double().mean() > 0.97


@pytest.mark.parametrize("k", [1, 2, 5, N])
def test_softmax_starts_at_three_over_the_mean_gap(k):
    layer = AttentionPool(N, M, k=k, init="normal", normalization="softmax")
    score, _ = reference.cosine_topk(layer.query, layer.key, k)
    gap = (score[:, 0] - score[:, -1]).mean()
    expected = 1.0 if k == 1 else 3 / gap.item()  # one kept source has no gap
    assert layer.log_beta.exp().item() == pytest.approx(expected, rel=1e-5)


# torch.compile #######################################################################


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
@pytest.mark.parametrize("size", [(N, 5), (2, N, 5), (2 * N, 5)], ids=str)
def test_compiles_without_graph_breaks(size, normalization, compiled, device):
    layer = make(device, normalization=normalization)
    check_compiled(compiled(layer), layer, size)


@pytest.mark.slow
def test_compiles_with_inductor(compiled, device):
    layer = make(device, normalization="softmax")
    check_compiled(compiled(layer, "inductor"), layer, (2, N, 5))


def check_compiled(function, layer, size):
    x = features(*size, device=layer.key.device)
    out = function(x)
    expected = reference.apply(dense(layer), x.view(-1, N, 5)).reshape(out.shape)
    assert_close(out, expected)
    inputs = (x, *layer.parameters())
    found = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)


# Errors ##############################################################################

POS = {"source_pos": torch.zeros(N, 3), "target_pos": torch.zeros(M, 3)}
BAD = {
    "k too large": ({"k": N + 1}, rf"at most the number of source vertices {N} \(got {N + 1}\)"),
    "k zero": ({"k": 0}, rf"positive \(got {N}, {M}, 21 and 0\)"),
    "no channels": ({"channels": 0}, rf"positive \(got {N}, {M}, 0 and 2\)"),
    "normalization": ({"normalization": "max"}, r"'sum' or 'softmax' \(got 'max'\)"),
    "fusion weight": ({"fusion_weight": float("nan")}, r"finite 'fusion_weight' \(got nan\)"),
    "init": ({"init": "zeros"}, r"one of \[.*\] \(got 'zeros'\)"),
    "lifted, no positions": ({"init": "lifted"}, r"'source_pos' and 'target_pos'.*got None"),
    "one position": ({"source_pos": POS["source_pos"]}, r"'target_pos' \(got None for one\)"),
    "channels for positions": (
        {"channels": 2, "init": "positions", **POS},
        r"at least 3 'channels'.*\(got 2\)",
    ),
    "channels for lifted": ({"channels": 3, **POS}, r"at least 4.*\(got 3\)"),
    "prior, no prior": ({"init": "prior"}, r"Expected a 'prior' for init='prior' \(got None\)"),
    "position size": (
        {**POS, "target_pos": torch.zeros(M, 2)},
        rf"'target_pos' of shape \[{M}, 3\] \(got \[{M}, 2\]\)",
    ),
    "position NaN": ({**POS, "source_pos": torch.full((N, 3), float("nan"))}, "'source_pos'.*NaN"),
    "prior": ({"prior": torch.ones(M, 9)}, rf"from {N} to {M} vertices \(got 9 to {M}\)"),
}


@pytest.mark.parametrize("kwargs,match", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("cls", [AttentionPool, AttentionUnpool])
def test_bad_arguments_are_named(cls, kwargs, match):
    with pytest.raises(ValueError, match=match):
        cls(N, M, **{"k": 2, **kwargs})


@pytest.mark.parametrize("size", [(M, 5), (2, M, 5), (N + 1, 5), (N,)], ids=str)
def test_features_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"\[{N}, F\]") as error:
        make()(torch.zeros(size, dtype=torch.float64))
    assert f"(got {list(size)})" in str(error.value)


def test_remembering_the_search_changes_nothing():
    r"""The switch: a layer that searches in full takes the same steps, to the bit."""
    layers = [make(k=3, normalization="softmax") for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].search = None
    x = torch.randn(3, layers[0].num_source, 4, dtype=torch.float64)
    for _ in range(5):
        for layer in layers:
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    assert layers[0].search.share < 1
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("with_prior", [False, True])
def test_complex_parameters_are_refused(with_prior):
    prior = Mapping(torch.tensor([[0], [2]]), torch.ones(2, 1), 4) if with_prior else None
    layer = AttentionPool(4, 2, k=2, prior=prior)
    x = torch.randn(4, 3)
    before = layer(x)
    with pytest.raises(TypeError, match=r"Expected real numbers \(got torch.complex64\)"):
        layer.to(torch.complex64).mapping()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imaginary parts, which are zero
        assert torch.equal(layer.to(torch.float32)(x), before)
