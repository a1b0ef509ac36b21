import copy
import pickle
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch_geometric.nn import MessagePassing

from pyg_attnpool import Mapping

INDEX = [[2, 0], [1, 1], [3, 2], [0, 3]]  # row 1 names vertex 1 twice
WEIGHT = [[0.5, -1.0], [2.0, 3.0], [0.0, 0.0], [4.0, 0.0]]  # row 2 is empty
DENSE = [[-1, 0, 0.5, 0, 0], [0, 5, 0, 0, 0], [0, 0, 0, 0, 0], [4, 0, 0, 0, 0]]


@pytest.fixture
def mapping(device):
    weight = torch.tensor(WEIGHT, dtype=torch.float64, device=device)
    return Mapping(torch.tensor(INDEX, device=device), weight, num_source=5)


@pytest.fixture
def trained(mapping):
    return Mapping(mapping.index, mapping.weight.requires_grad_(), 5)


@pytest.fixture
def dense(device):
    return torch.tensor(DENSE, dtype=torch.float64, device=device)


def sparse_tensor(matrix):
    module = pytest.importorskip("torch_sparse")
    return module.SparseTensor.from_dense(matrix)


def grads(out, inputs):
    return torch.autograd.grad(out.square().sum(), inputs)


class Pool(MessagePassing):
    r"""A pool as a user of PyG writes it: messages over a weighted bipartite graph."""

    def forward(self, x, adjacency, edge_weight=None, size=None):
        return self.propagate(adjacency, x=(x, None), edge_weight=edge_weight, size=size)

    def message(self, x_j, edge_weight):
        return edge_weight.unsqueeze(-1) * x_j


class FusedPool(Pool):
    def message_and_aggregate(self, adj_t, x):
        return adj_t @ x[0]


# Conversions #########################################################################


def test_attributes(mapping):
    assert (mapping.num_target, mapping.num_source, mapping.k, mapping.nnz) == (4, 5, 2, 4)
    assert mapping.dtype == torch.float64 and mapping.device == mapping.index.device
    assert repr(mapping) == "Mapping(5, 4, k=2)"


def test_nnz_counts_zeros_that_may_become_something_else(trained):
    assert trained.nnz == 7  # eight slots, two of them one entry
    assert trained.detach().nnz == 4


TO = {
    "dense": lambda m: m.to_dense(),
    "csr": lambda m: m.to_torch_csr().to_dense(),
    "scipy": lambda m: torch.from_numpy(m.to_scipy().toarray()),
    "edge_index": lambda m: m.weight.new_zeros(4, 5).index_put(
        tuple(m.to_edge_index()[0].flip(0)), m.to_edge_index()[1], accumulate=True
    ),
    "SparseTensor": lambda m: (
        pytest.importorskip("torch_sparse") and m.to_sparse_tensor().to_dense()
    ),
}


@pytest.mark.parametrize("convert", TO.values(), ids=TO.keys())
def test_conversion_to(convert, mapping, dense):
    assert torch.equal(convert(mapping).to(dense.device), dense)


@pytest.mark.parametrize("name", [name for name in TO if name != "scipy"])
def test_conversion_to_carries_gradients(name, trained, dense):
    out = TO[name](trained)
    assert torch.equal(out, dense)
    cotangent = torch.randn_like(dense)
    (grad,) = torch.autograd.grad(out, trained.weight, cotangent)
    rows = torch.arange(4, device=dense.device).unsqueeze(1)
    assert torch.equal(grad, cotangent[rows, trained.index])  # unused slots included


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_conversion_to_keeps_the_type(dtype, mapping, dense):
    mapping = mapping.to(dtype)
    assert mapping.to_dense().dtype == mapping.to_torch_csr().dtype == dtype
    assert mapping.to_edge_index()[1].dtype == dtype
    matrix = mapping.to_scipy()  # which knows no half precision
    assert matrix.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert np.array_equal(matrix.toarray(), dense.cpu())


def test_entries_are_distinct_and_sorted(mapping):
    edge_index, weight = mapping.to_edge_index()
    assert edge_index.tolist() == [[0, 2, 1, 0], [0, 0, 1, 3]]
    assert weight.tolist() == [-1, 0.5, 5, 4]
    csr = mapping.to_torch_csr()
    assert csr.crow_indices().tolist() == [0, 2, 3, 3, 4]
    assert csr.col_indices().tolist() == [0, 2, 1, 0]
    matrix = mapping.to_scipy()
    assert isinstance(matrix, scipy.sparse.csr_array) and matrix.has_canonical_format


FROM = {
    "dense": lambda m: m,
    "dense, not contiguous": lambda m: m.t().contiguous().t(),
    "COO": lambda m: m.to_sparse_coo(),
    "COO, not coalesced": lambda m: torch.sparse_coo_tensor(
        torch.tensor([[3, 0, 1, 0, 1], [0, 2, 1, 0, 1]], device=m.device),
        torch.tensor([4.0, 0.5, 2.0, -1.0, 3.0], device=m.device).double(),
        m.shape,
    ),
    "CSR": lambda m: m.to_sparse_csr(),
    "CSC": lambda m: m.to_sparse_csc(),
    "SparseTensor": sparse_tensor,
    "scipy csr_array": lambda m: scipy.sparse.csr_array(m.cpu().numpy()),
    "scipy csr_matrix": lambda m: scipy.sparse.csr_matrix(m.cpu().numpy()),
    "scipy coo_array": lambda m: scipy.sparse.coo_array(m.cpu().numpy()),
    "scipy coo_matrix": lambda m: scipy.sparse.coo_matrix(m.cpu().numpy()),
    "scipy csc_array": lambda m: scipy.sparse.csc_array(m.cpu().numpy()),
    "scipy csc_matrix": lambda m: scipy.sparse.csc_matrix(m.cpu().numpy()),
}


@pytest.mark.parametrize("convert", FROM.values(), ids=FROM.keys())
def test_conversion_from(convert, dense):
    mapping = Mapping.from_matrix(convert(dense))
    assert torch.equal(mapping.to_dense().to(dense.device), dense)
    assert (mapping.num_target, mapping.num_source, mapping.k) == (4, 5, 2)
    assert mapping.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support")
@pytest.mark.parametrize("name", ["dense", "COO", "CSR", "CSC", "SparseTensor"])
def test_conversion_from_carries_gradients(name, dense):
    matrix = dense.requires_grad_()
    mapping = Mapping.from_matrix(FROM[name](matrix))
    x = torch.randn(5, 3, dtype=torch.float64, device=dense.device)
    (grad,) = grads(mapping @ x, matrix)
    (expected,) = grads(matrix @ x, matrix)
    assert_close(grad, expected * (dense != 0))  # to the entries that the format holds


def test_conversion_from_mapping_is_the_mapping(mapping):
    assert Mapping.from_matrix(mapping) is mapping


def test_conversion_from_counts_without_values(dense):
    module = pytest.importorskip("torch_sparse")
    row, col = (dense != 0).nonzero(as_tuple=True)
    adjacency = module.SparseTensor(row=row, col=col, sparse_sizes=(4, 5))
    assert torch.equal(Mapping.from_matrix(adjacency).to_dense(), (dense != 0).float())
    counts = scipy.sparse.csr_array((dense.cpu() != 0).int().numpy())
    assert torch.equal(Mapping.from_matrix(counts).to_dense(), (dense.cpu() != 0).float())


def test_conversion_from_an_empty_matrix_keeps_one_slot(device):
    mapping = Mapping.from_matrix(torch.zeros(2, 3, device=device))
    assert mapping.k == 1 and mapping.nnz == 0
    assert torch.equal(mapping @ torch.ones(3, 4, device=device), torch.zeros(2, 4, device=device))


@pytest.mark.parametrize("name", ["CSR", "scipy csr_array", "SparseTensor"])
def test_random_round_trips(name, device):
    index = torch.randint(17, (29, 4), device=device)
    mapping = Mapping(index, torch.randn(29, 4, device=device), 17)
    dense = mapping.to_dense()
    assert torch.equal(Mapping.from_matrix(FROM[name](dense)).to_dense().to(device), dense)


def test_missing_torch_sparse_is_named_with_the_install_line(mapping, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_sparse", None)
    with pytest.raises(ImportError, match="pip install torch_scatter torch_sparse"):
        mapping.to_sparse_tensor()


# Products ############################################################################


def test_product_equals_dense(trained, dense):
    x = torch.randn(3, 5, 7, dtype=torch.float64, device=dense.device, requires_grad=True)
    assert_close(trained @ x, torch.einsum("mn,bnf->bmf", dense, x))
    assert_close(trained @ x[0], dense @ x[0])
    assert gradcheck(lambda w, x: Mapping(trained.index, w, 5) @ x, (trained.weight, x))


def message_edge_index(mapping, x):
    return Pool()(x, *mapping.to_edge_index(), size=(5, 4))


def message_sparse_tensor(mapping, x):
    return Pool()(x, mapping.to_sparse_tensor())


def message_fused(mapping, x):
    return FusedPool()(x, mapping.to_sparse_tensor())


def sparse_tensor_product(mapping, x):
    return mapping.to_sparse_tensor() @ x


def csr_product(mapping, x):
    return mapping.to_torch_csr() @ x


PRODUCTS = [
    message_edge_index,
    message_sparse_tensor,
    message_fused,
    sparse_tensor_product,
    csr_product,
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_of_other_libraries_agree(product, trained):
    if product not in (message_edge_index, csr_product):
        pytest.importorskip("torch_sparse")
    x = torch.randn(5, 7, dtype=torch.float64, device=trained.device, requires_grad=True)
    out, expected = trained @ x, product(trained, x)
    assert_close(out, expected)
    inputs = (trained.weight, x)
    for grad, other in zip(grads(out, inputs), grads(expected, inputs), strict=True):
        assert_close(grad, other)


def test_batched_messages_over_edge_index_agree(trained):
    x = torch.randn(3, 5, 7, dtype=torch.float64, device=trained.device)
    assert_close(message_edge_index(trained, x), trained @ x)


# Operations ##########################################################################


def test_to_casts_weights_only(mapping, dense):
    half = mapping.to(torch.float32)
    assert half.dtype == torch.float32 and half.index.dtype == torch.int64
    assert torch.equal(half.to_dense(), dense.float())
    moved = mapping.to(dense.device)
    assert moved.device == moved.index.device == dense.device


def test_indices_may_be_int32(mapping, dense):
    mapping = Mapping(mapping.index.int(), mapping.weight, 5)
    assert mapping.index.dtype == torch.int64 and torch.equal(mapping.to_dense(), dense)


def test_detach(trained, dense):
    detached = trained.detach()
    assert trained.weight.requires_grad and not detached.weight.requires_grad
    assert torch.equal(detached.to_dense(), dense)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied, mapping, dense):
    other = copied(mapping)
    assert repr(other) == repr(mapping) and torch.equal(other.to_dense(), dense)
    mapping.weight.zero_()
    assert torch.equal(other.to_dense(), dense)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0, -0.5])
def test_fuse_equals_dense(alpha, trained, dense):
    prior = torch.randn(4, 5, dtype=torch.float64, device=dense.device)
    alpha = torch.tensor(alpha, dtype=torch.float64, device=dense.device, requires_grad=True)
    fused = trained.fuse(Mapping.from_matrix(prior), alpha)
    expected = alpha * dense + (1 - alpha) * prior
    assert fused.k == 2 + 5
    assert_close(fused.to_dense(), expected)
    (grad,) = torch.autograd.grad(fused.to_dense().square().sum(), alpha)
    assert_close(grad, (2 * expected * (dense - prior)).sum().detach())
    number = trained.fuse(Mapping.from_matrix(prior), alpha.item())
    assert_close(number.to_dense(), expected)


# Errors ##############################################################################

I22, W22 = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2)

BAD = {
    "index of floats": ((I22.float(), W22, 3), TypeError, r"long tensor \(got torch.float32\)"),
    "index a list": (([[0]], W22, 3), TypeError, r"long tensor \(got list\)"),
    "weight of integers": ((I22, I22, 3), TypeError, r"floating point.*\(got torch.int64\)"),
    "weight an array": ((I22, np.ones((2, 2)), 3), TypeError, r"floating point.*\(got ndarray\)"),
    "shapes": ((I22, W22[:, :1], 3), ValueError, r"\(got \[2, 2\] and \[2, 1\]\)"),
    "one dimension": ((I22[0], W22[0], 3), ValueError, r"\(got \[2\] and \[2\]\)"),
    "too high": ((I22 + 3, W22, 3), ValueError, r"from 0 to 2 \(got 3 to 3\)"),
    "too low": ((I22 - 1, W22, 3), ValueError, r"from 0 to 2 \(got -1 to -1\)"),
    "no source": ((I22, W22, 0), ValueError, r"at least one .*num_source=0"),
    "no slots": ((I22[:, :0], W22[:, :0], 3), ValueError, r"at least one .*\[2, 0\]"),
    "NaN": ((I22, W22 * float("nan"), 3), ValueError, r"finite weights"),
    "infinity": ((I22, W22 / 0, 3), ValueError, r"finite weights"),
}


@pytest.mark.parametrize("args,error,match", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(args, error, match):
    with pytest.raises(error, match=match):
        Mapping(*args)


BAD_MATRIX = {
    "list": ([[1.0]], TypeError, r"\(got list\)"),
    "array": (np.ones((2, 3)), TypeError, r"\(got ndarray\)"),
    "integers": (torch.ones(2, 3).long(), TypeError, r"\(got torch.int64\)"),
    "vector": (torch.ones(3), ValueError, r"\(got \[3\]\)"),
    "batch": (torch.ones(2, 3, 4), ValueError, r"\(got \[2, 3, 4\]\)"),
    "no rows": (torch.ones(0, 3), ValueError, r"\(got \[0, 3\]\)"),
    "scipy vector": (scipy.sparse.coo_array(np.ones(3)), ValueError, r"\(got \[3\]\)"),
    "scipy complex": (scipy.sparse.csr_array(np.eye(2) * 1j), TypeError, r"got torch.complex128"),
    "NaN": (torch.full((2, 2), float("nan")), ValueError, "finite weights"),
}


@pytest.mark.parametrize("matrix,error,match", BAD_MATRIX.values(), ids=BAD_MATRIX.keys())
def test_bad_matrices_are_named(matrix, error, match):
    if match == r"\(got \[3\]\)" and matrix.ndim == 2:
        pytest.skip("earlier versions of SciPy have no vectors")
    with pytest.raises(error, match=match):
        Mapping.from_matrix(matrix)


@pytest.mark.parametrize("size", [(4, 2), (5,), (2, 4, 3), (1, 1, 5, 3)], ids=str)
def test_features_of_another_size_are_refused(size, mapping):
    with pytest.raises(ValueError, match=r"\[5, F\] or \[B, 5, F\]") as error:
        mapping @ torch.ones(size, device=mapping.device)
    assert f"(got {list(size)})" in str(error.value)


def test_fuse_with_another_size_is_refused(mapping):
    other = Mapping.from_matrix(torch.ones(3, 5, device=mapping.device))
    with pytest.raises(ValueError, match=r"from 5 to 4 vertices \(got 5 to 3\)"):
        mapping.fuse(other, 0.5)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize(
    "use",
    ["to_dense", "to_edge_index", "to_scipy", "to_torch_csr", "entries", "to_select_output"],
)
def test_an_index_that_was_edited_is_refused(bad, use):
    mapping = Mapping(torch.tensor([[0, 1], [2, 2]]), torch.ones(2, 2), 3)
    mapping @ torch.ones(3, 1)
    mapping.index[1, 0] = bad
    with pytest.raises(ValueError, match="source vertices from 0 to 2"):
        getattr(mapping, use)()
    with pytest.raises(ValueError, match="source vertices from 0 to 2"):
        mapping @ torch.ones(3, 1)
    mapping.index[1, 0] = 2
    assert (mapping @ torch.ones(3, 1)).flatten().tolist() == [2, 2]


@pytest.mark.parametrize("rowptr", [[0, 5, 2, 3], [0, 1, 2**40, 3], [0, -5, 2, 3], [0, 1, 2, 2]])
def test_row_pointers_of_a_sparse_tensor_are_looked_at(rowptr):
    sparse = pytest.importorskip("torch_sparse")
    matrix = sparse.SparseTensor(
        rowptr=torch.tensor(rowptr),
        col=torch.tensor([0, 1, 2]),
        value=torch.ones(3),
        sparse_sizes=(3, 3),
        is_sorted=True,  # torch_sparse itself dies of them otherwise
        trust_data=True,
    )
    with pytest.raises(ValueError, match="row pointers that ascend from 0 to 3"):
        Mapping.from_matrix(matrix)


def test_sizes_that_are_none():
    index, weight = torch.tensor([[0, 1], [2, 2]]), torch.ones(2, 2)
    for size in (3.7, "3", None):
        with pytest.raises(TypeError, match="'num_source' to be an integer"):
            Mapping(index, weight, size)
    for size in (2**62, 2**70):  # whose pairs no long integer counts
        with pytest.raises(ValueError, match="less than 2..63 pairs"):
            Mapping(index, weight, size)
    mapping = Mapping(index, weight, np.int64(3))
    assert len(mapping.entries(np.int64(2))[0]) == 2 * mapping.nnz
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="positive 'batch_size'"):
            mapping.entries(batch_size)
    for batch_size in (1.5, True):
        with pytest.raises(TypeError, match="integer 'batch_size'"):
            mapping.entries(batch_size)
    with pytest.raises(ValueError, match="one 'alpha'"):
        mapping.fuse(mapping, torch.ones(2))
    with pytest.raises(TypeError, match="a Mapping to fuse with"):
        mapping.fuse(3, 0.5)
