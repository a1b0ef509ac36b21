r"""The GPU kernels, on CUDA where there is one. Elsewhere Triton interprets them on the CPU, in a
process of their own: the interpreter must be chosen before anything imports Triton."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool.ops import reference

ops = pytest.importorskip("pyg_attnpool.ops._triton", reason="Triton is not installed")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# name: (rowptr, col, number of columns)
PATTERNS = {
    "plain": ([0, 2, 3, 6], [0, 3, 2, 1, 2, 4], 5),
    "empty rows": ([0, 0, 2, 2, 5, 5], [1, 0, 2, 0, 1], 3),
    "repeated, unsorted": ([0, 3, 7], [2, 0, 2, 1, 1, 0, 1], 3),
    "single": ([0, 1], [0], 1),
    "no entries": ([0, 0, 0], [], 4),
    "no rows": ([0], [], 4),
    "long rows": ([0, 37, 38, 70], [(7 * e) % 11 for e in range(70)], 11),
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "cpu"])
def device(request):
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("run by test_kernels_in_the_interpreter")
    return torch.device(request.param)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels are run directly")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", "3.7", reason="older interpreters fail with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


# Sparse products #####################################################################


@pytest.fixture(params=PATTERNS.values(), ids=PATTERNS.keys())
def pattern(request, device):
    rowptr, col, num_cols = request.param
    rowptr = torch.tensor(rowptr, device=device)
    return rowptr, torch.tensor(col, dtype=torch.long, device=device), num_cols


def rows_of(rowptr, col):
    return torch.repeat_interleave(rowptr.diff(), output_size=col.numel())


def dense_spmm(rowptr, col, value, x):
    dense = x.new_zeros(rowptr.numel() - 1, x.size(0), dtype=torch.float64)
    dense.index_put_((rows_of(rowptr, col), col), value.double(), accumulate=True)
    return dense @ x.double()


def dense_sddmm(rowptr, col, a, b):
    return (a.double() @ b.double().t())[rows_of(rowptr, col), col]


@pytest.mark.parametrize("channels", [1, 3, 33, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_spmm_equals_dense_product(pattern, dtype, channels, device):
    rowptr, col, num_cols = pattern
    value = torch.randn(col.numel(), device=device).to(dtype)
    x = torch.randn(num_cols, channels, device=device).to(dtype)
    out = ops.spmm(rowptr, col, value, x)
    assert out.dtype == dtype
    assert_close(out.double(), dense_spmm(rowptr, col, value, x), **TOLERANCE[dtype])


@pytest.mark.parametrize("channels", [1, 3, 33, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sddmm_equals_entries_of_dense_product(pattern, dtype, channels, device):
    rowptr, col, num_cols = pattern
    a = torch.randn(rowptr.numel() - 1, channels, device=device).to(dtype)
    b = torch.randn(num_cols, channels, device=device).to(dtype)
    out = ops.sddmm(rowptr, col, a, b)
    assert out.dtype == dtype
    assert_close(out.double(), dense_sddmm(rowptr, col, a, b), **TOLERANCE[dtype])


def test_sparse_products_without_channels(pattern, device):
    rowptr, col, num_cols = pattern
    a, b = torch.ones(rowptr.numel() - 1, 0, device=device), torch.ones(num_cols, 0, device=device)
    assert ops.spmm(rowptr, col, torch.ones(col.numel(), device=device), b).shape == a.shape
    assert torch.equal(ops.sddmm(rowptr, col, a, b), torch.zeros(col.numel(), device=device))


def test_sparse_products_of_non_contiguous_inputs(device):
    rowptr, col, num_cols = PATTERNS["plain"]
    rowptr, col = torch.tensor(rowptr, device=device), torch.tensor(col, device=device)
    value = torch.randn(col.numel(), 2, device=device)[:, 1]
    a, b = torch.randn(3, 6, device=device)[:, ::2], torch.randn(3, num_cols, device=device).t()
    assert_close(ops.spmm(rowptr, col, value, b).double(), dense_spmm(rowptr, col, value, b))
    assert_close(ops.sddmm(rowptr, col, a, b).double(), dense_sddmm(rowptr, col, a, b))


def test_half_precision_is_accumulated_in_single(device):
    # In bfloat16, 256 + 1 is 256: the ones would be lost one by one.
    rowptr, col = torch.tensor([0, 65], device=device), torch.arange(65, device=device)
    x = torch.ones(65, 1, device=device, dtype=torch.bfloat16)
    x[0] = 256
    assert ops.spmm(rowptr, col, torch.ones_like(x[:, 0]), x).item() == 320
    single = torch.tensor([0, 1], device=device), torch.tensor([0], device=device)
    assert ops.sddmm(*single, torch.ones_like(x.t()), x.t()).item() == 320


# Search ##############################################################################


def unit_rows(*size, device, dtype=torch.float64):
    rows = torch.randn(*size, device=device, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


# number of queries, keys, channels, k
SIZES = [
    (1, 1, 1, 1),
    (7, 5, 3, 2),  # fewer keys than in a tile
    (17, 70, 5, 1),
    (18, 29, 21, 29),  # all keys
    (18, 33, 21, 32),  # more than the first tile has
    (40, 101, 8, 5),
    (3, 1030, 21, 3),  # keys in several parts
    (5, 40, 50, 4),  # more channels than multiplied at a time
    (17, 150, 21, 33),  # lists of several warps
    (4, 300, 21, 130),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_topk_equals_reference(sizes, device):
    num_query, num_key, channels, k = sizes
    query, key = (
        unit_rows(num_query, channels, device=device),
        unit_rows(num_key, channels, device=device),
    )
    score, index = ops.topk(query, key, k)
    expected, expected_index = reference.cosine_topk(query, key, k)
    assert index.dtype == torch.long and score.is_contiguous() and index.is_contiguous()
    assert torch.equal(index, expected_index)
    assert_close(score, expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_topk_in_single_precision(sizes, device):
    # Scores are sums of few powers of two and so exact, with many ties.
    num_query, num_key, channels, k = sizes
    query = torch.randint(-2, 3, (num_query, channels), device=device).float() / 2
    key = torch.randint(-2, 3, (num_key, channels), device=device).float() / 2
    score, index = ops.topk(query, key, k)
    expected = (query.double() @ key.double().t()).sort(dim=1, descending=True, stable=True)
    assert score.dtype == torch.float32
    assert torch.equal(score.double(), expected.values[:, :k])
    assert torch.equal(index, expected.indices[:, :k])


def test_topk_is_exact_beyond_tf32(device):
    # Neighbours that differ in the 20th bit, in an order that TF32 cannot see.
    key = torch.ones(64, 1, device=device) + torch.arange(64, device=device)[:, None] * 2**-20
    _, index = ops.topk(torch.ones(16, 1, device=device), key, 4)
    assert index.tolist() == [[63, 62, 61, 60]] * 16


@pytest.mark.parametrize("ascending", [True, False])
def test_topk_of_sorted_keys(ascending, device):
    # Every key better than all before it, or worse.
    key = torch.arange(150.0, device=device)[:, None] * (1 if ascending else -1)
    score, index = ops.topk(torch.ones(3, 1, device=device), key, 40)
    expected = list(range(149, 109, -1)) if ascending else list(range(40))
    assert index.tolist() == [expected] * 3
    assert torch.equal(score, key[index, 0])


@pytest.mark.parametrize("num_key,k", [(5, 5), (70, 1), (70, 33), (1030, 3)])
def test_equal_scores_go_to_the_lower_index(num_key, k, device):
    query = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]], device=device)
    same = torch.tensor([[0.6, 0.8]], device=device).expand(num_key, 2)  # also not contiguous
    signed = torch.zeros(num_key, 2, device=device)
    signed[::2] *= -1  # zeros of either sign
    for key in (same, signed):
        assert ops.topk(query, key, k)[1].tolist() == [list(range(k))] * 3


def test_duplicate_keys_are_listed_together(device):
    # Products of these are exact: the interpreter's depend on the place of a key in its tile.
    key, query = (torch.randint(-99, 100, (n, 21), device=device) / 2048 for n in (50, 20))
    score, index = ops.topk(query, key.repeat(3, 1), 12)  # copies 50 apart, in different tiles
    assert torch.equal(
        index.view(20, 4, 3) % 50, ops.topk(query, key, 4)[1][:, :, None].expand(-1, -1, 3)
    )
    assert torch.equal(index.view(20, 4, 3) // 50, torch.arange(3, device=device).expand(20, 4, 3))
    assert torch.equal(score[:, ::3], score[:, 2::3])


@pytest.mark.parametrize("num_query,k", [(0, 3), (5, 0)])
def test_topk_of_nothing(num_query, k, device):
    query, key = torch.ones(num_query, 2, device=device), torch.ones(4, 2, device=device)
    score, index = ops.topk(query, key, k)
    assert score.shape == index.shape == (num_query, k)


def test_scores_that_are_no_numbers_keep_the_indices_valid(device):
    query = torch.full((2, 3), float("nan"), device=device)
    for num_key, k in [(40, 32), (40, 3), (1030, 3)]:
        _, index = ops.topk(query, torch.ones(num_key, 3, device=device), k)
        assert index.min() >= 0 and index.max() < num_key


# pool, unpool, several warps, and keys in parts of which the last has fewer than k
MESH_SIZES = [(1256, 5023, 21, 2), (5023, 1256, 21, 32), (3001, 4999, 21, 128), (1, 64257, 21, 8)]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA")
@pytest.mark.parametrize("sizes", MESH_SIZES, ids=str)
def test_topk_at_the_sizes_of_meshes(sizes, device):
    num_query, num_key, channels, k = sizes
    query = unit_rows(num_query, channels, device=device, dtype=torch.float32)
    key = unit_rows(num_key, channels, device=device, dtype=torch.float32)
    score, index = ops.topk(query, key, k)
    exact = query.double() @ key.double().t()
    best = exact.sort(dim=1, descending=True).values[:, :k]
    assert_close(score.double(), best, rtol=0, atol=1e-6)
    assert_close(exact.gather(1, index), best, rtol=0, atol=1e-6)
    again = ops.topk(query, key, k)
    assert torch.equal(score, again[0]) and torch.equal(index, again[1])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA")
def test_topk_holds_no_matrix_of_scores(device):
    query, key = torch.ones(20000, 21, device=device), torch.ones(5000, 21, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.topk(query, key, 4)
    assert torch.cuda.max_memory_allocated() - before < 20000 * 5000 * 4 / 50
