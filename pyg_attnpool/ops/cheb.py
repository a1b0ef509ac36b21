r"""The Chebyshev convolution on one static graph, forward and backward, on rows :obj:`[N, B, F]`.

The batch lies beside the channels, so that one sparse product serves all samples. No neighbours
are gathered into memory. Only the input is kept for the backward pass, which computes the Chebyshev
terms again: this costs less than to keep them.
"""

from typing import Any

from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import on_cpu, operator, own_types
from pyg_attnpool.ops.dense import checked, combine, correlate, prepared
from pyg_attnpool.ops.sparse import spmm

Laplacian = tuple[Tensor, Tensor, Tensor]  # rowptr, col and value of a symmetric matrix


def _propagate(laplacian: Laplacian, x: Tensor, scale: float, minus: Tensor | None) -> Tensor:
    # scale * L x - minus, in one pass where that is compiled.
    rowptr, col, value = laplacian
    value, rows = value.to(x.dtype), x.reshape(x.size(0), -1)
    if on_cpu(x):
        return _cpu.spmm(rowptr, col, value, rows, None, scale, minus).view(x.shape)
    y = spmm(rowptr, col, scale * value, rows).view(x.shape)
    return y if minus is None else y - minus


def _terms(laplacian: Laplacian, x: Tensor, K: int) -> list[Tensor]:
    # T_0 x to T_{K-1} x. They may lie in the workspace, which the next call overwrites.
    if on_cpu(x):
        return _cpu.terms(laplacian[0], laplacian[1], laplacian[2].to(x.dtype), x, K)
    terms = [x]
    while len(terms) < K:
        scale, minus = (1.0, None) if len(terms) == 1 else (2.0, terms[-2])
        terms.append(_propagate(laplacian, terms[-1], scale, minus))
    return terms


def _clenshaw(laplacian: Laplacian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # b_k = x W_k + 2 L b_{k+1} - b_{k+2} from the last term down; the first one has L for 2 L.
    following: Tensor | None = None
    out = combine([x], weight[-1:], None)
    for k in reversed(range(weight.size(0) - 1)):
        product = combine([x], weight[k : k + 1], None)
        minus = -product if following is None else following - product
        out, following = _propagate(laplacian, out, 2.0 if k > 0 else 1.0, minus), out
    return out if bias is None else out + bias


@operator("cheb_conv", decomposes=True)
def _cheb_conv(
    rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    dtype = x.dtype
    with own_types(x):
        x, weight, bias = prepared(x), prepared(weight), prepared(bias)
        narrower = _clenshaw if weight.size(2) < weight.size(1) else _recurrence
        out = narrower((rowptr, col, value), x, weight, bias).to(dtype)
    return out


def _recurrence(laplacian: Laplacian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return combine(_terms(laplacian, x, weight.size(0)), weight, bias)


@_cheb_conv.register_fake
def _(*inputs: Any) -> Tensor:
    _, _, _, x, weight, _ = inputs
    return x.new_empty(*x.shape[:2], weight.size(2))


def _cheb_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rowptr, col, value, x, weight, _ = inputs
    ctx.save_for_backward(rowptr, col, value, x, weight)


def _cheb_conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    with own_types(x):
        x, g = prepared(x), prepared(g)
        laplacian = rowptr, col, value
        if x.size(-1) <= g.size(-1):
            return correlate(_terms(laplacian, x, K), [g] * K).to(dtype)
        return correlate([x] * K, _terms(laplacian, g, K)).to(dtype)


@_cheb_correlate.register_fake
def _(rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, g: Tensor, K: int) -> Tensor:
    return x.new_empty(K, x.size(-1), g.size(-1))


def _cheb_correlate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _cheb_correlate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, value, x, g = ctx.saved_tensors
    grad_x = _cheb_conv(rowptr, col, value, g, grad.transpose(1, 2), None)
    return None, None, None, grad_x, _cheb_conv(rowptr, col, value, x, grad, None), None


_cheb_correlate.register_autograd(_cheb_correlate_backward, setup_context=_cheb_correlate_setup)


@operator("cheb_grads")
def _cheb_grads(
    rowptr: Tensor, col: Tensor, value: Tensor, g: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    # The gradients of input and weights. Both can use the terms T_k(L) g. Where g is more than
    # twice as wide as x, two recurrences in the width of x are cheaper.
    dtype = x.dtype
    with own_types(x):
        g, x, weight = prepared(g), prepared(x), prepared(weight)
        laplacian, K, theta = (rowptr, col, value), weight.size(0), weight.transpose(1, 2)
        # The gradient of the input comes last: the backward pass goes on from it, in the cache.
        if g.size(-1) > 2 * x.size(-1):
            grad_weight = correlate(_terms(laplacian, x, K), [g] * K)
            grad_x = _clenshaw(laplacian, g, theta, None)
        else:
            terms = _terms(laplacian, g, K)
            grad_weight = correlate([x] * K, terms)
            grad_x = combine(terms, theta, None)
        return grad_x.to(dtype), grad_weight.to(dtype)


@_cheb_grads.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    *_, x, weight = inputs
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _cheb_grads_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _cheb_grads_backward(ctx: Any, h_x: Tensor, h_weight: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, value, g, x, weight = ctx.saved_tensors

    def conv(rows: Tensor, theta: Tensor) -> Tensor:
        return _cheb_conv(rowptr, col, value, rows, theta, None)

    grad_g = conv(h_x, weight) + conv(x, h_weight)
    grad_x = conv(g, h_weight.transpose(1, 2))
    grad_weight = _cheb_correlate(rowptr, col, value, h_x, g, weight.size(0))
    return None, None, None, grad_g, grad_x, grad_weight


_cheb_grads.register_autograd(_cheb_grads_backward, setup_context=_cheb_grads_setup)


def cheb_conv(laplacian: Laplacian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r"""The Chebyshev convolution :math:`\sum_k T_k(\hat{L}) \, \mathbf{x} \, \Theta_k +
    \mathbf{b}`, differentiable in everything but the Laplacian.

    If :math:`F' < F`, Clenshaw's algorithm runs the recurrence in the width :math:`F'` of the
    output; otherwise it runs in the width :math:`F` of the input.

    Args:
        laplacian (tuple): Row pointer, columns and values of the symmetric scaled Laplacian
            :math:`\hat{L}` in CSR form.
        x (torch.Tensor): Rows :obj:`[N, B, F]`.
        weight (torch.Tensor): Weights :math:`\Theta` :obj:`[K, F, F']`.
        bias (torch.Tensor, optional): Bias :obj:`[F']`.

    Returns:
        Rows :obj:`[N, B, F']`.

    Raises:
        ValueError: If :obj:`x` has another shape.

    >>> swap = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)
    >>> cheb_conv(swap, torch.tensor([[[1.0]], [[2.0]]]), torch.ones(2, 1, 1), None).flatten()
    tensor([3., 3.])
    """
    return _cheb_conv(*laplacian, *checked(laplacian[0].size(0) - 1, x, weight, bias))
