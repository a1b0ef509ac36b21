r"""The tests that the Chebyshev and the spiral convolution share: each equals its dense formula,
with all gradients, for all sizes, types and memory layouts."""

import itertools
import math
import threading

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from pyg_attnpool.ops import _cpu

BATCHES = [1, 3, 5, 16, 17]
WIDTHS = [1, 3, 5, 8, 16, 18, 33]
LENGTHS = [1, 2, 3, 6]
EXACT = {"rtol": 1e-11, "atol": 1e-11}

LAYOUTS = {
    "batch first": lambda t: t.detach().transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.detach().movedim(-1, 0).contiguous().movedim(0, -1),
    "every other": lambda t: t.detach().repeat_interleave(2, dim=-1)[..., ::2],
    "within a larger": lambda t: torch.nn.functional.pad(t.detach(), (1, 1), value=1e9)[..., 1:-1],
    "offset": lambda t: torch.cat([t.new_full((1, *t.shape[1:]), 1e9), t.detach()])[1:],
}

SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)]


def leaf(*size, device="cpu", dtype=torch.float64):
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_()


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


def run_all(conv, inputs, cotangent):
    out = conv(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def poison():
    r"""Whatever an operation left in the memory that lasts, it is gone."""
    for dtype in (torch.float32, torch.float64):
        for size in (1, 1 << 16):
            _cpu.workspace((size,), dtype).fill_(float("nan"))


def assert_layer(layer, x, expected, atol):
    r"""A layer gives what a formula gives, in all three layouts, with all gradients."""
    inputs = (x, *layer.parameters())
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for out in (layer(x), layer(x.flatten(0, 1)).view_as(expected)):
        assert_close(out, expected, rtol=0, atol=atol)
        found = torch.autograd.grad(out, inputs, cotangent)
        for grad, other in zip(found, wanted, strict=True):
            assert_close(grad, other, rtol=0, atol=10 * atol)
    assert_close(layer(x[1]), expected[1], rtol=0, atol=atol)
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


class ConvolutionTests:
    r"""Subclasses say in :obj:`conv` what makes a random convolution, called with number of
    vertices, length and device: an object with the :obj:`pattern` of the operation, that can be
    called with rows, weight and bias, and whose :obj:`reference` is the dense formula."""

    conv: type

    def make(self, num_nodes, length, device="cpu"):
        return self.conv(num_nodes, length, device)

    @pytest.mark.parametrize("length", LENGTHS)
    @pytest.mark.parametrize("batch", BATCHES)
    def test_equals_dense_formula(self, batch, length, device):
        for case, (channels, out_channels) in enumerate(itertools.product(WIDTHS, WIDTHS)):
            num_nodes = 5 + case % 17
            conv = self.make(num_nodes, length, device)
            inputs = inputs_of(num_nodes, batch, channels, out_channels, length, device=device)
            assert_same(conv, inputs)

    @pytest.mark.parametrize("num_nodes", [1, 2, 63, 64, 65, 129, 500])
    def test_any_number_of_vertices(self, num_nodes, device):
        for channels, out_channels in [(3, 16), (16, 3), (17, 17)]:
            conv = self.make(num_nodes, 3, device)
            assert_same(conv, inputs_of(num_nodes, 3, channels, out_channels, 3, device=device))

    @pytest.mark.parametrize("channels", [(3, 16), (16, 3), (33, 18), (5, 33)], ids=str)
    @pytest.mark.parametrize(
        "dtype,slack", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
    )
    def test_low_precision(self, dtype, slack, channels, device):
        for batch, length in itertools.product((1, 5, 16), (1, 2, 6)):
            conv = self.make(41, length, device)
            inputs = inputs_of(41, batch, *channels, length, device=device, dtype=dtype)
            assert_same(conv, inputs, {"rtol": 0, "atol": slack}, scaled=True)

    def test_without_bias(self, device):
        for channels, out_channels in [(3, 7), (7, 3)]:
            conv = self.make(13, 4, device)
            x, weight, _ = inputs_of(13, 3, channels, out_channels, 4, device=device)
            out, expected = conv(x, weight, None), conv.reference(x, weight, None)
            assert_close(out, expected, **EXACT)
            cotangent = torch.randn_like(out)
            found = torch.autograd.grad(out, (x, weight), cotangent)
            wanted = torch.autograd.grad(expected, (x, weight), cotangent)
            for grad, other in zip(found, wanted, strict=True):
                assert_close(grad, other, **EXACT)

    @pytest.mark.parametrize("channels", [(3, 8), (8, 3), (5, 5)], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_memory_layouts(self, layout, channels, device):
        conv = self.make(19, 4, device)
        contiguous = inputs_of(19, 3, *channels, 4, device=device)
        change = LAYOUTS[layout]
        x, weight = (change(t).requires_grad_() for t in contiguous[:2])
        bias = LAYOUTS["every other"](contiguous[2]).requires_grad_()
        assert layout == "offset" or not x.is_contiguous()
        for inputs in ((x, *contiguous[1:]), (contiguous[0], weight, bias), (x, weight, bias)):
            assert_same(conv, inputs)
            assert torch.equal(conv(*inputs), conv(*contiguous))

    def test_gradients_of_a_sum(self, device):
        # The incoming gradient is one number in memory.
        conv = self.make(19, 4, device)
        for channels in ((3, 8), (8, 3)):
            inputs = inputs_of(19, 3, *channels, 4, device=device)
            found = torch.autograd.grad(conv(*inputs).sum(), inputs)
            wanted = torch.autograd.grad(conv.reference(*inputs).sum(), inputs)
            for grad, other in zip(found, wanted, strict=True):
                assert_close(grad, other, **EXACT)

    def test_one_sample_repeated(self, device):
        conv = self.make(19, 4, device)
        x, weight, bias = inputs_of(19, 1, 3, 8, 4, device=device)
        out = conv(x.expand(19, 5, 3), weight, bias)
        assert_close(out, conv.reference(x, weight, bias).expand(19, 5, 8), **EXACT)

    @pytest.mark.parametrize("channels", [(1, 3), (3, 1), (2, 2)], ids=str)
    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_derivatives_are_those_of_finite_differences(self, length, channels, device):
        conv = self.make(4, length, device)
        inputs = inputs_of(4, 2, *channels, length, device=device)
        assert gradcheck(conv, inputs)
        assert gradgradcheck(conv, inputs)

    @pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
    @pytest.mark.parametrize("subset", SUBSETS, ids=str)
    def test_only_some_gradients_are_needed(self, subset, channels, device):
        conv = self.make(19, 4, device)
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
    def test_second_derivatives_equal_dense_formula(self, subset, channels, device):
        # As a gradient penalty takes them.
        conv = self.make(11, 6, device)
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

    @pytest.mark.parametrize("channels", [(3, 8), (8, 3)], ids=str)
    def test_compiles_without_graph_breaks(self, channels, compiled, device):
        conv = self.make(19, 4, device)
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
    def test_autocast(self, channels, device):
        conv = self.make(37, 5, device)
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

    def test_empty_batch(self, device):
        conv = self.make(7, 3, device)
        for channels in ((3, 5), (5, 3)):
            x, weight, bias = inputs_of(7, 0, *channels, 3, device=device)
            out = conv(x, weight, bias)
            assert out.shape == (7, 0, channels[1])
            grads = torch.autograd.grad(out.sum(), (x, weight, bias))
            assert grads[0].shape == x.shape
            assert torch.equal(grads[1], torch.zeros_like(weight))
            assert torch.equal(grads[2], torch.zeros_like(bias))

    @pytest.mark.parametrize("channels", [(3, 16), (16, 3), (33, 18)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_two_threads_repeat_to_the_bit(self, dtype, channels, num_threads):
        # Large enough that work is shared, unlike in the tests above.
        conv = self.make(201, 6)
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

    def test_called_from_two_threads_at_once(self):
        convs = [self.make(90, 6) for _ in range(2)]
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

        threads = [
            threading.Thread(target=run, args=args) for args in zip(convs, inputs, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]

    @pytest.mark.parametrize("channels", [(3, 8), (8, 3), (5, 5)], ids=str)
    def test_nothing_lives_in_the_workspace(self, channels):
        results = []
        for num_nodes, batch, length in [(7, 1, 3), (150, 4, 6), (7, 1, 3), (9, 2, 6), (201, 5, 6)]:
            conv = self.make(num_nodes, length)
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
