import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv
from torch_geometric.utils import to_dense_adj

from pyg_attnpool import AttentionPool, Mapping

INDEX = [[2, 0], [1, 1], [3, 2], [0, 3]]  # row 1 names vertex 1 twice
WEIGHT = [[0.5, -1.0], [2.0, 3.0], [0.0, 0.0], [4.0, 0.0]]  # row 2 is empty
EDGES = [[0, 1, 1, 4, 2, 2, 1], [1, 0, 0, 2, 2, 3, 1]]  # 1 -> 0 twice, loops at 1 and 2
EDGE_WEIGHT = [1.0, 2.0, 0.5, 7.0, -3.0, 1.5, 0.25]


@pytest.fixture
def mapping(device):
    weight = torch.tensor(WEIGHT, dtype=torch.float64, device=device)
    return Mapping(torch.tensor(INDEX, device=device), weight, num_source=5)


@pytest.fixture
def edge_index(device):
    return torch.tensor(EDGES, device=device)


@pytest.fixture
def edge_weight(device):
    return torch.tensor(EDGE_WEIGHT, dtype=torch.float64, device=device)


def adjacency(edge_index, edge_weight, num_nodes):
    r"""The dense matrix; repeated edges add."""
    return to_dense_adj(edge_index, edge_attr=edge_weight, max_num_nodes=num_nodes).squeeze(0)


def random_graph(num_target, num_source, k, num_edges, dtype, device="cpu"):
    index = torch.randint(num_source, (num_target, k), device=device)
    weight = torch.randn(num_target, k, dtype=dtype, device=device)
    edge_index = torch.randint(num_source, (2, num_edges), device=device)
    edge_weight = torch.randn(num_edges, dtype=dtype, device=device)
    return Mapping(index, weight, num_source), edge_index, edge_weight


def assert_sorted_without_duplicates(edge_index, num_nodes):
    flat = edge_index[0] * num_nodes + edge_index[1]
    assert (flat.diff() > 0).all()


def test_literal_table(device):
    # Vertex 0 of the target joins 0 and 1, vertex 1 is 2: the edge 0 - 1 becomes a loop.
    index = torch.tensor([[0, 1], [2, 2]], device=device)
    mapping = Mapping(index, torch.tensor([[0.5, 0.5], [1.0, 0.0]], device=device), 3)
    edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]], device=device)

    pooled, weight = mapping.pool_edges(edge_index)
    assert pooled.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert weight.tolist() == [0.5, 0.5, 0.5]

    pooled, weight = mapping.pool_edges(edge_index, remove_self_loops=True)
    assert pooled.tolist() == [[0, 1], [1, 0]]
    assert weight.tolist() == [0.5, 0.5]


def test_equals_the_dense_formula(mapping, edge_index, edge_weight):
    dense = mapping.to_dense()
    wanted = dense @ adjacency(edge_index, edge_weight, 5) @ dense.t()

    pooled, weight = mapping.pool_edges(edge_index, edge_weight)
    assert_close(adjacency(pooled, weight, 4), wanted)
    assert_sorted_without_duplicates(pooled, 4)
    assert not (pooled == 2).any()  # the empty row has no edges

    pooled, weight = mapping.pool_edges(edge_index, edge_weight, remove_self_loops=True)
    assert_close(adjacency(pooled, weight, 4), wanted - wanted.diag().diag())
    assert (pooled[0] != pooled[1]).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 17, 2, 50), (17, 3, 5, 6), (20, 33, 7, 131)])
def test_odd_sizes_and_gradients_equal_the_dense_formula(device, sizes):
    mapping, edge_index, edge_weight = random_graph(*sizes, torch.float64, device)
    inputs = (mapping.weight.requires_grad_(), edge_weight.requires_grad_())
    dense = mapping.to_dense()
    wanted = dense @ adjacency(edge_index, edge_weight, sizes[1]) @ dense.t()
    pooled, weight = mapping.pool_edges(edge_index, edge_weight)
    found = adjacency(pooled, weight, sizes[0])
    assert_close(found, wanted)
    assert_sorted_without_duplicates(pooled, sizes[0])

    head = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad((found * head).sum(), inputs),
        torch.autograd.grad((wanted * head).sum(), inputs),
        strict=True,
    ):
        assert_close(a, b)


def test_gradcheck(device):
    mapping, edge_index, edge_weight = random_graph(3, 5, 2, 7, torch.float64, device)

    def pool(weight, edge_weight):
        return Mapping(mapping.index, weight, 5).pool_edges(edge_index, edge_weight)[1]

    inputs = (mapping.weight.requires_grad_(), edge_weight.requires_grad_())
    assert gradcheck(pool, inputs)
    assert gradgradcheck(pool, inputs)


def test_trained_zeros_keep_their_entries_and_gradients(mapping, edge_index, edge_weight):
    trained = Mapping(mapping.index, mapping.weight.requires_grad_(), 5)
    dense = trained.to_dense()
    pooled, weight = trained.pool_edges(edge_index, edge_weight)
    found = adjacency(pooled, weight, 4)
    wanted = dense @ adjacency(edge_index, edge_weight, 5) @ dense.t()
    assert_close(found, wanted)
    head = torch.randn_like(wanted)
    (a,) = torch.autograd.grad((found * head).sum(), mapping.weight)
    (b,) = torch.autograd.grad((wanted * head).sum(), mapping.weight)
    assert (a[2] != 0).all()  # the row that is empty so far
    assert_close(a, b)


def test_direction_of_edges_is_kept(device):
    mapping = Mapping(torch.tensor([[0], [1]], device=device), torch.ones(2, 1, device=device), 2)
    pooled, _ = mapping.pool_edges(torch.tensor([[0], [1]], device=device))
    assert pooled.tolist() == [[0], [1]]


def test_types(mapping, edge_index, edge_weight):
    wanted = mapping.pool_edges(edge_index, edge_weight)[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = mapping.pool_edges(edge_index, edge_weight.to(dtype))[1]
        assert found.dtype == dtype
        assert_close(found.double(), wanted, rtol=0.05, atol=0.05)
    assert mapping.pool_edges(edge_index)[1].dtype == torch.float64
    assert mapping.to(torch.float32).pool_edges(edge_index)[1].dtype == torch.float32
    assert_close(mapping.pool_edges(edge_index.int(), edge_weight)[1], wanted)
    assert_close(mapping.pool_edges(EdgeIndex(edge_index), edge_weight)[1], wanted)


def test_non_contiguous_edges(mapping, edge_index, edge_weight):
    strided = torch.stack([edge_index, edge_index], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    found = mapping.pool_edges(strided, torch.stack([edge_weight, edge_weight], dim=-1)[:, 0])
    for a, b in zip(found, mapping.pool_edges(edge_index, edge_weight), strict=True):
        assert_close(a, b)


def test_no_edges_give_none(mapping):
    pooled, weight = mapping.pool_edges(torch.empty(2, 0, dtype=torch.long, device=mapping.device))
    assert pooled.shape == (2, 0) and pooled.dtype == torch.long
    assert weight.shape == (0,) and weight.dtype == torch.float64


def test_a_mini_batch_equals_its_graphs(device):
    mapping, first, first_weight = random_graph(4, 9, 3, 20, torch.float64, device)
    _, second, second_weight = random_graph(4, 9, 3, 11, torch.float64, device)
    pooled, weight = mapping.pool_edges(
        torch.cat([first, second + 9], dim=1),
        torch.cat([first_weight, second_weight]),
        batch_size=2,
    )
    a, a_weight = mapping.pool_edges(first, first_weight)
    b, b_weight = mapping.pool_edges(second, second_weight)
    assert torch.equal(pooled, torch.cat([a, b + 4], dim=1))
    assert_close(weight, torch.cat([a_weight, b_weight]))


def test_nothing_dense_is_made():
    # A dense matrix of the source vertices would have 10^10 entries.
    size = 100_000
    nodes = torch.arange(size)
    ring = torch.stack([nodes, (nodes + 1) % size])
    mapping = Mapping(nodes.view(-1, 2), torch.ones(size // 2, 2, requires_grad=True), size)
    pooled, weight = mapping.pool_edges(ring)
    assert pooled.shape == (2, size)  # a loop and an edge per target vertex
    weight.sum().backward()
    assert_close(mapping.weight.grad, torch.full((size // 2, 2), 2.0))  # one edge in, one out


def test_the_next_convolution_trains_the_pooling(device):
    r"""A graph without a mesh: the coarse graph is the pooled one."""
    edge_index = torch.randint(12, (2, 40), device=device)
    pool = AttentionPool(12, 5, k=3, init="normal").to(device)
    conv = GCNConv(2, 2).to(device)
    x = torch.randn(12, 2, device=device)

    mapping = pool.mapping()
    pooled, weight = mapping.pool_edges(edge_index, remove_self_loops=True)
    # The features stand for themselves, so that gradients come through the edges alone.
    conv((mapping @ x).detach(), pooled, weight.abs()).square().sum().backward()
    assert pool.key.grad.isfinite().all() and pool.key.grad.abs().max() > 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda e, w: (e[0], w), ValueError, r"shape \[2, E\] \(got \[7\]\)"),
        (lambda e, w: (e.t(), w), ValueError, r"shape \[2, E\] \(got \[7, 2\]\)"),
        (lambda e, w: (e.double(), w), TypeError, r"long tensor \(got torch.float64\)"),
        (lambda e, w: (e, w.long()), TypeError, r"floating point tensor \(got torch.int64\)"),
        (lambda e, w: (e, w[:3]), ValueError, r"shape \[7\] \(got \[3\]\)"),
        (lambda e, w: (e, w.unsqueeze(1)), ValueError, r"shape \[7\] \(got \[7, 1\]\)"),
        (lambda e, w: (e + 1, w), ValueError, r"0 to 4 \(got 1 to 5\)"),
        (lambda e, w: (e - 1, w), ValueError, r"0 to 4 \(got -1 to 3\)"),
    ],
)
def test_errors(mapping, edge_index, edge_weight, change, error, message):
    with pytest.raises(error, match=message):
        mapping.pool_edges(*change(edge_index, edge_weight))
