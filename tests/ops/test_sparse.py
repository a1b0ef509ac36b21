import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from pyg_attnpool.ops import reference
from pyg_attnpool.ops.sparse import (
    apply_mapping,
    ell_rowptr,
    fuse_slots,
    map_rows,
    sddmm,
    spmm,
    transpose,
)
from tests.ops.checks import opcheck

# name: (rowptr, col, number of columns)
PATTERNS = {
    "plain": ([0, 2, 3, 6], [0, 3, 2, 1, 2, 4], 5),
    "empty rows": ([0, 0, 2, 2, 5, 5], [1, 0, 2, 0, 1], 3),
    "repeated, unsorted": ([0, 3, 7], [2, 0, 2, 1, 1, 0, 1], 3),
    "single": ([0, 1], [0], 1),
    "no entries": ([0, 0, 0], [], 4),
    "wide": (list(range(0, 41, 5)), [(7 * e) % 11 for e in range(40)], 11),
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 6e-2},
}


@pytest.fixture(params=PATTERNS.values(), ids=PATTERNS.keys())
def pattern(request, device):
    rowptr, col, num_cols = request.param
    rowptr = torch.tensor(rowptr, device=device)
    return rowptr, torch.tensor(col, dtype=torch.long, device=device), num_cols


def rows_of(rowptr, col):
    return torch.repeat_interleave(rowptr.diff(), output_size=col.numel())


def to_dense(rowptr, col, value, num_cols):
    value = value.double()
    dense = value.new_zeros(rowptr.numel() - 1, num_cols)
    return dense.index_put((rows_of(rowptr, col), col), value, accumulate=True)


def leaf(*size, device, dtype=torch.float64):
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_()


def grads(out, inputs):
    # Squared, so that the incoming gradient differs between entries.
    return torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("channels", [1, 3, 33])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_spmm_equals_dense_product(pattern, dtype, channels, device):
    rowptr, col, num_cols = pattern
    value = leaf(col.numel(), device=device, dtype=dtype)
    x = leaf(num_cols, channels, device=device, dtype=dtype)
    exact = value.detach().double().requires_grad_(), x.detach().double().requires_grad_()

    out = spmm(rowptr, col, value, x)
    expected = to_dense(rowptr, col, exact[0], num_cols) @ exact[1]
    assert out.dtype == dtype
    assert_close(out.double(), expected, **TOLERANCE[dtype])

    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, (value, x), cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for grad, other in zip(found, wanted, strict=True):
        assert grad.dtype == dtype
        assert_close(grad.double(), other, **TOLERANCE[dtype])


def test_spmm_with_given_transpose_is_the_same(pattern, device):
    rowptr, col, num_cols = pattern
    value, x = leaf(col.numel(), device=device), leaf(num_cols, 3, device=device)
    out = spmm(rowptr, col, value, x)
    other = spmm(rowptr, col, value, x, transpose(rowptr, col, num_cols))
    assert torch.equal(out, other)
    for grad, expected in zip(grads(other, (value, x)), grads(out, (value, x)), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("channels", [1, 3, 33])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sddmm_equals_entries_of_dense_product(pattern, dtype, channels, device):
    rowptr, col, num_cols = pattern
    a = leaf(rowptr.numel() - 1, channels, device=device, dtype=dtype)
    b = leaf(num_cols, channels, device=device, dtype=dtype)
    exact = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()

    out = sddmm(rowptr, col, a, b)
    expected = (exact[0] @ exact[1].t())[rows_of(rowptr, col), col]
    assert out.dtype == dtype
    assert_close(out.double(), expected, **TOLERANCE[dtype])

    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, (a, b), cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for grad, other in zip(found, wanted, strict=True):
        assert grad.dtype == dtype
        assert_close(grad.double(), other, **TOLERANCE[dtype])


def test_non_contiguous_inputs(device):
    rowptr, col, num_cols = (
        torch.tensor(PATTERNS["wide"][0], device=device),
        torch.tensor(PATTERNS["wide"][1], device=device),
        PATTERNS["wide"][2],
    )
    value = leaf(40, 2, device=device)[:, 1]
    x = leaf(3, num_cols, device=device).t()
    a = leaf(8, 6, device=device)[:, ::2]
    assert not (value.is_contiguous() or x.is_contiguous() or a.is_contiguous())

    out = spmm(rowptr, col, value, x)
    expected = to_dense(rowptr, col, value, num_cols) @ x
    assert_close(out, expected)
    for grad, other in zip(grads(out, (value, x)), grads(expected, (value, x)), strict=True):
        assert_close(grad, other)

    out = sddmm(rowptr, col, a, x)
    expected = (a @ x.t())[rows_of(rowptr, col), col]
    assert_close(out, expected)
    for grad, other in zip(grads(out, (a, x)), grads(expected, (a, x)), strict=True):
        assert_close(grad, other)


def test_first_and_second_derivatives_are_those_of_finite_differences(pattern, device):
    rowptr, col, num_cols = pattern
    value, x = leaf(col.numel(), device=device), leaf(num_cols, 2, device=device)
    a = leaf(rowptr.numel() - 1, 2, device=device)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda v, x: spmm(rowptr, col, v, x), (value, x))
        assert check(lambda a, b: sddmm(rowptr, col, a, b), (a, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_operators_pass_opcheck(pattern, dtype, device):
    rowptr, col, num_cols = pattern
    value = leaf(col.numel(), device=device, dtype=dtype)
    x = leaf(num_cols, 3, device=device, dtype=dtype)
    a = leaf(rowptr.numel() - 1, 3, device=device, dtype=dtype)
    ops = torch.ops.pyg_attnpool
    tolerance = TOLERANCE[dtype]
    opcheck(ops.spmm, (rowptr, col, None, value, x), **tolerance)
    transposed = transpose(rowptr, col, num_cols)
    opcheck(ops.spmm, (rowptr, col, None, value, x, *transposed), **tolerance)
    opcheck(ops.spmm_grads, (rowptr, col, value, a, x, *transposed), **tolerance)
    opcheck(ops.sddmm, (rowptr, col, a, x), **tolerance)


def test_transpose_passes_opcheck(pattern, device):
    torch.library.opcheck(torch.ops.pyg_attnpool.transpose, pattern)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_threads_repeat_to_the_bit_and_equal_one(dtype, num_threads):
    # Enough for the work to be shared, unlike in the tests above.
    col = torch.randint(150, (900,))
    rowptr = torch.arange(0, 901, 3)
    value, x = leaf(900, device="cpu", dtype=dtype), leaf(150, 90, device="cpu", dtype=dtype)
    exact = value.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    expected = to_dense(rowptr, col, exact[0], 150) @ exact[1]
    wanted = [expected, *grads(expected, exact)]
    results = []
    for threads in (2, 2, 1):
        num_threads(threads)
        out = spmm(rowptr, col, value, x)
        results.append([out, *grads(out, (value, x))])
    for first, again, single, exactly in zip(*results, wanted, strict=True):
        # Every row is formed by one thread, in one order.
        assert torch.equal(first, again) and torch.equal(first, single)
        scale = exactly.abs().max()
        assert_close(first.double() / scale, exactly / scale, **TOLERANCE[dtype])


def test_transpose_is_that_of_the_dense_matrix(pattern, device):
    rowptr, col, num_cols = pattern
    value = torch.arange(1.0, col.numel() + 1, device=device)
    rowptr_t, col_t, perm = transpose(rowptr, col, num_cols)
    dense = to_dense(rowptr, col, value, num_cols)
    assert torch.equal(to_dense(rowptr_t, col_t, value[perm], rowptr.numel() - 1), dense.t())


def test_transpose_literal():
    rowptr, col = torch.tensor([0, 0, 2, 5]), torch.tensor([3, 0, 0, 3, 0])
    rowptr_t, col_t, perm = transpose(rowptr, col, 5)
    assert rowptr_t.tolist() == [0, 3, 3, 3, 5, 5]
    assert col_t.tolist() == [1, 2, 2, 1, 2]
    assert perm.tolist() == [1, 2, 4, 0, 3]


# Mappings ###########################################################################


def random_mapping(num_source, num_target, k, device, dtype=torch.float64):
    index = torch.randint(num_source, (num_target, k), device=device)
    weight = leaf(num_target, k, device=device, dtype=dtype)
    return index, weight, to_dense(ell_rowptr(index), index.flatten(), weight.flatten(), num_source)


LAYOUTS = {
    "[N, F]": lambda x: x[0],
    "[B, N, F]": lambda x: x,
    "[B * N, F]": lambda x: x.flatten(0, 1),
}


@pytest.mark.parametrize("sizes", [(7, 3, 2, 5, 3), (1, 1, 1, 1, 1), (13, 29, 4, 2, 17)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_apply_mapping_equals_reference(sizes, layout, device):
    num_source, num_target, k, batch_size, channels = sizes
    index, weight, dense = random_mapping(num_source, num_target, k, device)
    x = leaf(batch_size, num_source, channels, device=device)

    out = apply_mapping(index, weight, layout(x), num_source)
    expected = layout(reference.apply(dense, x))
    assert_close(out, expected)
    for grad, other in zip(grads(out, (weight, x)), grads(expected, (weight, x)), strict=True):
        assert_close(grad, other)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)], ids=str)
def test_apply_mapping_takes_any_memory_order(order, device):
    index, weight, dense = random_mapping(7, 5, 3, device)
    x = leaf(4, 7, 3, device=device)
    stored = x.permute(order).contiguous()
    view = stored.permute([order.index(dim) for dim in range(3)])
    assert_close(apply_mapping(index, weight, view, 7), reference.apply(dense, x))


def test_apply_mapping_gradcheck(device):
    index, weight, _ = random_mapping(5, 4, 2, device)
    x = leaf(2, 5, 3, device=device)
    assert gradcheck(lambda w, x: apply_mapping(index, w, x, 5), (weight, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_result_has_the_type_of_the_features(dtype, device):
    index, weight, dense = random_mapping(7, 5, 2, device, torch.float32)
    x = torch.randn(2, 7, 3, device=device, dtype=dtype)
    out = apply_mapping(index, weight, x, 7)
    assert out.dtype == dtype
    expected = reference.apply(dense.double(), x.double())
    assert_close(out.double(), expected, **TOLERANCE[dtype])


def test_empty_batch_gives_an_empty_batch(device):
    index, weight, _ = random_mapping(7, 5, 2, device)
    assert apply_mapping(index, weight, torch.empty(0, 7, 3, device=device), 7).shape == (0, 5, 3)


def test_backward_saves_no_dense_matrix(saved_numel, device):
    index, weight, _ = random_mapping(211, 199, 3, device)
    x = leaf(2, 211, 5, device=device)
    sizes = saved_numel(apply_mapping, index, weight, x, 211)
    # The largest is x itself; one feature row per slot would be 199 * 3 * 10.
    assert sizes and max(sizes) == x.numel() < 199 * 3 * 10 < 199 * 211


@pytest.mark.parametrize("num_nodes", [0, 1, 18, 20, 57])
def test_rows_of_another_number_of_vertices_are_refused(num_nodes, device):
    # The compiled operations would read beyond their end.
    index, weight, _ = random_mapping(19, 7, 2, device)
    assert map_rows(index, weight, leaf(19, 2, 3, device=device), 19).shape == (7, 2, 3)
    with pytest.raises(ValueError, match=rf"\[19, B, F\] \(got \[{num_nodes}, 2, 3\]\)"):
        map_rows(index, weight, leaf(num_nodes, 2, 3, device=device), 19)


def test_fuse_slots_is_the_mixture_of_the_dense_matrices(device):
    index, weight, dense = random_mapping(7, 5, 3, device)
    prior_index, prior_weight, prior = random_mapping(7, 5, 2, device)
    alpha = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)

    fused_index, fused = fuse_slots(index, weight, prior_index, prior_weight, alpha)
    out = to_dense(ell_rowptr(fused_index), fused_index.flatten(), fused.flatten(), 7)
    expected = reference.fuse(dense, prior, alpha)
    assert_close(out, expected)
    inputs = (weight, prior_weight, alpha)
    for grad, other in zip(grads(out, inputs), grads(expected, inputs), strict=True):
        assert_close(grad, other)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_apply_mapping_compiles_without_graph_breaks(layout, compiled, device):
    check_compiled(compiled(apply_mapping), layout, device)


def test_apply_mapping_compiles_with_inductor(compiled, device):
    check_compiled(compiled(apply_mapping, "inductor"), LAYOUTS["[B, N, F]"], device)


def check_compiled(function, layout, device):
    index, weight, dense = random_mapping(7, 5, 3, device)
    x = leaf(2, 7, 3, device=device)
    out, expected = function(index, weight, layout(x), 7), layout(reference.apply(dense, x))
    assert_close(out, expected)
    for grad, other in zip(grads(out, (weight, x)), grads(expected, (weight, x)), strict=True):
        assert_close(grad, other)
