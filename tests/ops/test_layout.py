import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from pyg_attnpool.ops.layout import on_rows

LAYOUTS = {
    "[N, F]": lambda x: x[0],
    "[B, N, F]": lambda x: x,
    "[B * N, F]": lambda x: x.flatten(0, 1),
}


def two_rows(rows):
    r"""Maps rows [5, B, F] to rows [2, B, F]."""
    return torch.stack([rows[4], rows[0]]) * 2


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_puts_nodes_first_and_restores_the_layout(layout, device):
    x = torch.randn(2, 5, 3, device=device)
    seen = []

    def op(rows):
        seen.append(rows)
        return two_rows(rows)

    out = on_rows(layout(x), 5, op)
    (rows,) = seen
    batch = x[:1] if layout(x).shape == (5, 3) else x
    assert torch.equal(rows, batch.transpose(0, 1))
    assert torch.equal(out, layout(2 * x[:, [4, 0]]))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_view_works_on_the_result(layout, batch_size, device):
    # As programs for PyTorch do with what a layer returns.
    x = torch.randn(batch_size, 5, 3, device=device, dtype=torch.float64, requires_grad=True)
    out = on_rows(layout(x), 5, two_rows)
    assert out.is_contiguous()
    flat = out.view(-1)
    assert_close(flat, layout(2 * x[:, [4, 0]]).flatten())
    assert_close(out.as_strided((2, 3), (3, 1)), 2 * x[0, [4, 0]])

    cotangent = torch.randn_like(flat)
    (grad,) = torch.autograd.grad(flat, x, cotangent)
    expected = torch.zeros_like(x)
    layout(expected).view(-1, 5, 3)[:, [4, 0]] = 2 * cotangent.view(-1, 2, 3)
    assert_close(grad, expected)


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], ids=str)
def test_input_in_another_memory_order(order, device):
    x = torch.randn(4, 5, 3, device=device, dtype=torch.float64)
    stored = x.permute(order).contiguous().requires_grad_()
    view = stored.permute([order.index(dim) for dim in range(3)])
    assert not view.is_contiguous()
    out = on_rows(view, 5, two_rows)
    assert out.is_contiguous() and torch.equal(out, 2 * x[:, [4, 0]])

    cotangent = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out.view(-1), stored, cotangent.view(-1))
    expected = torch.zeros_like(x)
    expected[:, [4, 0]] = 2 * cotangent
    assert_close(grad, expected.permute(order))


def test_gradcheck(device):
    stored = torch.randn(3, 5, 2, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, device=device, dtype=torch.float64)

    def run(stored):
        mapped = on_rows(stored.mT, 2, lambda rows: rows.flip(0) * weight.unsqueeze(0))
        return mapped.view(-1).sin()

    assert gradcheck(run, stored)


@pytest.mark.parametrize("size", [(6, 3), (2, 4, 3), (0, 3), (5,), (1, 2, 5, 3)], ids=str)
def test_names_what_it_got(size):
    with pytest.raises(ValueError, match=r"\[5, F\].*\[B \* 5, F\]") as error:
        on_rows(torch.zeros(size), 5, lambda rows: rows)
    assert f"(got {list(size)})" in str(error.value)


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"floating point features \(got torch.int64\)"):
        on_rows(torch.zeros(5, 3, dtype=torch.long), 5, lambda rows: rows)
