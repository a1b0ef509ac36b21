import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from pyg_attnpool.ops import _cpu, reference
from pyg_attnpool.ops import attention as ops
from pyg_attnpool.ops.sparse import ell_rowptr, transpose

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
