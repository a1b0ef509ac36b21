r"""Chebyshev and spiral convolutions against dense formulas, output and all gradients."""

import itertools
import math
import threading

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from pyg_attnpool import AttentionPool, Mapping, MappingPool, SpiralConv, StaticChebConv
from pyg_attnpool.ops import _cpu, reference
from pyg_attnpool.ops.cheb import cheb_conv
from pyg_attnpool.ops.spiral import spiral_conv, spiral_pattern

BATCHES = [1, 3, 5, 16, 17]
WIDTHS = [1, 3, 5, 8, 16, 18, 33]
LENGTHS = [1, 2, 3, 6]
KINDS = ["cheb", "spiral"]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def leaf(*size, device="cpu", dtype=torch.float64):
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_()


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


def make(kind, num_nodes, length, device="cpu"):
    return {"cheb": Cheb, "spiral": Spiral}[kind](num_nodes, length, device)


def inputs_of(num_nodes, batch, channels, out_channels, length, **kwargs):
    x = leaf(num_nodes, batch, channels, **kwargs)
    weight = leaf(length, channels, out_channels, **kwargs)
    return x, weight, leaf(out_channels, **kwargs)


def assert_same(conv, inputs, tolerance=EXACT, scaled=False):
    r"""Output and gradients of all inputs are those of the dense formula in double precision."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = conv(*inputs), conv.reference(*exact)
    assert out.dtype == inputs[0].dtype
    cotangent = torch.randn_like(expected).to(out.dtype)
    found = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    names = ("out", "x", "weight", "bias")
    for name, a, b in zip(names, (out, *found), (expected, *wanted), strict=True):
        scale = b.abs().max().clamp(min=1e-3) if scaled else 1
        assert a.dtype == out.dtype
        assert_close(a.double() / scale, b / scale, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# Equality ############################################################################


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_dense_formula(kind, batch, length, device):
    for case, (channels, out_channels) in enumerate(itertools.product(WIDTHS, WIDTHS)):
        num_nodes = 5 + case % 17
        conv = make(kind, num_nodes, length, device)
        inputs = inputs_of(num_nodes, batch, channels, out_channels, length, device=device)
        assert_same(conv, inputs)


@pytest.mark.parametrize("num_nodes", [1, 2, 63, 64, 65, 129, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_vertices(kind, num_nodes, device):
    for channels, out_channels in [(3, 16), (16, 3), (17, 17)]:
        conv = make(kind, num_nodes, 3, device)
        assert_same(conv, inputs_of(num_nodes, 3, channels, out_channels, 3, device=device))


@pytest.mark.parametrize("channels", [(3, 16), (16, 3), (33, 18), (5, 33)], ids=str)
@pytest.mark.parametrize(
    "dtype,slack", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, dtype, slack, channels, device):
    for batch, length in itertools.product((1, 5, 16), (1, 2, 6)):
        conv = make(kind, 41, length, device)
        inputs = inputs_of(41, batch, *channels, length, device=device, dtype=dtype)
        assert_same(conv, inputs, {"rtol": 0, "atol": slack}, scaled=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_bias(kind, device):
    for channels, out_channels in [(3, 7), (7, 3)]:
        conv = make(kind, 13, 4, device)
        x, weight, _ = inputs_of(13, 3, channels, out_channels, 4, device=device)
        out, expected = conv(x, weight, None), conv.reference(x, weight, None)
        assert_close(out, expected, **EXACT)
        cotangent = torch.randn_like(out)
        found = torch.autograd.grad(out, (x, weight), cotangent)
        wanted = torch.autograd.grad(expected, (x, weight), cotangent)
        for grad, other in zip(found, wanted, strict=True):
            assert_close(grad, other, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_connected(kind, device):
    conv = make(kind, 7, 3, device)
    if kind == "cheb":
        none = torch.empty(0, dtype=torch.long, device=device)
        conv.dense = torch.zeros_like(conv.dense)
        conv.pattern = torch.zeros(8, dtype=torch.long, device=device), none, none.double()
    else:
        conv.spirals = torch.full_like(conv.spirals, -1)
        conv.pattern = spiral_pattern(conv.spirals)
    for channels, out_channels in [(3, 5), (5, 3)]:
        inputs = inputs_of(7, 2, channels, out_channels, 3, device=device)
        assert_same(conv, inputs)
        x, weight, bias = inputs
        # T_0 = 1, T_1(0) = 0, T_2(0) = -1
        expected = x @ (weight[0] - weight[2]) + bias if kind == "cheb" else bias.expand(7, 2, -1)
        assert_close(conv(*inputs), expected)


def test_literal_chebyshev():
    # Two vertices, swapped by the matrix: T_0 and T_2 leave them, T_1 and T_3 swap them.
    pattern = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)
    x = torch.tensor([[[1.0, 10.0]], [[2.0, 20.0]]])
    weight = torch.tensor([[[1.0], [0]], [[0], [1.0]], [[100.0], [0]], [[0], [1000.0]]])
    out = cheb_conv(pattern, x, weight, torch.tensor([0.5]))
    assert out.flatten().tolist() == [1 + 20 + 100 + 20000 + 0.5, 2 + 10 + 200 + 10000 + 0.5]
    wide = cheb_conv(pattern, x, weight.expand(4, 2, 3), None)
    assert wide[:, 0].tolist() == [[20121.0] * 3, [10212.0] * 3]


def test_literal_spiral():
    spirals = torch.tensor([[0, 1, 1], [1, -1, 0], [-1, -1, -1]])
    x = torch.tensor([[[1.0]], [[10.0]], [[100.0]]])
    weight = torch.tensor([[[1.0, -1.0]], [[2.0, 0.0]], [[3.0, 0.5]]])
    out = spiral_conv(spiral_pattern(spirals), x, weight, torch.tensor([0.0, 7.0]))
    assert out[:, 0].tolist() == [[1 + 20 + 30, -1 + 5 + 7], [10 + 3, -10 + 0.5 + 7], [0, 7]]


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


# Memory layouts ######################################################################

LAYOUTS = {
    "batch first": lambda t: t.detach().transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.detach().movedim(-1, 0).contiguous().movedim(0, -1),
    "every other": lambda t: t.detach().repeat_interleave(2, dim=-1)[..., ::2],
    "within a larger": lambda t: torch.nn.functional.pad(t.detach(), (1, 1), value=1e9)[..., 1:-1],
    "offset": lambda t: torch.cat([t.new_full((1, *t.shape[1:]), 1e9), t.detach()])[1:],
}


@pytest.mark.parametrize("channels", [(3, 8), (8, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_layouts(kind, layout, channels, device):
    conv = make(kind, 19, 4, device)
    contiguous = inputs_of(19, 3, *channels, 4, device=device)
    change = LAYOUTS[layout]
    x, weight = (change(t).requires_grad_() for t in contiguous[:2])
    bias = LAYOUTS["every other"](contiguous[2]).requires_grad_()
    assert layout == "offset" or not x.is_contiguous()
    for inputs in ((x, *contiguous[1:]), (contiguous[0], weight, bias), (x, weight, bias)):
        assert_same(conv, inputs)
        assert torch.equal(conv(*inputs), conv(*contiguous))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_sum(kind, device):
    # The incoming gradient is one number in memory.
    conv = make(kind, 19, 4, device)
    for channels in ((3, 8), (8, 3)):
        inputs = inputs_of(19, 3, *channels, 4, device=device)
        found = torch.autograd.grad(conv(*inputs).sum(), inputs)
        wanted = torch.autograd.grad(conv.reference(*inputs).sum(), inputs)
        for grad, other in zip(found, wanted, strict=True):
            assert_close(grad, other, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_repeated(kind, device):
    conv = make(kind, 19, 4, device)
    x, weight, bias = inputs_of(19, 1, 3, 8, 4, device=device)
    out = conv(x.expand(19, 5, 3), weight, bias)
    assert_close(out, conv.reference(x, weight, bias).expand(19, 5, 8), **EXACT)


# Derivatives #########################################################################


@pytest.mark.parametrize("channels", [(1, 3), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_finite_differences(kind, length, channels, device):
    conv = make(kind, 4, length, device)
    inputs = inputs_of(4, 2, *channels, length, device=device)
    assert gradcheck(conv, inputs)
    assert gradgradcheck(conv, inputs)


SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_only_some_gradients_are_needed(kind, subset, channels, device):
    conv = make(kind, 19, 4, device)
    inputs = [t.detach() for t in inputs_of(19, 3, *channels, 4, device=device)]
    needed = [inputs[i].requires_grad_() for i in subset]
    out, expected = conv(*inputs), conv.reference(*inputs)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, needed, cotangent)
    wanted = torch.autograd.grad(expected, needed, cotangent)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other, **EXACT)
    conv(*inputs).backward(cotangent)
    assert [t.grad is not None for t in inputs] == [i in subset for i in range(3)]


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_equal_dense_formula(kind, subset, channels, device):
    # As a gradient penalty takes them.
    conv = make(kind, 11, 6, device)
    inputs = inputs_of(11, 3, *channels, 6, device=device)
    wrt = [inputs[i] for i in subset]
    results = []
    for run in (conv, conv.reference):
        grads = torch.autograd.grad(run(*inputs).tanh().sum(), wrt, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(penalty, inputs))
    for grad, other in zip(*results, strict=True):
        scale = other.abs().max()
        assert scale > 1e-3
        assert_close(grad / scale, other / scale, **EXACT)


# Operators ###########################################################################


@pytest.mark.parametrize("channels", [(3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_of_chebyshev_pass_opcheck(dtype, channels, device):
    rowptr, col, value = Cheb(7, 3, device).pattern
    pattern = rowptr, col, value.to(dtype)
    x, weight, bias = inputs_of(7, 2, *channels, 3, device=device, dtype=dtype)
    g = leaf(7, 2, channels[1], device=device, dtype=dtype)
    ops, check = torch.ops.pyg_attnpool, torch.library.opcheck
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.5}
    check(ops.cheb_conv, (*pattern, x, weight, bias), **tolerance)
    batch_first = LAYOUTS["batch first"](x).requires_grad_()
    check(ops.cheb_conv, (*pattern, batch_first, weight, None), **tolerance)
    check(ops.cheb_correlate, (*pattern, x, g, 3), **tolerance)
    check(ops.cheb_grads, (*pattern, g, x, weight), **tolerance)


@pytest.mark.parametrize("channels", [(3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_of_spirals_pass_opcheck(dtype, channels, device):
    pattern = Spiral(7, 3, device).pattern
    x, weight, bias = inputs_of(7, 2, *channels, 3, device=device, dtype=dtype)
    g = leaf(7, 2, channels[1], device=device, dtype=dtype)
    ops, check = torch.ops.pyg_attnpool, torch.library.opcheck
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.5}
    check(ops.spiral_conv, (*pattern, x, weight, bias, False), **tolerance)
    check(ops.spiral_conv, (*pattern, g, weight.mT, None, True), **tolerance)
    check(ops.spiral_correlate, (*pattern, x, g), **tolerance)


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind, channels, compiled, device):
    conv = make(kind, 19, 4, device)
    inputs = inputs_of(19, 3, *channels, 4, device=device)

    def run(x, weight, bias):
        # Twice, and in the layout of a user: what one gives is what the next takes.
        y = conv(x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias)
        return conv(y.relu(), weight.transpose(1, 2), None)

    function = compiled(run)
    middle = conv.reference(*inputs).relu()
    expected = conv.reference(middle, inputs[1].transpose(1, 2), None)
    out = function(*inputs)
    assert_close(out, expected, **EXACT)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for grad, other in zip(found, wanted, strict=True):
        assert_close(grad, other, **EXACT)


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, channels, device):
    conv = make(kind, 37, 5, device)
    conv.pattern = tuple(t.float() if t.is_floating_point() else t for t in conv.pattern)
    inputs = inputs_of(37, 5, *channels, 5, device=device, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = conv.reference(*exact)
    cotangent = torch.randn_like(expected)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = conv(*inputs)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, inputs, cotangent.to(out.dtype))
    wanted = torch.autograd.grad(expected, exact, cotangent)
    for a, b in zip((out, *found), (expected, *wanted), strict=True):
        assert (a.double() - b).abs().max() < 0.03 * b.abs().max()
    assert all(grad.dtype == torch.float32 for grad in found)
    # Double precision is asked for with a reason.
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = conv(*exact)
    assert out.dtype == torch.float64
    assert_close(out, expected, rtol=0, atol=1e-5)  # the matrix is of single precision


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind, device):
    conv = make(kind, 7, 3, device)
    for channels in ((3, 5), (5, 3)):
        x, weight, bias = inputs_of(7, 0, *channels, 3, device=device)
        out = conv(x, weight, bias)
        assert out.shape == (7, 0, channels[1])
        grads = torch.autograd.grad(out.sum(), (x, weight, bias))
        assert grads[0].shape == x.shape
        assert torch.equal(grads[1], torch.zeros_like(weight))
        assert torch.equal(grads[2], torch.zeros_like(bias))


# Threads #############################################################################


def run_all(conv, inputs, cotangent):
    out = conv(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("channels", [(3, 16), (16, 3), (33, 18)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_repeat_to_the_bit(kind, dtype, channels, num_threads):
    # Large enough that work is shared, unlike in the tests above.
    conv = make(kind, 201, 6)
    inputs = inputs_of(201, 5, *channels, 6, dtype=dtype)
    cotangent = torch.randn(201, 5, channels[1], dtype=dtype)
    assert 201 * 5 * 6 * math.prod(channels) > 1 << 17
    num_threads(2)
    first = run_all(conv, inputs, cotangent)
    for _ in range(3):
        for a, b in zip(run_all(conv, inputs, cotangent), first, strict=True):
            assert torch.equal(a, b)
    slack = 1e-5 if dtype == torch.float32 else 1e-13
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = conv.reference(*exact)
    wanted = [expected, *torch.autograd.grad(expected, exact, cotangent.double())]
    num_threads(1)
    single = run_all(conv, inputs, cotangent)
    for a, b, c in zip(first, single, wanted, strict=True):
        scale = c.abs().max()
        assert_close(a / scale, b / scale, rtol=0, atol=slack)
        assert_close(a.double() / scale, c / scale, rtol=0, atol=slack)


@pytest.mark.parametrize("kind", KINDS)
def test_called_from_two_threads_at_once(kind):
    convs = [make(kind, 90, 6) for _ in range(2)]
    inputs = [inputs_of(90, batch, 8, 8, 6) for batch in (2, 5)]
    errors = []

    def run(conv, inputs):
        try:
            expected = conv.reference(*inputs)
            wanted = torch.autograd.grad(expected.square().sum(), inputs)
            for _ in range(25):
                out = conv(*inputs)
                assert_close(out, expected, **EXACT)
                found = torch.autograd.grad(out.square().sum(), inputs)
                for grad, other in zip(found, wanted, strict=True):
                    assert_close(grad, other, rtol=1e-10, atol=1e-10)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=args) for args in zip(convs, inputs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


# Workspace ###########################################################################


def poison():
    r"""Whatever an operation left in the memory that lasts, it is gone."""
    for dtype in (torch.float32, torch.float64):
        for size in (1, 1 << 16):
            _cpu.workspace((size,), dtype).fill_(float("nan"))


@pytest.mark.parametrize("channels", [(3, 8), (8, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_lives_in_the_workspace(kind, channels):
    results = []
    for num_nodes, batch, length in [(7, 1, 3), (150, 4, 6), (7, 1, 3), (9, 2, 6), (201, 5, 6)]:
        conv = make(kind, num_nodes, length)
        inputs = inputs_of(num_nodes, batch, *channels, length)
        poison()
        out = conv(*inputs)
        kept = out.detach().clone()
        poison()  # between forward and backward
        cotangent = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, cotangent)
        expected = conv.reference(*inputs)
        wanted = torch.autograd.grad(expected, inputs, cotangent)
        assert torch.equal(out, kept)
        results.append(((out, *grads), (expected, *wanted)))
        poison()
        for found, other in results:  # of all calls so far
            for a, b in zip(found, other, strict=True):
                assert_close(a, b, **EXACT)


def test_workspace_is_per_type_and_thread():
    first = _cpu.workspace((3, 5), torch.float64).fill_(1)
    assert first.shape == (3, 5) and first.dtype == torch.float64
    _cpu.workspace((3, 5), torch.float32).fill_(2)
    other = []
    thread = threading.Thread(target=lambda: other.append(_cpu.workspace((3, 5), first.dtype)))
    thread.start()
    thread.join()
    other[0].fill_(3)
    assert first.eq(1).all()


# Layers ##############################################################################


@pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
def test_layers_in_all_layouts(channels, device):
    one_way = torch.randint(17, (2, 40))
    edge_index = torch.cat([one_way, one_way.flip(0)], dim=1).unique(dim=1).to(device)
    dense = torch.zeros(19, 19, dtype=torch.float64, device=device)
    dense[tuple(edge_index)] = 1
    dense.fill_diagonal_(0)
    scale = dense.sum(dim=1).clamp(min=1).pow(-0.5)
    cheb = StaticChebConv(*channels, 5, edge_index, 19).double().to(device)
    spirals = Spiral(19, 5, device).spirals
    spiral = SpiralConv(*channels, spirals).double().to(device)
    weights = torch.stack([lin.weight.t() for lin in cheb.lins])
    steps = spiral.lin.weight.view(channels[1], 5, channels[0]).permute(1, 2, 0)
    with torch.no_grad():
        cheb.bias.normal_()
    x = leaf(3, 19, channels[0], device=device)
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    table = [
        (cheb, reference.chebyshev(-scale[:, None] * dense * scale, weights, x) + cheb.bias),
        (spiral, torch.einsum("bnlf,lfg->bng", padded[:, spirals], steps) + spiral.lin.bias),
    ]
    for layer, expected in table:
        inputs = (x, *layer.parameters())
        cotangent = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, inputs, cotangent)
        atol = 1e-5 if layer is cheb else 1e-11  # whose matrix is formed in single precision
        for out in (layer(x), layer(x.flatten(0, 1)).view_as(expected)):
            assert_close(out, expected, rtol=0, atol=atol)
            for grad, other in zip(
                torch.autograd.grad(out, inputs, cotangent), wanted, strict=True
            ):
                assert_close(grad, other, rtol=0, atol=10 * atol)
        assert_close(layer(x[1]), expected[1], rtol=0, atol=atol)
        assert layer(x[:0]).shape == (0, 19, channels[1])


@pytest.mark.parametrize("num_nodes", [0, 1, 18, 20, 57])
def test_rows_of_another_number_of_vertices_are_refused(num_nodes, device):
    # What is compiled would read beyond their end.
    ring = torch.arange(19)
    edge_index = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
    layers = [
        StaticChebConv(3, 4, 2, edge_index, 19),
        SpiralConv(3, 4, torch.stack([ring, ring.roll(1)], dim=1)),
        MappingPool(Mapping(ring.view(-1, 1), torch.ones(19, 1), 19)),
        AttentionPool(19, 7, channels=4, k=2),
    ]
    for layer in layers:
        layer = layer.to(device)
        assert layer(torch.randn(19, 2, 3, device=device), rows=True).size(1) == 2
        with pytest.raises(ValueError, match=rf"19.*\(got .*{num_nodes}"):
            layer(torch.randn(num_nodes, 2, 3, device=device), rows=True)
