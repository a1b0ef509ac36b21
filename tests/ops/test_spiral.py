r"""The spiral convolution against its dense formula, output and all gradients."""

import pytest
import torch
from torch.testing import assert_close

from pyg_attnpool import SpiralConv
from pyg_attnpool.ops.spiral import spiral_conv, spiral_pattern
from tests.ops.checks import opcheck
from tests.ops.convolutions import ConvolutionTests, assert_layer, assert_same, inputs_of, leaf


class Spiral:
    r"""Random spirals. Vertices come twice in some, others end early, begin or break off with no
    vertex, and vertex 1 has none at all."""

    def __init__(self, num_nodes, length, device="cpu"):
        spirals = torch.randint(num_nodes, (num_nodes, length))
        spirals[torch.rand(num_nodes, length) < 0.25] = -1
        spirals[::3, -1] = spirals[::3, 0]
        spirals[min(1, num_nodes - 1)] = -1
        self.spirals = spirals.to(device)
        self.pattern = spiral_pattern(self.spirals)

    def __call__(self, x, weight, bias):
        return spiral_conv(self.pattern, x, weight, bias)

    def reference(self, x, weight, bias):
        padded = torch.cat([x, torch.zeros_like(x[:1])])  # row -1
        out = torch.einsum("nlbf,lfg->nbg", padded[self.spirals], weight)
        return out if bias is None else out + bias


class TestSpiralConv(ConvolutionTests):
    conv = Spiral


def test_nothing_is_connected(device):
    conv = Spiral(7, 3, device)
    conv.spirals = torch.full_like(conv.spirals, -1)
    conv.pattern = spiral_pattern(conv.spirals)
    for channels, out_channels in [(3, 5), (5, 3)]:
        inputs = inputs_of(7, 2, channels, out_channels, 3, device=device)
        assert_same(conv, inputs)
        assert_close(conv(*inputs), inputs[2].expand(7, 2, -1))


def test_pattern_literal():
    spirals = torch.tensor([[0, 1, 1], [1, -1, 0], [-1, -1, -1]])
    index, rowptr, col, slot, rowptr_t, col_t, slot_t = spiral_pattern(spirals)
    assert index is spirals
    assert (rowptr.tolist(), col.tolist(), slot.tolist()) == (
        [0, 3, 5, 5],
        [0, 1, 1, 1, 0],
        [0, 1, 2, 0, 2],
    )
    # Vertex 0 is met by spirals 0 and 1, vertex 1 twice by spiral 0 and once by spiral 1.
    assert (rowptr_t.tolist(), col_t.tolist(), slot_t.tolist()) == (
        [0, 2, 5, 5],
        [0, 1, 0, 0, 1],
        [0, 2, 1, 2, 0],
    )


def test_literal():
    spirals = torch.tensor([[0, 1, 1], [1, -1, 0], [-1, -1, -1]])
    x = torch.tensor([[[1.0]], [[10.0]], [[100.0]]])
    weight = torch.tensor([[[1.0, -1.0]], [[2.0, 0.0]], [[3.0, 0.5]]])
    out = spiral_conv(spiral_pattern(spirals), x, weight, torch.tensor([0.0, 7.0]))
    assert out[:, 0].tolist() == [[1 + 20 + 30, -1 + 5 + 7], [10 + 3, -10 + 0.5 + 7], [0, 7]]


@pytest.mark.parametrize("channels", [(3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(dtype, channels, device):
    pattern = Spiral(7, 3, device).pattern
    x, weight, bias = inputs_of(7, 2, *channels, 3, device=device, dtype=dtype)
    g = leaf(7, 2, channels[1], device=device, dtype=dtype)
    ops = torch.ops.pyg_attnpool
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.5}
    opcheck(ops.spiral_conv, (*pattern, x, weight, bias, False), **tolerance)
    opcheck(ops.spiral_conv, (*pattern, g, weight.mT, None, True), **tolerance)
    opcheck(ops.spiral_correlate, (*pattern, x, g), **tolerance)


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
def test_layer_in_all_layouts(channels, device):
    spirals = Spiral(19, 5, device).spirals
    layer = SpiralConv(*channels, spirals).double().to(device)
    steps = layer.lin.weight.view(channels[1], 5, channels[0]).permute(1, 2, 0)
    x = leaf(3, 19, channels[0], device=device)
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    expected = torch.einsum("bnlf,lfg->bng", padded[:, spirals], steps) + layer.lin.bias
    assert_layer(layer, x, expected, atol=1e-11)


@pytest.mark.parametrize("num_nodes", [0, 1, 18, 20, 57])
def test_rows_of_another_number_of_vertices_are_refused(num_nodes, device):
    # The compiled operations would read beyond their end.
    conv = Spiral(19, 2, device)
    x, weight, bias = inputs_of(19, 2, 3, 4, 2, device=device)
    assert conv(x, weight, bias).shape == (19, 2, 4)
    with pytest.raises(ValueError, match=rf"\[19, B, 3\] \(got \[{num_nodes}, 2, 3\]\)"):
        conv(leaf(num_nodes, 2, 3, device=device), weight, bias)
    with pytest.raises(ValueError, match=r"\[19, B, 3\] \(got \[19, 2, 4\]\)"):
        conv(leaf(19, 2, 4, device=device), weight, bias)
