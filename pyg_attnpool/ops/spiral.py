r"""The spiral convolution, forward and backward, on rows :obj:`[N, B, F]`."""

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import on_cpu, operator
from pyg_attnpool.ops.dense import checked, combine, correlate, prepared
from pyg_attnpool.ops.sparse import spmm, transpose

Spirals = tuple[Tensor, ...]  # as from `spiral_pattern`


def spiral_pattern(spirals: Tensor) -> Spirals:
    r"""The spirals :obj:`[N, L]`, -1 for no vertex, as :meth:`spiral_conv` takes them: themselves,
    then row pointer, vertex and step of their entries by vertex of the output, and the same three
    by vertex of the input."""
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
    if adjoint:
        rowptr, col, slot = rowptr_t, col_t, slot_t
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = prepared(x, weight, bias)
        if on_cpu(x):
            return _cpu.convolve_entries(rowptr, col, slot, x, weight, bias).to(dtype)
        length, channels, out_channels = weight.shape
        if channels < out_channels and not adjoint:
            steps = [_step(index, x, step) for step in range(length)]
            return combine(steps, weight, bias)
        products = combine([x], weight.transpose(0, 1).flatten(1).unsqueeze(0), None)
        products = products.unflatten(-1, (length, out_channels)).transpose(1, 2)
        ones = x.new_ones(col.numel())
        out = spmm(rowptr, length * col + slot, ones, products.reshape(x.size(0) * length, -1))
        out = out.view(*x.shape[:2], out_channels)
        return out if bias is None else out + bias


def _step(index: Tensor, x: Tensor, step: int) -> Tensor:
    # What one step of all spirals meets, zeros where there is none.
    vertex = index[:, step]
    return x[vertex.clamp(min=0)] * (vertex >= 0).view(-1, 1, 1)


@_spiral_conv.register_fake
def _(index, rowptr, col, slot, rowptr_t, col_t, slot_t, x, weight, bias, adjoint):
    return x.new_empty(*x.shape[:2], weight.size(2))


def _spiral_conv_setup(ctx, inputs, output):
    *pattern, x, weight, _, ctx.adjoint = inputs
    ctx.save_for_backward(*pattern, x, weight)


def _spiral_conv_backward(ctx, grad):
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
    with torch.autocast(x.device.type, enabled=False):
        x, g = prepared(x, g)
        if on_cpu(x):
            return _cpu.outer([x] * length, [g] * length, index).to(dtype)
        return correlate([_step(index, x, step) for step in range(length)], [g] * length)


@_spiral_correlate.register_fake
def _(index, rowptr, col, slot, rowptr_t, col_t, slot_t, x, g):
    return x.new_empty(index.size(1), x.size(-1), g.size(-1))


def _spiral_correlate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _spiral_correlate_backward(ctx, grad):
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
    """
    return _spiral_conv(*spirals, *checked(spirals[0].size(0), x, weight, bias), False)
