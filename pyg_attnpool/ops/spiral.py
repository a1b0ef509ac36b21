r"""The spiral convolution, forward and backward, on rows :obj:`[N, B, F]`."""

from typing import Any

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import on_cpu, operator, own_types, readable
from pyg_attnpool.ops.dense import checked, combine, correlate, prepared
from pyg_attnpool.ops.sparse import spmm, transpose

Spirals = tuple[Tensor, ...]  # as from `spiral_pattern`


def spiral_pattern(spirals: Tensor) -> Spirals:
    r"""The spirals as :meth:`spiral_conv` takes them.

    Args:
        spirals (torch.Tensor): The vertices of every spiral :obj:`[N, L]`, -1 for no vertex.

    Returns:
        Seven tensors: the spirals; row pointer, vertex and step of their entries, by vertex of the
        output; and row pointer, vertex and step by vertex of the input.

    >>> _, rowptr, vertex, step, *_ = spiral_pattern(torch.tensor([[0, 1], [1, -1]]))
    >>> rowptr.tolist(), vertex.tolist(), step.tolist()
    ([0, 2, 3], [0, 1, 1], [0, 1, 0])
    """
    length = spirals.size(1)
    used = (spirals >= 0).flatten()
    entry = used.nonzero().squeeze(1)
    col, slot = spirals.flatten()[entry], entry % length
    rowptr = torch.cat([entry.new_zeros(1), used.view(-1, length).sum(dim=1).cumsum(0)])
    rowptr_t, col_t, perm = transpose(rowptr, col, spirals.size(0))
    return spirals, rowptr, col, slot, rowptr_t, col_t, slot[perm]


@operator("spiral_conv", decomposes=True)
def _spiral_conv(
    index: Tensor,
    rowptr: Tensor,
    col: Tensor,
    slot: Tensor,
    rowptr_t: Tensor,
    col_t: Tensor,
    slot_t: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adjoint: bool,
) -> Tensor:
    # The adjoint carries gradients of the output back to the input, along the same entries.
    if adjoint:
        rowptr, col, slot = rowptr_t, col_t, slot_t
    dtype = x.dtype
    with own_types(x):
        x, weight, bias = prepared(x), prepared(weight), prepared(bias)
        if on_cpu(x):
            return _cpu.convolve_entries(rowptr, col, slot, x, weight, bias).to(dtype)
        length, channels, out_channels = weight.shape
        _check_steps(index, slot)
        if channels < out_channels and not adjoint:
            steps = [_step(index, x, step) for step in range(length)]
            return combine(steps, weight, bias)
        products = combine([x], weight.transpose(0, 1).flatten(1).unsqueeze(0), None)
        products = products.unflatten(-1, (length, out_channels)).transpose(1, 2)
        ones = x.new_ones(col.numel())
        out = spmm(rowptr, length * col + slot, ones, products.reshape(x.size(0) * length, -1))
        out = out.view(*x.shape[:2], out_channels)
        return out if bias is None else out + bias


def _check_steps(index: Tensor, slot: Tensor) -> None:
    # What PyTorch's own operations do not notice. A GPU would have to be waited for.
    if not (readable(index, slot) and index.is_cpu):
        return
    if (index < -1).any() or (slot < 0).any() or (slot >= index.size(1)).any():
        raise ValueError(
            f"Expected spirals of vertices or -1, and steps from 0 to {index.size(1) - 1} "
            f"(got others)"
        )


def _step(index: Tensor, x: Tensor, step: int) -> Tensor:
    # The features that one step of all spirals meets, zeros where it meets no vertex.
    vertex = index[:, step]
    return x[vertex.clamp(min=0)] * (vertex >= 0).view(-1, 1, 1)


@_spiral_conv.register_fake
def _(*inputs: Any) -> Tensor:
    *_, x, weight, _, _ = inputs
    return x.new_empty(*x.shape[:2], weight.size(2))


def _spiral_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *pattern, x, weight, _, ctx.adjoint = inputs
    ctx.save_for_backward(*pattern, x, weight)


def _spiral_conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *pattern, x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[7:10]
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        theta = weight.transpose(1, 2)
        grad_x = _spiral_conv(*pattern, grad, theta, None, not ctx.adjoint)
    if needs_weight and not ctx.adjoint:
        grad_weight = _spiral_correlate(*pattern, x, grad)
    elif needs_weight:
        grad_weight = _spiral_correlate(*pattern, grad, x).transpose(1, 2)
    if needs_bias:
        grad_bias = grad.sum(dim=(0, 1))
    return *[None] * 7, grad_x, grad_weight, grad_bias, None


_spiral_conv.register_autograd(_spiral_conv_backward, setup_context=_spiral_conv_setup)


@operator("spiral_correlate")
def _spiral_correlate(
    index: Tensor,
    rowptr: Tensor,
    col: Tensor,
    slot: Tensor,
    rowptr_t: Tensor,
    col_t: Tensor,
    slot_t: Tensor,
    x: Tensor,
    g: Tensor,
) -> Tensor:
    # x at every step of the spirals, transposed, times g: the gradient of the weights.
    dtype, length = x.dtype, index.size(1)
    with own_types(x):
        x, g = prepared(x), prepared(g)
        if on_cpu(x):
            return _cpu.outer([x] * length, [g] * length, index).to(dtype)
        _check_steps(index, slot)
        return correlate([_step(index, x, step) for step in range(length)], [g] * length)


@_spiral_correlate.register_fake
def _(index: Tensor, *inputs: Tensor) -> Tensor:
    *_, x, g = inputs
    return x.new_empty(index.size(1), x.size(-1), g.size(-1))


def _spiral_correlate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _spiral_correlate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *pattern, x, g = ctx.saved_tensors
    grad_x = _spiral_conv(*pattern, g, grad.transpose(1, 2), None, True)
    return *[None] * 7, grad_x, _spiral_conv(*pattern, x, grad, None, False)


_spiral_correlate.register_autograd(
    _spiral_correlate_backward, setup_context=_spiral_correlate_setup
)


def spiral_conv(spirals: Spirals, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r"""The spiral convolution :math:`\sum_l \mathbf{x}_{S(i, l)} \mathbf{W}_l + \mathbf{b}`,
    differentiable in everything but the spirals.

    Args:
        spirals (tuple): The result of :meth:`spiral_pattern`.
        x (torch.Tensor): Rows :obj:`[N, B, F]`.
        weight (torch.Tensor): Weights :math:`\mathbf{W}` :obj:`[L, F, F']`.
        bias (torch.Tensor, optional): Bias :obj:`[F']`.

    Returns:
        Rows :obj:`[N, B, F']`.

    Raises:
        ValueError: If :obj:`x` has another shape.

    >>> pattern = spiral_pattern(torch.tensor([[0, 1], [1, -1]]))
    >>> x, weight = torch.tensor([[[1.0]], [[10.0]]]), torch.tensor([[[1.0]], [[2.0]]])
    >>> spiral_conv(pattern, x, weight, None).flatten()
    tensor([21., 10.])
    """
    return _spiral_conv(*spirals, *checked(spirals[0].size(0), x, weight, bias), False)
