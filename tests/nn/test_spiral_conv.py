import copy

import pytest
import torch
from torch.nn.functional import elu
from torch.testing import assert_close

from pyg_attnpool import SpiralConv

SPIRALS = torch.tensor(
    [
        [0, 1, -1, 2],
        [1, -1, -1, -1],
        [2, 4, 3, 0],
        [3, 3, 2, -1],
        [-1, -1, -1, -1],
    ]
)


def dense(conv, x):
    r"""One spiral at a time, from features with a row of zeros at the end."""
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    rows = [padded[:, spiral].flatten(1) for spiral in conv.spirals]
    out = torch.stack(rows, dim=1) @ conv.lin.weight.t()
    return out if conv.lin.bias is None else out + conv.lin.bias


def test_golden(golden):
    case = golden("spiral_conv")
    weight = case["weight"]
    conv = SpiralConv(4, 5, case["spiral"]).double()
    conv.lin.load_state_dict({"weight": weight, "bias": case["bias"]})
    assert_close(elu(conv(case["x"])), case["out"], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("channels", [(3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(device, channels, bias):
    conv = SpiralConv(*channels, SPIRALS, bias).double().to(device)
    x = torch.randn(3, 5, channels[0], dtype=torch.double, device=device, requires_grad=True)
    out, expected = conv(x), dense(conv, x)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    inputs = [x, *conv.parameters()]
    got = torch.autograd.grad(out, inputs, cotangent)
    for a, b in zip(got, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert_close(a, b)
    assert torch.autograd.gradcheck(conv, (x,))


@pytest.mark.parametrize("channels", [(3, 7), (7, 3)])
def test_layouts_and_types(device, channels):
    conv = SpiralConv(*channels, SPIRALS).to(device)
    x = torch.randn(3, 5, channels[0], device=device)
    out = conv(x)
    assert_close(out, dense(conv, x), atol=1e-5, rtol=1e-5)
    assert_close(conv(x.flatten(0, 1)), out.flatten(0, 1))
    assert_close(conv(x[1]), out[1])
    strided = torch.randn(3, channels[0], 5, device=device).transpose(1, 2)
    assert_close(conv(strided), dense(conv, strided), atol=1e-5, rtol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        half = conv(x)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), out, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("channels", [(3, 7), (7, 3)])
def test_compiles_without_graph_breaks(compiled, channels):
    conv = SpiralConv(*channels, SPIRALS)
    x = torch.randn(2, 5, channels[0])
    assert_close(compiled(conv)(x), conv(x))


def test_state():
    conv = SpiralConv(3, 7, SPIRALS)
    assert set(conv.state_dict()) == {"lin.weight", "lin.bias"}
    x = torch.randn(2, 5, 3)
    other = SpiralConv(3, 7, SPIRALS)
    other.load_state_dict(conv.state_dict())
    assert_close(other(x), conv(x))
    assert_close(copy.deepcopy(conv)(x), conv(x))
    torch.manual_seed(1)
    conv.reset_parameters()
    torch.manual_seed(1)
    other.reset_parameters()
    assert_close(other(x), conv(x), atol=0, rtol=0)
    assert repr(conv) == "SpiralConv(3, 7, length=4, num_nodes=5)"


@pytest.mark.parametrize(
    "spirals, error, message",
    [
        (SPIRALS.float(), TypeError, "long tensor .got torch.float32"),
        (SPIRALS.numpy(), TypeError, "got ndarray"),
        (SPIRALS[0], ValueError, r"\[N, L\] .got \[4\]"),
        (SPIRALS + 1, ValueError, "-1 to 4 .got 0 to 5"),
        (SPIRALS - 1, ValueError, "got -2 to 3"),
    ],
)
def test_errors(spirals, error, message):
    with pytest.raises(error, match=message):
        SpiralConv(3, 7, spirals)


def test_spirals_of_another_mesh():
    conv = SpiralConv(3, 7, SPIRALS)
    with pytest.raises(ValueError, match=r"\[5, F\], .* .got \[2, 6, 3\]"):
        conv(torch.randn(2, 6, 3))
    with pytest.raises(ValueError, match="Expected 3 input channels"):
        conv(torch.randn(2, 5, 4))
