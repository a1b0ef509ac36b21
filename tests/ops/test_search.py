r"""The full search against the reference, and the search that uses again what its last call found
against both."""

import copy
import io
import math
import pickle
import sys
import threading

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, AttentionUnpool
from pyg_attnpool.ops import _cpu, backend, reference
from pyg_attnpool.ops import attention as ops
from pyg_attnpool.ops import search as search_ops
from pyg_attnpool.ops.search import Search, cosine_topk
from tests.ops.forks import needs_fork, status_of_child

needs_library = pytest.mark.skipif(
    not _cpu.AVAILABLE, reason="only the compiled operations remember a search"
)
# What two ways of computing one cosine may differ by.
SLACK = {torch.float32: 1e-5, torch.float64: 1e-13}


def assert_exact(found, query, key, k):
    r"""What a search found is what a full one finds, to the bit, and what PyTorch finds, wherever
    rounding leaves no choice. Scores are formed in the type of the search."""
    index, score = found
    assert index.shape == score.shape == (query.size(0), k)
    other_index, other_score = torch.ops.pyg_attnpool.topk(query, key, k)
    assert torch.equal(index, other_index)
    assert torch.equal(score, other_score)

    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()  # no key twice
    assert (score.diff(dim=1) <= 0).all()
    assert (index.diff(dim=1)[score.diff(dim=1) == 0] > 0).all()  # ties go to the lower index
    rows = [normalize(t.to(score.dtype), dim=-1).double() for t in (query, key)]
    wanted = (rows[0] @ rows[1].t()).sort(dim=1, descending=True, stable=True)
    slack = SLACK[score.dtype]
    assert_close(score.double(), wanted.values[:, :k], rtol=0, atol=slack)
    gap = -wanted.values.diff(dim=1, append=wanted.values.new_full((query.size(0), 1), -9))
    clear = (gap[:, :k] > slack).all(dim=1)
    assert torch.equal(index[clear], wanted.indices[clear, :k])


def learned(layer):
    r"""The search of a layer, by what its public methods give."""
    with torch.no_grad():
        mapping = layer.attention()
    k = layer.k
    index, weight, _ = ops.attention(layer.query, layer.key, k, layer.log_beta)
    assert torch.equal(mapping.index, index) and torch.equal(mapping.weight, weight)
    return mapping.index


def assert_layer_exact(layer):
    r"""A layer finds what a full search finds; in single and double precision also what the
    reference finds in double precision, where gaps exceed rounding."""
    index = learned(layer)
    query, key = layer.query.detach(), layer.key.detach()
    assert torch.equal(index, cosine_topk(query, key, layer.k))
    score, wanted = reference.cosine_topk(query.double(), key.double(), layer.num_source)
    gap = -score.diff(dim=1, append=score.new_full((score.size(0), 1), -9))[:, : layer.k]
    clear = (gap > 1e-5).all(dim=1)
    assert torch.equal(index[clear], wanted[clear, : layer.k])
    return clear.double().mean().item()


def searched(search, *args):
    r"""Calls a search; the result and the share of rows that this call searched in full."""
    before = search.searched.clone()
    found = search(*args)
    rows, asked = (search.searched - before).tolist()
    assert asked == args[0].size(0)
    return found, rows / asked


# One full search ############################################################################


# number of queries, keys, channels, k
FULL_SIZES = [(1, 1, 1, 1), (7, 5, 3, 1), (13, 29, 5, 4), (31, 17, 21, 17), (50, 101, 8, 33)]


def leaf(*size, device, dtype=torch.float64):
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("sizes", FULL_SIZES, ids=str)
def test_topk_equals_reference(sizes, device):
    num_query, num_key, channels, k = sizes
    query = leaf(num_query, channels, device=device)
    key = leaf(num_key, channels, device=device)
    assert torch.equal(cosine_topk(query, key, k), reference.cosine_topk(query, key, k)[1])


@pytest.mark.parametrize("tile", [1, 29, 30, 58, 100, 29 * 13 - 1, 29 * 13])
def test_topk_of_pytorch_does_not_depend_on_the_tiles(tile, device, monkeypatch):
    query, key = leaf(13, 5, device=device), leaf(29, 5, device=device)
    expected = reference.cosine_topk(query, key, 4)[1]
    monkeypatch.setattr(_cpu, "AVAILABLE", False)
    monkeypatch.setattr(backend, "TRITON", False)
    monkeypatch.setattr(search_ops, "TILE", tile)
    assert torch.equal(cosine_topk(query, key, 4), expected)


@pytest.mark.parametrize("dtype,slack", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_topk_in_low_precision_is_within_rounding_of_the_best(dtype, slack, device):
    query = leaf(37, 21, device=device, dtype=dtype)
    key = leaf(83, 21, device=device, dtype=dtype)
    index = cosine_topk(query, key, 9)
    assert all(row.unique().numel() == 9 for row in index)
    score = torch.cosine_similarity(query.double()[:, None], key.double()[index], dim=-1)
    best, _ = reference.cosine_topk(query.double(), key.double(), 9)
    assert_close(score, best, rtol=0, atol=slack)


def test_ties_go_to_the_lower_index(device):
    # Scores of axes are exact: 1, 0 or -1.
    axes = torch.eye(3, device=device)
    key = torch.stack([axes[1], axes[0], -axes[0], axes[0], axes[2], axes[0], -axes[0]])
    table = [
        (axes[0], [1, 3, 5, 0, 4, 2, 6]),
        (-axes[0], [2, 6, 0, 4, 1, 3, 5]),
        (axes[1], [0, 1, 2, 3, 4, 5, 6]),
        (axes[2], [4, 0, 1, 2, 3, 5, 6]),
    ]
    query = torch.stack([row for row, _ in table])
    for k in range(1, 8):
        assert cosine_topk(query, key, k).tolist() == [order[:k] for _, order in table]


def test_many_ties_equal_reference(device):
    query = torch.randint(-1, 2, (40, 2), device=device).double()
    query[:, 1] *= query[:, 0] == 0  # only axes and zeros: exact scores
    key = torch.eye(2, dtype=torch.float64, device=device)[torch.randint(2, (57,), device=device)]
    for k in (1, 2, 30, 56, 57):
        expected = reference.cosine_topk(query, key, k)[1]
        assert torch.equal(cosine_topk(query, key, k), expected)


def test_zero_vectors_score_zero(device):
    query = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device)
    key = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]], device=device)
    assert cosine_topk(query, key, 3).tolist() == [[0, 1, 2], [2, 1, 0]]


def test_full_search_passes_opcheck(device):
    query, key = leaf(7, 3, device=device), leaf(11, 3, device=device)
    op = torch.ops.pyg_attnpool.topk
    torch.library.opcheck(op, (query.detach(), key.detach(), 4))


# Random walks ########################################################################

# number of queries, keys, channels, k
SIZES = [
    (50, 61, 4, 2),
    (33, 101, 21, 2),
    (40, 150, 3, 33),
    (17, 90, 40, 9),
    (9, 70, 1, 3),
    (21, 5, 3, 2),  # fewer keys than a vector has lanes, all of them candidates
    (21, 17, 3, 1),
    (30, 40, 5, 40),  # every key kept
    (1, 300, 2, 1),
]
STEPS = {"tiny": 1e-7, "small": 1e-4, "medium": 1e-2, "large": 1.0}


def walk(kind, *tensors):
    r"""Moves every vector a little; of a mixed step, one vector in twenty far."""
    for tensor in tensors:
        noise = torch.randn_like(tensor)
        if kind == "mixed":
            jumps = torch.rand(tensor.size(0), 1) < 0.05
            noise = noise * torch.where(jumps, 1.0, STEPS["small"]).to(noise)
        else:
            noise = noise * STEPS[kind]
        tensor += noise


@pytest.mark.parametrize("kind", [*STEPS, "mixed"])
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_random_walk(sizes, dtype, kind):
    check_walk(sizes, dtype, kind, 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*STEPS, "mixed"])
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_long_random_walk(sizes, dtype, kind):
    check_walk(sizes, dtype, kind, 400)


def check_walk(sizes, dtype, kind, steps):
    num_query, num_key, channels, k = sizes
    query = torch.randn(num_query, channels, dtype=dtype)
    key = torch.randn(num_key, channels, dtype=dtype)
    search = Search(num_query, num_key, channels, k, dtype)
    for step in range(steps):
        assert_exact(search(query, key, k), query, key, k)
        # Sometimes only one of the two moves.
        walk(kind, *((query, key), (key,), (query,))[step % 3])


@needs_library
@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_steps_that_add_up_are_noticed(dtype):
    # Each step is far below what changes a result; 3000 of them change most.
    query, key = torch.randn(20, 3, dtype=dtype), torch.randn(200, 3, dtype=dtype)
    towards = torch.randn_like(key) * 1e-3
    search = Search(20, 200, 3, 2, dtype)
    first = search(query, key, 2)[0]
    for step in range(3000):
        key += towards
        found = search(query, key, 2)
        if step % 60 == 0:
            assert_exact(found, query, key, 2)
    assert_exact(found, query, key, 2)
    assert (found[0] != first).double().mean() > 0.5
    assert search.share < 0.5


@needs_library
@pytest.mark.parametrize("k", [1, 3])
def test_keys_that_close_in_as_fast_as_they_can(k):
    # Angles on a circle: the answer is known, and nothing can come closer within the bound.
    near, far = torch.arange(1, 21).double() * 0.01, torch.arange(1, 101).double() * 0.01 + 0.5
    search = Search(1, 120, 2, k, torch.float64)
    shares = []
    for step in range(100):
        turn = step * 0.004
        # What is near recedes, what is far comes closer from both sides, and so does the query.
        side = torch.where(torch.arange(100) % 2 == 0, 1.0, -1.0).double()
        angle = torch.cat([near + 0.5 * turn, side * (far - turn)])
        at = -0.1 * turn
        key = torch.stack([angle.cos(), angle.sin()], dim=1)
        query = torch.tensor([[math.cos(at), math.sin(at)]], dtype=torch.float64)
        (index, score), share = searched(search, query, key, k)
        distance = (angle - at).abs().sort(stable=True)
        assert index[0].tolist() == distance.indices[:k].tolist(), step
        assert_close(score[0], distance.values[:k].cos())
        shares.append(share)
    assert index.min() >= 20  # the far ones have come first
    assert 0 < sum(shares) < 60  # and most steps were proved


def make(layer=AttentionPool, num_source=120, num_target=40, dtype=torch.float32, **kwargs):
    kwargs = {"channels": 5, "k": 3, "init": "normal", "normalization": "sum", **kwargs}
    prior = torch.randn(num_target, num_source).softmax(dim=1)
    return layer(num_source, num_target, prior=prior, **kwargs).to(dtype)


OPTIMISERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam, large": lambda p: torch.optim.Adam(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=5e-4),
    "SGD, large": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"layer": AttentionUnpool, "k": 32, "normalization": "softmax"},
        {"dtype": torch.float64, "channels": 21},
        {"dtype": torch.bfloat16},
        {"num_source": 7, "num_target": 30, "k": 7},
    ],
    ids=str,
)
def test_training(optimiser, kwargs):
    layer = make(**kwargs)
    x = torch.randn(2, layer.num_source, 4).to(layer.key.dtype)
    target = torch.randn(2, layer.num_target, 4).to(x.dtype)
    step = OPTIMISERS[optimiser](layer.parameters())
    first = layer.key.detach().clone()
    clear = 0.0
    for _ in range(15):
        step.zero_grad()
        (layer(x) - target).square().mean().backward()
        step.step()
        clear += assert_layer_exact(layer) / 15
    assert not torch.equal(layer.key, first)
    assert layer.key.norm(dim=1).max() < 1e9  # it did not run away
    if kwargs.get("k") is None:
        assert clear > 0.5  # the reference had a say
    if _cpu.AVAILABLE and optimiser in ("Adam", "SGD") and not kwargs:
        assert layer.search.share < 0.5


# Ties, zeros, and what is not a number ###############################################


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("k", [1, 2, 8, 16, 31])
def test_duplicated_keys(dtype, k):
    # Every key stands there many times, so that ties reach over k and over the candidates.
    search = Search(30, 96, 3, k, dtype)
    query, few = torch.randn(30, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    for _ in range(10):
        assert_exact(search(query, few[torch.arange(96) % 4], k), query, few.repeat(24, 1), k)
        walk("mixed", query, few)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("k", [1, 2, 40])
def test_all_keys_equal_find_the_first(dtype, k):
    query, one = torch.randn(20, 5, dtype=dtype), torch.randn(1, 5, dtype=dtype)
    search = Search(20, 77, 5, k, dtype)
    for _ in range(6):
        index, score = search(query, one.expand(77, 5), k)
        if _cpu.AVAILABLE:  # a matrix product may round equal columns differently
            assert index.tolist() == [list(range(k))] * 20
        wanted = torch.cosine_similarity(query, one, dim=1)
        assert_close(score, wanted[:, None].expand(20, k), rtol=0, atol=SLACK[dtype])
        walk("small", query, one)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_keys_one_rounding_apart(dtype):
    # Which of them is first changes with the last digit, from step to step.
    query, one = torch.randn(20, 7, dtype=dtype), torch.randn(1, 7, dtype=dtype)
    search = Search(20, 90, 7, 3, dtype)
    orders = set()
    for _ in range(20):
        up = torch.rand(90, 7) < 0.5
        key = torch.where(up, one.nextafter(torch.tensor(9, dtype=dtype)), one)
        found = search(query, key, 3)
        assert_exact(found, query, key, 3)
        orders.add(tuple(found[0][0].tolist()))
    assert len(orders) > 3


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_scores_tied_at_the_last_kept(dtype):
    # The axes give exact scores. Keys 10 to 69 tie for the second to fourth place.
    key = torch.zeros(70, 4, dtype=dtype)
    key[:10, 0], key[10:, 1] = -1, 1
    key[5] = torch.tensor([1.0, 0, 0, 0])
    query = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], dtype=dtype)
    search = Search(3, 70, 4, 4, dtype)
    wanted = [[5, 10, 11, 12], [0, 1, 2, 3], [10, 11, 12, 13]]
    assert search(query, key, 4)[0].tolist() == wanted
    assert search(query, key, 4)[0].tolist() == wanted
    key[60, 1] = 3.0  # longer, but no other cosine
    assert search(query, key, 4)[0].tolist() == wanted
    key[60] = torch.tensor([1.0, 0, 0, 0])
    wanted = [[5, 60, 10, 11], [0, 1, 2, 3], [10, 11, 12, 13]]
    assert search(query, key, 4)[0].tolist() == wanted
    key[5], key[10] = key[10].clone(), key[5].clone()
    wanted = [[10, 60, 5, 11], [0, 1, 2, 3], [5, 11, 12, 13]]
    assert search(query, key, 4)[0].tolist() == wanted


@needs_library
@pytest.mark.parametrize("slip", [-1e-5, -1e-9, -1e-12, 0.0, 1e-12, 1e-9, 1e-5])
def test_keys_on_the_edge_of_the_bound(slip):
    # What is outside comes as far as the k-th candidate, less or more by `slip`.
    angle = torch.cat([torch.linspace(0.1, 0.4, 16), torch.linspace(0.7, 1.5, 20)]).double()
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    search = Search(1, 36, 2, 2, torch.float64)

    def check(angle):
        key = torch.stack([angle.cos(), angle.sin()], dim=1)
        found, share = searched(search, query, key, 2)
        assert_exact(found, query, key, 2)
        return found[0][0].tolist(), share

    assert check(angle) == ([0, 1], 1)
    assert check(angle) == ([0, 1], 0)
    half = angle.clone()
    half[0], half[1] = angle[0], (angle[1] + angle[15]) / 2  # towards the bound from inside
    check(half)
    other = half.clone()
    other[16] = half.sort().values[1] + slip
    index, _ = check(other)
    if abs(slip) > 1e-11:
        assert (16 in index) == (slip < 0)


def test_zero_vectors_come_and_go():
    query, key = torch.randn(40, 4), torch.randn(90, 4)
    search = Search(40, 90, 4, 3)
    for step in range(12):
        q, other = query.clone(), key.clone()
        q[step % 4 :: 4] = 0
        other[step % 3 :: 3] = 0
        if step == 5:
            other.zero_()
        if step == 7:
            q.zero_()
        found = search(q, other, 3)
        assert_exact(found, q, other, 3)
        assert (found[1][step % 4 :: 4] == 0).all()
        assert found[0][step % 4 :: 4].eq(torch.arange(3)).all()  # all tie
        walk("small", query, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-13, 1e-12, 1e-11, 1e15, 1e20])
def test_long_and_short_vectors(scale, dtype):
    query, key = torch.randn(40, 4, dtype=dtype), torch.randn(90, 4, dtype=dtype)
    search = Search(40, 90, 4, 3, dtype)
    for step in range(8):
        q, other = query.clone(), key.clone()
        q[step % 4 :: 4] *= scale
        other[step % 3 :: 3] *= scale
        assert_exact(search(q, other, 3), q, other, 3)
        assert_exact(search(q, other, 3), q, other, 3)
        walk("small", query, key)


@pytest.mark.parametrize("scale", [2e-13, 5e-13, 9e-13])
@pytest.mark.parametrize("grown", [9.9e-13, 1e-12, 1.0])
def test_vectors_too_short_to_be_normalised_grow(scale, grown):
    # Below a length of 1e-12 a score grows with the length, at no angle at all.
    angle = torch.cat([torch.linspace(0.3, 0.5, 20), torch.linspace(0.01, 0.1, 20)]).double()
    key = torch.stack([angle.cos(), angle.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    search = Search(1, 40, 2, 2, torch.float64)
    key[20:] *= scale
    for _ in range(2):
        found = search(query, key, 2)
        assert_exact(found, query, key, 2)
        assert found[0].tolist() == [[0, 1]]
    key[20:] *= grown / scale
    found = search(query, key, 2)
    assert_exact(found, query, key, 2)
    assert found[0].tolist() == [[20, 21]]
    key[20:] *= scale / grown
    key[20:, 1] = 1e-13
    assert_exact(search(query, key, 2), query, key, 2)
    query *= scale
    assert_exact(search(query, key, 2), query, key, 2)
    query /= scale
    assert_exact(search(query, key, 2), query, key, 2)


def test_length_alone_changes_nothing():
    query, key = torch.randn(40, 4), torch.randn(90, 4)
    search = Search(40, 90, 4, 3)
    first = search(query, key, 3)
    for power in (-20, -3, 5, 30):  # of two: exact
        index, score = search(query * 2.0**power, key * 2.0**-power, 3)
        assert torch.equal(index, first[0]) and torch.equal(score, first[1])
    if _cpu.AVAILABLE:
        assert search.share == pytest.approx(1 / 5)


def test_signs_flip():
    query, key = torch.randn(40, 4), torch.randn(90, 4)
    search = Search(40, 90, 4, 3)
    for step in range(10):
        assert_exact(search(query, key, 3), query, key, 3)
        if step % 3 == 0:
            key.neg_()
        elif step % 3 == 1:
            query[::3].neg_()
        else:
            key[:, 1].neg_()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_key", [90, 10])
def test_not_a_number_leaves_no_trace(bad, num_key):
    query, key = torch.randn(40, 4), torch.randn(num_key, 4)
    search = Search(40, num_key, 4, 3)
    search(query, key, 3)
    rows = [slice(0, None, 3), slice(None), slice(1, 2), slice(num_key - 1, None)]
    for step in range(8):
        for spoilt in (query, key):
            before = spoilt.clone()
            spoilt[rows[step % 4]] = bad
            index, _ = search(query, key, 3)
            assert 0 <= index.min() and index.max() < num_key
            if step % 2 == 0:
                index, _ = search(query, key, 3)
                assert 0 <= index.min() and index.max() < num_key
            spoilt.copy_(before)
            assert_exact(search(query, key, 3), query, key, 3)
        walk("small", query, key)
    if _cpu.AVAILABLE:
        search(query, key, 3)
        found, share = searched(search, query, key, 3)
        assert share < 0.1  # and rows are proved again
        assert_exact(found, query, key, 3)


# Changes that the search did not see #################################################


def test_parameters_changed_from_outside():
    layer = make()
    others = [make().state_dict() for _ in range(3)]

    def load():
        layer.load_state_dict(others[0])

    def assign():
        layer.load_state_dict(others[1], assign=True)

    def data():
        layer.key.data = others[2]["key"].clone()

    def data_of_query():
        layer.query.data = others[2]["query"].flip(0)

    def in_place():
        with torch.no_grad():
            layer.key[7] = -layer.key[7]
            layer.key[[3, 4]] = layer.key[[4, 3]]

    def unseen():  # raises no version counter
        layer.key.data[::5] = torch.randn_like(layer.key.data[::5])

    def numpy():
        layer.query.detach().numpy()[3:6] = 0.5

    def permuted():
        layer.key.data = layer.key.data[torch.randperm(120)]

    def strided():
        layer.key.data = torch.randn(5, 120).t()

    def parameter():
        layer.query = torch.nn.Parameter(torch.randn(40, 5))

    def reset():
        layer.reset_parameters()

    changes = [load, assign, data, data_of_query, in_place, unseen, numpy]
    for change in [*changes, permuted, strided, parameter, reset]:
        before = learned(layer)
        assert torch.equal(learned(layer), before)
        change()
        assert_layer_exact(layer)
        assert not torch.equal(learned(layer), before), change.__name__


def test_functional_call_with_other_parameters():
    layer, other = make(), make()
    x = torch.randn(2, 120, 4)
    expected = layer(x), other(x)
    for _ in range(2):
        called = torch.func.functional_call(layer, other.state_dict(), (x,))
        assert torch.equal(called, expected[1])
        assert torch.equal(layer(x), expected[0])


def test_gradients_after_reuse_are_those_of_the_first_call():
    layer = make(dtype=torch.float64)
    x = torch.randn(2, 120, 4, dtype=torch.float64)

    def dense(layer):
        out = reference.attention(layer.query, layer.key, layer.k)
        prior = torch.zeros(40, 120).double().scatter_add(1, layer.prior_index, layer.prior_weight)
        return reference.apply(reference.fuse(out, prior, layer.fusion_weight), x)

    for _ in range(3):
        found = torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])
        wanted = torch.autograd.grad(dense(layer).square().sum(), [*layer.parameters()])
        for grad, other in zip(found, wanted, strict=True):
            assert other.abs().max() > 1e-3
            assert_close(grad, other)
        with torch.no_grad():
            walk("small", layer.key, layer.query)


# State ###############################################################################


@needs_library
def test_share_of_rows_searched():
    search = Search(50, 300, 4, 2)
    query, key = torch.randn(50, 4), torch.randn(300, 4)
    assert search.share == 0
    assert searched(search, query, key, 2)[1] == 1
    assert search.share == 1
    assert searched(search, query, key, 2)[1] == 0
    assert search.share == 0.5
    # One query turned around is one row; one key turned around is a reason to look everywhere.
    query[7].neg_()
    assert searched(search, query, key, 2)[1] == pytest.approx(1 / 50)
    walk("tiny", query, key)
    assert searched(search, query, key, 2)[1] == 0
    key[9].neg_()
    assert searched(search, query, key, 2)[1] == 1
    # The further all turn, the more is searched.
    shares = []
    for size in (1e-6, 1e-3, 1e-2, 1e-1, 1):
        search(query, key, 2)
        moved = key + size * torch.randn(300, 4)
        shares.append(searched(search, query, moved, 2)[1])
        assert_exact(search(query, moved, 2), query, moved, 2)
        key = moved
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)


@needs_library
def test_where_all_keys_are_candidates_none_is_searched():
    search = Search(9, 12, 3, 5)
    query, key = torch.randn(9, 3), torch.randn(12, 3)
    for _ in range(3):
        assert_exact(search(query, key, 5), query, key, 5)
        walk("large", query, key)
    assert search.share == 0


@pytest.mark.parametrize("k", [1, 5, 9, 15, 16, 17, 40, 80])
def test_fewer_or_more_asked_for_than_announced(k):
    query, key = torch.randn(30, 4), torch.randn(80, 4)
    search = Search(30, 80, 4, 2)
    for asked in (2, k, 2, k):
        assert_exact(search(query, key, asked), query, key, asked)
        walk("small", query, key)


def test_a_layer_that_keeps_more_from_now_on():
    layer = make()
    learned(layer)
    layer.k = 33
    for _ in range(2):
        assert_layer_exact(layer)


@needs_fork
@pytest.mark.parametrize("size", [(30, 200, 4), (30, 20, 4), (90, 80, 4), (7, 80, 4), (30, 80, 9)])
def test_other_sizes_than_announced(size):
    # Memory may not be read or written beyond its end: searched in full, or refused.
    def run():
        search = Search(30, 80, 4, 2)
        search(torch.randn(30, 4), torch.randn(80, 4), 2)
        query, key = torch.randn(size[0], size[2]), torch.randn(size[1], size[2])
        for _ in range(2):
            try:
                found = search(query, key, 2)
            except (ValueError, RuntimeError):
                continue
            assert_exact(found, query, key, 2)

    assert status_of_child(run) == 0


@needs_fork
@pytest.mark.parametrize("size", [(5, 3, 8, 3, 9), (5, 3, 8, 4, 2), (5, 4, 8, 3, 2)])
def test_what_does_not_fit_together_is_refused(size):
    num_query, channels, num_key, other, k = size

    def run():
        with pytest.raises((ValueError, RuntimeError)):
            cosine_topk(torch.randn(num_query, channels), torch.randn(num_key, other), k)

    assert status_of_child(run) == 0


def copies():
    def saved(layer):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
        "torch.save": saved,
    }


@pytest.mark.parametrize("copied", copies().values(), ids=copies().keys())
def test_copies_go_on_and_are_independent(copied):
    layer = make()
    learned(layer), learned(layer)
    other = copied(layer)
    assert layer.search is not other.search
    if _cpu.AVAILABLE:
        assert other.search.share == layer.search.share == 0.5
        learned(other)
        assert other.search.share < 0.5  # it goes on from there
        assert layer.search.share == 0.5  # and that leaves the first alone
    with torch.no_grad():
        other.key.neg_()
    for _ in range(2):
        assert_layer_exact(other)
        assert_layer_exact(layer)
        with torch.no_grad():
            walk("small", layer.key, other.query)


def test_casts_there_and_back():
    layer = make()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.key.dtype == dtype
        for _ in range(2):
            assert_layer_exact(layer)
            with torch.no_grad():
                walk("small", layer.key, layer.query)
    if _cpu.AVAILABLE:
        layer.to("cpu"), layer.float()
        assert 0 < layer.search.share < 1  # what changes nothing keeps what is remembered


def test_parameters_of_another_type_than_the_search():
    layer = make()
    learned(layer)
    layer.load_state_dict(make(dtype=torch.float64).state_dict(), assign=True)
    assert layer.key.dtype == torch.float64
    for _ in range(2):
        assert_layer_exact(layer)


def test_state_dict_and_checkpoint():
    layer = make()
    names = set(layer.state_dict())
    for _ in range(3):
        learned(layer)
    assert names == set(layer.state_dict())
    assert names == {"key", "query", "fusion_weight", "prior_index", "prior_weight"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make()
    assert not torch.equal(learned(other), learned(layer))
    other.load_state_dict(torch.load(file))
    x = torch.randn(2, 120, 4)
    for _ in range(2):
        assert torch.equal(learned(other), learned(layer))
        assert torch.equal(other(x), layer(x))


def in_threads(*functions):
    errors = []
    start = threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_call_one_layer():
    layer = make(num_source=400, num_target=200)
    x = torch.randn(2, 400, 4)
    expected = copy.deepcopy(layer)(x)

    def run():
        for _ in range(30):
            assert torch.equal(layer(x), expected)

    in_threads(run, run)


def test_two_threads_with_other_vectors_share_one_search():
    search = Search(60, 300, 4, 2)

    def run(seed, kind):
        random = torch.Generator().manual_seed(seed)
        query = torch.randn(60, 4, generator=random)
        key = torch.randn(300, 4, generator=random)
        for _ in range(40):
            assert_exact(search(query, key, 2), query, key, 2)
            key += STEPS[kind] * torch.randn(300, 4, generator=random)

    in_threads(lambda: run(1, "small"), lambda: run(2, "medium"))


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
def test_compiled_training_uses_the_search_as_eager_does(normalization, compiled):
    eager = make(normalization=normalization, dtype=torch.float64)
    layer = copy.deepcopy(eager)
    x, target = torch.randn(2, 120, 4).double(), torch.randn(2, 40, 4).double()

    def train(layer, function):
        optimiser = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
        losses = []
        for step in range(8):
            optimiser.zero_grad()
            loss = (function(x) - target).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
            if step == 4:  # a change that it does not see
                layer.key.data[::7] = -layer.key.data[::7]
        return torch.stack(losses)

    assert_close(train(layer, compiled(layer)), train(eager, eager), rtol=1e-12, atol=0)
    for name, parameter in layer.named_parameters():
        assert_close(parameter, eager.get_parameter(name), rtol=1e-10, atol=1e-12)
    if _cpu.AVAILABLE:
        assert layer.search.share == eager.search.share
        assert 0 < layer.search.share < 0.6
    assert assert_layer_exact(layer) > 0.5


def test_under_no_grad_and_inference_mode():
    layer = make()
    x = torch.randn(2, 120, 4)
    expected = layer(x)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), expected)
        layer(x).sum().backward()
    assert_layer_exact(layer)


def test_opcheck():
    query, key = torch.randn(7, 3), torch.randn(40, 3)
    search = Search(7, 40, 3, 4)
    state = search.last_query, search.last_key, search.candidates, search.angle, search.searched
    if _cpu.AVAILABLE:
        torch.library.opcheck(torch.ops.pyg_attnpool.topk_again, (query, key, 4, *state))
    torch.library.opcheck(torch.ops.pyg_attnpool.topk, (query, key, 4))


# Memory ##############################################################################


def test_nothing_of_the_size_of_all_scores():
    # 1.6 GB, if it were held.
    num = 20_000
    key, query = torch.randn(num, 4), torch.randn(num, 4)
    search = Search(num, num, 4, 2)
    before = peak_memory()
    for _ in range(2):
        index, score = search(query, key, 2)
    # The tiles of PyTorch leave holes that the allocator does not always fill.
    assert peak_memory() - before < (200e6 if _cpu.AVAILABLE else 1.2e9)
    rows = torch.arange(0, num, 97)
    wanted = torch.cosine_similarity(query[rows, None].double(), key[index[rows]].double(), dim=-1)
    assert_close(score[rows].double(), wanted, rtol=0, atol=1e-6)
    best, _ = reference.cosine_topk(query[rows].double(), key.double(), 2)
    assert_close(wanted, best, rtol=0, atol=1e-6)


def peak_memory():
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
