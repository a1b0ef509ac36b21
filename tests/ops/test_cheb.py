r"""The Chebyshev convolution against its dense formula, output and all gradients."""

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import StaticChebConv
from pyg_attnpool.ops import reference
from pyg_attnpool.ops.cheb import cheb_conv
from tests.ops.checks import opcheck
from tests.ops.convolutions import (
    LAYOUTS,
    ConvolutionTests,
    assert_layer,
    assert_same,
    inputs_of,
    leaf,
)


class Cheb:
    r"""A random symmetric matrix of norm one. Vertices 1 and the last have no neighbours."""

    def __init__(self, num_nodes, length, device="cpu"):
        dense = torch.randn(num_nodes, num_nodes, dtype=torch.float64)
        dense *= torch.rand(num_nodes, num_nodes) < min(1.0, 4 / num_nodes)
        dense = dense + dense.t()
        dense[[min(1, num_nodes - 1), -1]] = 0
        dense[:, [min(1, num_nodes - 1), -1]] = 0
        norm = torch.linalg.matrix_norm(dense, 2)
        self.dense = (dense / norm.clamp(min=1e-9)).to(device)
        row, col = self.dense.nonzero(as_tuple=True)
        rowptr = torch.searchsorted(row, torch.arange(num_nodes + 1, device=device))
        self.pattern = rowptr, col, self.dense[row, col]

    def __call__(self, x, weight, bias):
        return cheb_conv(self.pattern, x, weight, bias)

    def reference(self, x, weight, bias):
        x = x.transpose(0, 1)
        if weight.size(0) == 1:  # the reference forms T_1 in any case
            out = x @ weight[0]
        else:
            out = reference.chebyshev(self.dense.to(x.dtype), weight, x)
        return (out if bias is None else out + bias).transpose(0, 1)


class TestChebConv(ConvolutionTests):
    conv = Cheb


def test_nothing_is_connected(device):
    conv = Cheb(7, 3, device)
    none = torch.empty(0, dtype=torch.long, device=device)
    conv.dense = torch.zeros_like(conv.dense)
    conv.pattern = torch.zeros(8, dtype=torch.long, device=device), none, none.double()
    for channels, out_channels in [(3, 5), (5, 3)]:
        inputs = inputs_of(7, 2, channels, out_channels, 3, device=device)
        assert_same(conv, inputs)
        x, weight, bias = inputs
        # T_0 = 1, T_1(0) = 0, T_2(0) = -1
        assert_close(conv(*inputs), x @ (weight[0] - weight[2]) + bias)


def test_literal():
    # Two vertices, swapped by the matrix: T_0 and T_2 leave them, T_1 and T_3 swap them.
    pattern = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)
    x = torch.tensor([[[1.0, 10.0]], [[2.0, 20.0]]])
    weight = torch.tensor([[[1.0], [0]], [[0], [1.0]], [[100.0], [0]], [[0], [1000.0]]])
    out = cheb_conv(pattern, x, weight, torch.tensor([0.5]))
    assert out.flatten().tolist() == [1 + 20 + 100 + 20000 + 0.5, 2 + 10 + 200 + 10000 + 0.5]
    wide = cheb_conv(pattern, x, weight.expand(4, 2, 3), None)
    assert wide[:, 0].tolist() == [[20121.0] * 3, [10212.0] * 3]


def test_chebyshev_of_an_eigenvector_is_the_polynomial(device):
    # T_k(cos t) = cos k t
    conv = Cheb(11, 9, device)
    values, vectors = torch.linalg.eigh(conv.dense)
    for channels in (1, 2):  # Clenshaw's algorithm, too
        for value, vector in zip(values.clamp(-1, 1), vectors.t(), strict=True):
            weight = leaf(9, channels, 1, device=device)
            angle = torch.arange(9, device=device) * value.acos()
            x = torch.outer(vector, torch.arange(1.0, channels + 1, device=device).double())
            out = cheb_conv(conv.pattern, x.unsqueeze(1), weight, None)
            factor = (angle.cos() @ weight.squeeze(2)) @ x.new_tensor([1.0, 2.0])[:channels]
            assert_close(out.flatten(), vector * factor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [(3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(dtype, channels, device):
    rowptr, col, value = Cheb(7, 3, device).pattern
    pattern = rowptr, col, value.to(dtype)
    x, weight, bias = inputs_of(7, 2, *channels, 3, device=device, dtype=dtype)
    g = leaf(7, 2, channels[1], device=device, dtype=dtype)
    ops = torch.ops.pyg_attnpool
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.5}
    opcheck(ops.cheb_conv, (*pattern, x, weight, bias), **tolerance)
    batch_first = LAYOUTS["batch first"](x).requires_grad_()
    opcheck(ops.cheb_conv, (*pattern, batch_first, weight, None), **tolerance)
    opcheck(ops.cheb_correlate, (*pattern, x, g, 3), **tolerance)
    opcheck(ops.cheb_grads, (*pattern, g, x, weight), **tolerance)


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
def test_layer_in_all_layouts(channels, device):
    one_way = torch.randint(17, (2, 40))
    edge_index = torch.cat([one_way, one_way.flip(0)], dim=1).unique(dim=1).to(device)
    dense = torch.zeros(19, 19, dtype=torch.float64, device=device)
    dense[tuple(edge_index)] = 1
    dense.fill_diagonal_(0)
    scale = dense.sum(dim=1).clamp(min=1).pow(-0.5)
    layer = StaticChebConv(*channels, 5, edge_index, 19).double().to(device)
    with torch.no_grad():
        layer.bias.normal_()
    weights = torch.stack([lin.weight.t() for lin in layer.lins])
    x = leaf(3, 19, channels[0], device=device)
    expected = reference.chebyshev(-scale[:, None] * dense * scale, weights, x) + layer.bias
    # The matrix of the layer is formed in single precision.
    assert_layer(layer, x, expected, atol=1e-5)


@pytest.mark.parametrize("num_nodes", [0, 1, 18, 20, 57])
def test_rows_of_another_number_of_vertices_are_refused(num_nodes, device):
    # The compiled operations would read beyond their end.
    conv = Cheb(19, 2, device)
    x, weight, bias = inputs_of(19, 2, 3, 4, 2, device=device)
    assert conv(x, weight, bias).shape == (19, 2, 4)
    with pytest.raises(ValueError, match=rf"\[19, B, 3\] \(got \[{num_nodes}, 2, 3\]\)"):
        conv(leaf(num_nodes, 2, 3, device=device), weight, bias)
    with pytest.raises(ValueError, match=r"\[19, B, 3\] \(got \[19, 2, 4\]\)"):
        conv(leaf(19, 2, 4, device=device), weight, bias)
