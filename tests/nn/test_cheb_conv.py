import copy

import pytest
import torch
from torch.testing import assert_close
from torch_geometric.nn import ChebConv
from torch_geometric.utils import to_undirected

from pyg_attnpool import StaticChebConv
from pyg_attnpool.ops import reference

N = 19
WIDTHS = {"narrower out (Clenshaw)": (7, 3), "wider out": (3, 7), "same": (5, 5)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def random_graph(device="cpu"):
    r"""Undirected, with vertices 17 and 18 isolated."""
    return to_undirected(torch.randint(17, (2, 30))).to(device)


def pair(in_channels, out_channels, K, device, bias=True):
    r"""Our layer and PyG's, with different parameters."""
    edge_index = random_graph(device)
    ours = StaticChebConv(in_channels, out_channels, K, edge_index, N, bias).to(device)
    theirs = ChebConv(in_channels, out_channels, K, normalization="sym", bias=bias).to(device)
    if bias:
        torch.nn.init.normal_(theirs.bias)

    def run(x):
        return theirs(x, edge_index, lambda_max=2.0)

    return ours, theirs, run


def grads(out, inputs, cotangent):
    return torch.autograd.grad(out, inputs, cotangent)


def assert_same(ours, theirs, run, x):
    out, expected = ours(x), run(x)
    assert_close(out, expected, **TOLERANCE)
    cotangent = torch.randn_like(out)
    names = [name for name, _ in theirs.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()]
    found = grads(out, (x, *ours.parameters()), cotangent)
    wanted = grads(expected, (x, *theirs.parameters()), cotangent)
    for name, grad, other in zip(("x", *names), found, wanted, strict=True):
        scale = other.abs().max()
        assert scale > 0
        assert_close(grad / scale, other / scale, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)


@pytest.mark.parametrize("K", [1, 2, 3, 6])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_layer_of_pyg(widths, K, bias, device):
    ours, theirs, run = pair(*widths, K, device, bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, N, widths[0], device=device, requires_grad=True)
    assert_same(ours, theirs, run, x)
    assert_close(ours(x[0]), run(x[0]), **TOLERANCE)
    assert_close(ours(x.flatten(0, 1)), run(x).flatten(0, 1), **TOLERANCE)


def test_state_dict_loads_both_ways(device):
    ours, theirs, run = pair(4, 6, 3, device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, N, 4, device=device, requires_grad=True)
    assert_same(ours, theirs, run, x)
    ours, theirs, run = pair(4, 6, 3, device)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, run, x)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_equals_dense_polynomial_in_float64(widths, device):
    edge_index = random_graph(device)
    adjacency = torch.zeros(N, N, dtype=torch.float64, device=device)
    adjacency[tuple(edge_index)] = 1
    adjacency.fill_diagonal_(0)  # self loops do not count
    scale = adjacency.sum(dim=1).clamp(min=1).pow(-0.5)  # isolated vertices have no entries
    laplacian = -scale[:, None] * adjacency * scale

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layer = StaticChebConv(*widths, 5, edge_index, N, bias=False).to(device)
    finally:
        torch.set_default_dtype(default)
    x = torch.randn(2, N, widths[0], dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.stack([lin.weight.t() for lin in layer.lins])
    out, expected = layer(x), reference.chebyshev(laplacian, weight, x)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    inputs = (x, *layer.parameters())
    for grad, other in zip(
        grads(out, inputs, cotangent), grads(expected, inputs, cotangent), strict=True
    ):
        assert_close(grad, other)


def test_repeated_edges_and_self_loops_count_as_in_pyg(device):
    one_way = torch.tensor([[0, 1, 1, 3, 2], [1, 2, 2, 3, 4]], device=device)
    edge_index = torch.cat([one_way, one_way.flip(0)], dim=1)
    ours = StaticChebConv(3, 4, 4, edge_index, 6).to(device)
    theirs = ChebConv(3, 4, 4).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 3, device=device)
    assert_close(ours(x), theirs(x, edge_index, lambda_max=2.0), **TOLERANCE)


def test_no_edges_at_all(device):
    edge_index = torch.empty(2, 0, dtype=torch.long, device=device)
    layer = StaticChebConv(3, 4, 3, edge_index, 5).to(device)
    x = torch.randn(2, 5, 3, device=device)
    # T_0 = 1, T_1(0) = 0, T_2(0) = -1
    weight = (layer.lins[0].weight - layer.lins[2].weight).t()
    assert_close(layer(x), x @ weight + layer.bias)


def test_reset_parameters_is_that_of_pyg():
    ours, theirs, _ = pair(4, 6, 3, "cpu")
    for layer in (ours, theirs):
        torch.manual_seed(5)
        layer.reset_parameters()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_graph_survives_copy_and_cast(device):
    layer, *_ = pair(4, 6, 3, device)
    x = torch.randn(2, N, 4, device=device)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    double = layer.to(torch.float64)
    assert_close(double(x.double()).float(), expected, **TOLERANCE)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_bfloat16_autocast_is_close_to_float32(widths, device):
    layer, *_ = pair(*widths, 6, device)
    x = torch.randn(2, N, widths[0], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    expected = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_compiles_without_graph_breaks(widths, K, compiled, device):
    ours, theirs, run = pair(*widths, K, device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, N, widths[0], device=device, requires_grad=True)
    out, expected = compiled(ours)(x), run(x)
    assert_close(out, expected, **TOLERANCE)
    cotangent = torch.randn_like(out)
    found = grads(out, (x, *ours.parameters()), cotangent)
    wanted = grads(expected, (x, *theirs.parameters()), cotangent)
    for grad, other in zip(found, wanted, strict=True):
        scale = other.abs().max()
        assert_close(grad / scale, other / scale, **TOLERANCE)


EDGES = torch.tensor([[0, 1], [1, 0]])
BAD = {
    "K": ((0, EDGES), r"at least 1 \(got 0\)"),
    "float": ((2, EDGES.float()), r"long tensor of shape \[2, E\] \(got torch.float32"),
    "shape": ((2, EDGES[0]), r"\[2, E\] \(got torch.int64 of shape \[2\]\)"),
    "transposed": ((2, torch.zeros(5, 2).long()), r"of shape \[5, 2\]"),
    "too high": ((2, EDGES + 4), r"from 0 to 4 in 'edge_index' \(got 4 to 5\)"),
    "negative": ((2, EDGES - 1), r"from 0 to 4 in 'edge_index' \(got -1 to 0\)"),
    "directed": ((2, EDGES[:, :1]), "undirected"),
    "directed, repeated": ((2, EDGES[:, [0, 0, 1]]), "undirected"),
}


@pytest.mark.parametrize("args,match", BAD.values(), ids=BAD.keys())
def test_bad_graphs_are_named(args, match):
    with pytest.raises(ValueError, match=match):
        StaticChebConv(3, 4, *args, num_nodes=5)


def test_bad_features_are_named():
    layer = StaticChebConv(3, 4, 2, EDGES, num_nodes=5)
    assert repr(layer) == "StaticChebConv(3, 4, K=2, num_nodes=5)"
    with pytest.raises(ValueError, match=r"3 input channels \(got \[5, 4\]\)"):
        layer(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\[B, 5, F\].*\(got \[2, 4, 3\]\)"):
        layer(torch.zeros(2, 4, 3))
