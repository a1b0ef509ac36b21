import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from pyg_attnpool.ops import _cpu, reference
from pyg_attnpool.ops import attention as ops
from pyg_attnpool.ops.sparse import ell_rowptr, map_rows, transpose

# number of queries, keys, channels, k
SIZES = [(1, 1, 1, 1), (7, 5, 3, 1), (13, 29, 5, 4), (31, 17, 21, 17), (50, 101, 8, 33)]
LOG_BETA = {"sum": None, "softmax": 1.3}


def leaf(*size, device, dtype=torch.float64):
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_()


def to_dense(index, weight, num_key):
    dense = weight.new_zeros(index.size(0), num_key)
    return dense.scatter(1, index, weight)  # a row keeps no key twice


@pytest.fixture(params=LOG_BETA.values(), ids=LOG_BETA.keys())
def log_beta(request, device):
    if request.param is None:
        return None
    value = torch.tensor(request.param, dtype=torch.float64, device=device)
    return value.requires_grad_()


# Weights #############################################################################


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_and_gradients_equal_reference(sizes, log_beta, device):
    num_query, num_key, channels, k = sizes
    query = leaf(num_query, channels, device=device)
    key = leaf(num_key, channels, device=device)
    inputs = [query, key] if log_beta is None else [query, key, log_beta]

    out = to_dense(*ops.attention(query, key, k, log_beta)[:2], num_key)
    expected = reference.attention(query, key, k, log_beta)
    assert_close(out, expected)

    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, cotangent)
    for grad, other in zip(found, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert_close(grad, other)


def test_attention_of_non_contiguous_vectors(log_beta, device):
    query, key = leaf(4, 13, device=device).t(), leaf(29, 8, device=device)[:, ::2]
    out = to_dense(*ops.attention(query, key, 3, log_beta)[:2], 29)
    expected = reference.attention(query, key, 3, log_beta)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key), cotangent)
    wanted = torch.autograd.grad(expected, (query, key), cotangent)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)


def test_attention_gradcheck(log_beta, device):
    query, key = leaf(3, 4, device=device), leaf(6, 4, device=device)
    inputs = (query, key) if log_beta is None else (query, key, log_beta)
    assert gradcheck(lambda q, k, *beta: ops.attention(q, k, 3, *beta)[1], inputs)


# Prior ###############################################################################


def with_prior(num_query, num_key, slots, device):
    index = torch.randint(num_key, (num_query, slots), device=device)
    share = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    return (index, torch.rand(num_query, slots, dtype=torch.float64, device=device)), share


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_beside_a_prior_equals_reference(sizes, slots, log_beta, device):
    num_query, num_key, channels, k = sizes
    query = leaf(num_query, channels, device=device)
    key = leaf(num_key, channels, device=device)
    prior, share = with_prior(num_query, num_key, slots, device)
    inputs = [t for t in (query, key, log_beta, share) if t is not None]

    index, weight, transposed = ops.attention(query, key, k, log_beta, prior, share)
    assert torch.equal(index[:, k:], prior[0])
    for found, other in zip(
        transposed, transpose(ell_rowptr(index), index.flatten(), num_key), strict=True
    ):
        assert torch.equal(found, other)
    out = weight.new_zeros(num_query, num_key).scatter_add(1, index, weight)
    fixed = torch.zeros_like(out).scatter_add(1, *prior)
    expected = reference.fuse(reference.attention(query, key, k, log_beta), fixed, share)
    assert_close(out, expected)

    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, cotangent)
    for grad, other in zip(found, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert_close(grad, other)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_gradients_are_needed(needed, log_beta, device):
    query, key = torch.randn(9, 4, device=device).double(), torch.randn(23, 4, device=device)
    prior, share = with_prior(9, 23, 2, device)
    inputs = [query, key.double(), share.detach()]
    wrt = [inputs[i].requires_grad_() for i in needed]
    beta = None if log_beta is None else log_beta.detach()

    _, weight, _ = ops.attention(inputs[0], inputs[1], 4, beta, prior, inputs[2])
    cotangent = torch.randn_like(weight)
    found = torch.autograd.grad(weight, wrt, cotangent)
    score, _ = reference.cosine_topk(inputs[0], inputs[1], 4)
    kept = score / score.sum(dim=1, keepdim=True)
    if beta is None:
        assert score.min() > 0
    else:
        kept = (beta.exp() * score).softmax(dim=1)
    expected = torch.cat([inputs[2] * kept, (1 - inputs[2]) * prior[1]], dim=1)
    for grad, other in zip(found, torch.autograd.grad(expected, wrt, cotangent), strict=True):
        assert_close(grad, other)


def test_first_and_second_derivatives_beside_a_prior(log_beta, device):
    query, key = leaf(3, 4, device=device), leaf(6, 4, device=device)
    prior, share = with_prior(3, 6, 2, device)
    scalars = [share] if log_beta is None else [share, log_beta]

    def run(query, key, share, log_beta=None):
        return ops.attention(query, key, 3, log_beta, prior, share)[1]

    assert gradcheck(run, (query, key, *scalars))
    assert gradgradcheck(run, (query, key, *scalars))


# Applied to rows #####################################################################

# To fewer and to more vertices, features of no, some and several vectors.
APPLIED = [(1, 1, 1, 1, 1), (7, 5, 3, 1, 2), (13, 29, 5, 4, 40), (101, 37, 21, 17, 67)]
APPLIED += [(300, 50, 8, 33, 129)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("sizes", APPLIED, ids=str)
def test_attend_and_gradients_equal_reference(sizes, slots, threads, log_beta, device):
    num_query, num_key, channels, k, features = sizes
    query = leaf(num_query, channels, device=device)
    key = leaf(num_key, channels, device=device)
    x = leaf(num_key, 1, features, device=device)
    prior, share = with_prior(num_query, num_key, slots, device) if slots else (None, None)
    inputs = [t for t in (x, query, key, log_beta, share) if t is not None]
    dense = reference.attention(query, key, k, log_beta)
    if prior is not None:
        dense = reference.fuse(dense, torch.zeros_like(dense).scatter_add(1, *prior), share)
    expected = reference.apply(dense, x.transpose(0, 1)).transpose(0, 1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ops.attend(x, query, key, k, log_beta, prior, share)
        cotangent = torch.randn_like(out)
        found = torch.autograd.grad(out, inputs, cotangent)
    finally:
        torch.set_num_threads(before)
    assert_close(out, expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)


def test_attend_twice_differentiated_and_in_part(log_beta, device):
    query, key = leaf(5, 4, device=device), leaf(3, 4, device=device)
    x = leaf(3, 2, 2, device=device)
    prior, share = with_prior(5, 3, 2, device)
    scalars = [share] if log_beta is None else [share, log_beta]

    def run(x, query, key, share, log_beta=None):
        return ops.attend(x, query, key, 2, log_beta, prior, share)

    assert gradcheck(run, (x, query, key, *scalars))
    assert gradgradcheck(run, (x, query, key, *scalars))
    for wanted in (x, key):
        others = [t.detach() if t is not wanted else t for t in (x, query, key, *scalars)]
        grads = torch.autograd.grad(run(x, query, key, *scalars).square().sum(), wanted)
        assert_close(torch.autograd.grad(run(*others).square().sum(), wanted), grads)


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_attend_gives_the_type_of_the_rows(types, device):
    of_rows, of_vectors = types
    query, key = (leaf(n, 4, device=device, dtype=of_vectors) for n in (9, 6))
    x = leaf(6, 2, 5, device=device, dtype=of_rows)
    out = ops.attend(x, query, key, 3)
    index, weight, _ = ops.attention(query, key, 3)
    expected = map_rows(index, weight, x.double(), 6)
    assert out.dtype == of_rows
    assert_close(out.double(), expected, rtol=0, atol=0.03 if of_rows == torch.bfloat16 else 1e-5)
    out.double().square().sum().backward()
    assert x.grad.dtype == of_rows and key.grad.dtype == query.grad.dtype == of_vectors


def test_attend_refuses_other_rows(device):
    query, key = leaf(9, 4, device=device), leaf(6, 4, device=device)
    for size in ((5, 2, 3), (6, 3)):
        with pytest.raises(ValueError, match="Expected rows of shape"):
            ops.attend(leaf(*size, device=device), query, key, 3)


def test_attend_compiles_without_graph_breaks(log_beta, compiled, device):
    query, key = leaf(13, 5, device=device), leaf(9, 5, device=device)
    x = leaf(9, 2, 3, device=device)
    inputs = [x, query, key] if log_beta is None else [x, query, key, log_beta]
    out = compiled(ops.attend)(x, query, key, 4, log_beta)
    expected = ops.attend(x, query, key, 4, log_beta)
    assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)


@pytest.mark.skipif(not _cpu.AVAILABLE, reason="operators of the compiled operations alone")
@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("num_key", [5, 11])
def test_operators_that_apply_pass_opcheck(slots, num_key, log_beta):
    if log_beta is not None and log_beta.device.type != "cpu":
        pytest.skip("operators of a CPU")
    query, key = leaf(7, 3, device="cpu"), leaf(num_key, 3, device="cpu")
    prior, share = with_prior(7, num_key, slots, "cpu")
    index, score = torch.ops.pyg_attnpool.topk(query.detach(), key.detach(), 4)
    x = leaf(num_key, 6, device="cpu")
    inputs = (query, key, log_beta, share if slots else None, index, score, *prior, x)
    torch.library.opcheck(torch.ops.pyg_attnpool.attended, inputs)
    inputs = [t if t is None else t.detach() for t in inputs]
    grad = torch.randn(7, 6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.pyg_attnpool.attended_backward, (*inputs, grad))


@pytest.mark.skipif(not _cpu.AVAILABLE, reason="operators of the compiled operations alone")
@pytest.mark.parametrize("num_key", [5, 11])
def test_indices_out_of_range_are_refused(num_key):
    query, key, x = torch.randn(7, 3), torch.randn(num_key, 3), torch.randn(num_key, 6)
    index, score = torch.ops.pyg_attnpool.topk(query, key, 4)
    prior = torch.zeros(7, 2, dtype=torch.long), torch.rand(7, 2)
    for wrong in (index, prior[0]):
        before = wrong[3, 1].clone()
        for vertex in (-1, num_key):
            wrong[3, 1] = vertex
            with pytest.raises(ValueError, match="Expected indices"):
                _cpu.attended(index, score, *prior, 1.0, 0.5, x)
            with pytest.raises(ValueError, match="Expected indices"):
                slots = query, key, index, score, *prior
                _cpu.attended_backward(*slots, 1.0, 0.5, x, torch.randn(7, 6))
        wrong[3, 1] = before


@pytest.mark.skipif(not _cpu.AVAILABLE, reason="operators of the compiled operations alone")
@pytest.mark.parametrize("slots", [0, 2])
def test_operators_pass_opcheck(slots, log_beta):
    if log_beta is not None and log_beta.device.type != "cpu":
        pytest.skip("operators of a CPU")
    query, key = leaf(7, 3, device="cpu"), leaf(11, 3, device="cpu")
    (prior_index, prior), share = with_prior(7, 11, slots, "cpu")
    index, score = torch.ops.pyg_attnpool.topk(query.detach(), key.detach(), 4)
    index = torch.cat([index, prior_index], dim=1)
    transposed = transpose(ell_rowptr(index), index.flatten(), 11)
    share = share if slots else None
    inputs = (query, key, log_beta, share, index, prior, *transposed, score)
    torch.library.opcheck(torch.ops.pyg_attnpool.attention, inputs)
    inputs = [t if t is None else t.detach() for t in inputs]
    grad = torch.randn(index.shape, dtype=torch.float64)
    torch.library.opcheck(torch.ops.pyg_attnpool.attention_backward, (*inputs, grad))


# Types and edges #####################################################################


@pytest.mark.parametrize("dtype,slack", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_attention_in_low_precision(dtype, slack, log_beta, device):
    query = leaf(37, 21, device=device, dtype=dtype)
    key = leaf(83, 21, device=device, dtype=dtype)
    index, weight, _ = ops.attention(query, key, 5, log_beta)
    weight.square().sum().backward()

    # The selection may differ within rounding, the weights follow from it exactly.
    exact = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
    score = torch.cosine_similarity(exact[0][:, None], exact[1][index], dim=-1)
    if log_beta is None:
        expected = score / score.sum(dim=-1, keepdim=True)
    else:
        expected = (log_beta.exp() * score).softmax(dim=-1)
    assert score.min() > 0
    assert_close(weight.double(), expected, rtol=0, atol=slack)
    expected.square().sum().backward()
    for found, other in zip((query, key), exact, strict=True):
        assert found.grad.dtype == dtype
        assert_close(found.grad.double(), other.grad, rtol=slack, atol=slack)


def test_scores_below_zero_are_clamped_and_pass_no_gradient(device):
    key = torch.tensor([[-1.0, 0.0], [-1.0, 1.0], [0.6, 0.8]], device=device, requires_grad=True)
    query = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)

    index, weight, _ = ops.attention(query, key[:2], 2)  # nothing positive: all count the same
    assert index.tolist() == [[1, 0]] and weight.tolist() == [[0.5, 0.5]]
    grads = torch.autograd.grad(weight[0, 0], (query, key))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)

    index, weight, _ = ops.attention(query, key, 2)  # one positive takes all
    assert index.tolist() == [[2, 1]]
    assert_close(weight, torch.tensor([[1.0, 1e-25 / 0.6]], device=device), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(weight[0, 0], (query, key))
    assert all(grad.abs().max() < 1e-20 for grad in grads)


def test_zero_vectors_count_the_same_for_all(device):
    query = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device)
    key = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]], device=device)
    index, weight, _ = ops.attention(query, key, 2)
    assert torch.equal(to_dense(index, weight, 3), reference.attention(query, key, 2))
    assert weight.tolist() == [[0.5, 0.5], [1.0, pytest.approx(0)]]


def test_literal_weights(device):
    query = torch.tensor([[2.0, 0.0]], dtype=torch.float64, device=device)
    key = torch.tensor([[0.8, 0.6], [0.0, 9.0], [6.0, 8.0], [5.0, 0.0]], device=device).double()
    index, weight, _ = ops.attention(query, key, 3)
    assert index.tolist() == [[3, 0, 2]]
    assert_close(weight, torch.tensor([[1.0, 0.8, 0.6]], device=device).double() / 2.4)
    _, weight, _ = ops.attention(query, key, 3, torch.tensor(5.0, device=device).double().log())
    exp = torch.tensor([[5.0, 4.0, 3.0]], device=device).double().exp()
    assert_close(weight, exp / exp.sum())


def test_backward_saves_no_dense_matrix(log_beta, saved_numel, device):
    query, key = leaf(199, 7, device=device), leaf(211, 7, device=device)
    sizes = saved_numel(ops.attention, query, key, 3, log_beta)
    assert sizes and max(sizes) <= 211 * 7


def test_autocast_leaves_the_weights_exact(log_beta, device):
    query, key = leaf(13, 5, device=device), leaf(29, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = to_dense(*ops.attention(query, key, 4, log_beta)[:2], 29)
    assert_close(out, reference.attention(query, key, 4, log_beta))


def test_attention_compiles_without_graph_breaks(log_beta, compiled, device):
    query, key = leaf(13, 5, device=device), leaf(29, 5, device=device)
    inputs = [query, key] if log_beta is None else [query, key, log_beta]
    out = to_dense(*compiled(ops.attention)(query, key, 4, log_beta)[:2], 29)
    expected = reference.attention(query, key, 4, log_beta)
    assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other)
