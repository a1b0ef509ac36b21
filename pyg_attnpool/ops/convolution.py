r"""Convolutions on one static graph, forward and backward, on rows :obj:`[N, B, F]`.

The batch lies beside the channels, so that one sparse product serves all samples, and the
recurrence, the gathered neighbours and their gradients never stand side by side in memory. What a
backward pass needs beyond the input it forms again, which costs less than to keep it.
"""

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.gather import at_least_single, on_cpu, spmm, transpose
from pyg_attnpool.ops.operator import operator

Laplacian = tuple[Tensor, Tensor, Tensor]  # rowptr, col and value of a symmetric matrix


def _checked(num_nodes: int, x: Tensor, weight: Tensor, bias: Tensor | None):
    # The compiled operations would read beyond other sizes. In the type of autocast where there is
    # one, as a matrix product.
    if x.dim() != 3 or x.size(0) != num_nodes or x.size(2) != weight.size(1):
        raise ValueError(
            f"Expected rows of shape [{num_nodes}, B, {weight.size(1)}] (got {list(x.shape)})"
        )
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


# Chebyshev ###########################################################################


def _propagate(laplacian: Laplacian, x: Tensor, scale: float, minus: Tensor | None) -> Tensor:
    # scale * L x - minus, in one pass where that is compiled.
    rowptr, col, value = laplacian
    value, rows = value.to(x.dtype), x.reshape(x.size(0), -1)
    if on_cpu(x):
        return _cpu.spmm(rowptr, col, value, rows, None, scale, minus).view(x.shape)
    y = spmm(rowptr, col, scale * value, rows).view(x.shape)
    return y if minus is None else y - minus


def _terms(laplacian: Laplacian, x: Tensor, K: int) -> list[Tensor]:
    # T_0 x to T_{K-1} x, to be used at once.
    if on_cpu(x):
        return _cpu.terms(laplacian[0], laplacian[1], laplacian[2].to(x.dtype), x, K)
    terms = [x]
    while len(terms) < K:
        scale, minus = (1.0, None) if len(terms) == 1 else (2.0, terms[-2])
        terms.append(_propagate(laplacian, terms[-1], scale, minus))
    return terms


def _combine(terms: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    # The sum over k of the k-th term times the k-th weight.
    if on_cpu(weight):
        return _cpu.convolve_slots(terms, weight.contiguous(), bias)
    weight = weight.flatten(0, 1).t()
    return torch.nn.functional.linear(torch.cat(terms, dim=-1), weight, bias)


def _correlate(x: list[Tensor], g: list[Tensor]) -> Tensor:
    # x_k^T g_k over all vertices and samples, [K, F, F'].
    if not on_cpu(x[0]):
        return torch.stack(
            [a.flatten(0, 1).t() @ b.flatten(0, 1) for a, b in zip(x, g, strict=True)]
        )
    if x[0].size(-1) > g[0].size(-1):  # the wider one fills the vectors
        return _cpu.outer(g, x).transpose(1, 2).contiguous()
    return _cpu.outer(x, g)


def _clenshaw(laplacian: Laplacian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # b_k = x W_k + 2 L b_{k+1} - b_{k+2} from the last term down, not doubled at the first.
    out, following = _combine([x], weight[-1:], None), None
    for k in reversed(range(weight.size(0) - 1)):
        product = _combine([x], weight[k : k + 1], None)
        minus = -product if following is None else following - product
        out, following = _propagate(laplacian, out, 2.0 if k > 0 else 1.0, minus), out
    return out if bias is None else out + bias


@operator("cheb_conv")
def _cheb_conv(
    rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = _prepared(x, weight, bias)
        narrower = _clenshaw if weight.size(2) < weight.size(1) else _recurrence
        out = narrower((rowptr, col, value), x, weight, bias).to(dtype)
    return out


def _recurrence(laplacian: Laplacian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _combine(_terms(laplacian, x, weight.size(0)), weight, bias)


def _prepared(*tensors: Tensor | None) -> list[Tensor | None]:
    # The compiled operations know contiguous single and double precision.
    single = [t if t is None or not on_cpu(t) else t.to(at_least_single(t.dtype)) for t in tensors]
    return [t if t is None else t.contiguous() for t in single]


@_cheb_conv.register_fake
def _(rowptr, col, value, x, weight, bias):
    return x.new_empty(*x.shape[:2], weight.size(2))


def _cheb_conv_setup(ctx, inputs, output):
    rowptr, col, value, x, weight, _ = inputs
    ctx.save_for_backward(rowptr, col, value, x, weight)


def _cheb_conv_backward(ctx, grad):
    rowptr, col, value, x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[3] and ctx.needs_input_grad[4]:
        grad_x, grad_weight = _cheb_grads(rowptr, col, value, grad, x, weight)
    elif ctx.needs_input_grad[3]:
        grad_x = _cheb_conv(rowptr, col, value, grad, weight.transpose(1, 2), None)
    elif ctx.needs_input_grad[4]:
        grad_weight = _cheb_correlate(rowptr, col, value, x, grad, weight.size(0))
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(dim=(0, 1))
    return None, None, None, grad_x, grad_weight, grad_bias


_cheb_conv.register_autograd(_cheb_conv_backward, setup_context=_cheb_conv_setup)


@operator("cheb_correlate")
def _cheb_correlate(
    rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, g: Tensor, K: int
) -> Tensor:
    # x^T T_k(L) g for every k: the gradient of the weights.
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, g = _prepared(x, g)
        laplacian = rowptr, col, value
        if x.size(-1) <= g.size(-1):
            return _correlate(_terms(laplacian, x, K), [g] * K).to(dtype)
        return _correlate([x] * K, _terms(laplacian, g, K)).to(dtype)


@_cheb_correlate.register_fake
def _(rowptr, col, value, x, g, K):
    return x.new_empty(K, x.size(-1), g.size(-1))


def _cheb_correlate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _cheb_correlate_backward(ctx, grad):
    rowptr, col, value, x, g = ctx.saved_tensors
    grad_x = _cheb_conv(rowptr, col, value, g, grad.transpose(1, 2), None)
    return None, None, None, grad_x, _cheb_conv(rowptr, col, value, x, grad, None), None


_cheb_correlate.register_autograd(_cheb_correlate_backward, setup_context=_cheb_correlate_setup)


@operator("cheb_grads")
def _cheb_grads(
    rowptr: Tensor, col: Tensor, value: Tensor, g: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    # The gradients of input and weights. They share the terms T_k(L) g, unless these are so wide
    # that two recurrences in the width of x are cheaper.
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        g, x, weight = _prepared(g, x, weight)
        laplacian, K, theta = (rowptr, col, value), weight.size(0), weight.transpose(1, 2)
        # The input's last, so that it is still in the cache where the gradient goes on.
        if g.size(-1) > 2 * x.size(-1):
            grad_weight = _correlate(_terms(laplacian, x, K), [g] * K)
            grad_x = _clenshaw(laplacian, g, theta, None)
        else:
            terms = _terms(laplacian, g, K)
            grad_weight = _correlate([x] * K, terms)
            grad_x = _combine(terms, theta, None)
        return grad_x.to(dtype), grad_weight.to(dtype)


@_cheb_grads.register_fake
def _(rowptr, col, value, g, x, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(
        weight.shape
    )


def _cheb_grads_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _cheb_grads_backward(ctx, h_x, h_weight):
    rowptr, col, value, g, x, weight = ctx.saved_tensors

    def conv(rows, theta):
        return _cheb_conv(rowptr, col, value, rows, theta, None)

    grad_g = conv(h_x, weight) + conv(x, h_weight)
    grad_x = conv(g, h_weight.transpose(1, 2))
    grad_weight = _cheb_correlate(rowptr, col, value, h_x, g, weight.size(0))
    return None, None, None, grad_g, grad_x, grad_weight


_cheb_grads.register_autograd(_cheb_grads_backward, setup_context=_cheb_grads_setup)


def cheb_conv(laplacian: Laplacian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r"""The Chebyshev convolution :math:`\sum_k T_k(\hat{L}) \, \mathbf{x} \, \Theta_k +
    \mathbf{b}`, differentiable in everything but the Laplacian.

    The recurrence runs in the narrower of input and output width, in the latter by Clenshaw's
    algorithm.

    Args:
        laplacian (tuple): Row pointer, columns and values of the symmetric scaled Laplacian
            :math:`\hat{L}` in CSR form.
        x (torch.Tensor): Rows :obj:`[N, B, F]`.
        weight (torch.Tensor): Weights :math:`\Theta` :obj:`[K, F, F']`.
        bias (torch.Tensor, optional): Bias :obj:`[F']`.

    Returns:
        Rows :obj:`[N, B, F']`.
    """
    return _cheb_conv(*laplacian, *_checked(laplacian[0].size(0) - 1, x, weight, bias))


# Spirals #############################################################################


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


@operator("spiral_conv")
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
        x, weight, bias = _prepared(x, weight, bias)
        if on_cpu(x):
            return _cpu.convolve_entries(rowptr, col, slot, x, weight, bias).to(dtype)
        length, channels, out_channels = weight.shape
        if channels < out_channels and not adjoint:
            steps = [_step(index, x, step) for step in range(length)]
            return _combine(steps, weight, bias)
        products = _combine([x], weight.transpose(0, 1).flatten(1).unsqueeze(0), None)
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
        x, g = _prepared(x, g)
        if on_cpu(x):
            return _cpu.outer([x] * length, [g] * length, index).to(dtype)
        return _correlate([_step(index, x, step) for step in range(length)], [g] * length)


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
    return _spiral_conv(*spirals, *_checked(spirals[0].size(0), x, weight, bias), False)
