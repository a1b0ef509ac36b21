r"""Sparse products on a CSR pattern: apply a mapping or a Laplacian, forward and backward.

The derivatives of either product are again these two products:

.. math::
    \textrm{spmm}(v, x)_i = \sum_{e \in \textrm{row } i} v_e \, x_{\textrm{col}(e)}
    \qquad
    \textrm{sddmm}(a, b)_e = \langle a_{\textrm{row}(e)}, b_{\textrm{col}(e)} \rangle

Neither product holds a dense matrix, or one row of features per entry. Both are custom operators,
so that :func:`torch.compile` meets no graph break. On a CPU they are compiled
(:mod:`pyg_attnpool.ops._cpu`), on a GPU they are Triton kernels
(:mod:`pyg_attnpool.ops._triton`); elsewhere they are operations of PyTorch.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import (
    at_least_single,
    composing,
    on_cpu,
    on_gpu,
    operator,
    readable,
    single,
)
from pyg_attnpool.ops.layout import on_rows

Pattern = tuple[Tensor, Tensor, Tensor]  # rowptr, col, and the entry that each entry came from


@operator("transpose")
def transpose(rowptr: Tensor, col: Tensor, num_cols: int) -> Pattern:
    r"""The CSR pattern of the transposed matrix.

    Args:
        rowptr (torch.Tensor): Row pointer :obj:`[M + 1]`.
        col (torch.Tensor): Column of every entry :obj:`[E]`, in any order within a row.
        num_cols (int): The number of columns :math:`N`.

    Returns:
        :obj:`rowptr` :obj:`[N + 1]` and :obj:`col` :obj:`[E]` of the transposed matrix, and the
        permutation :obj:`[E]` that takes values to their transposed order.

    >>> transpose(torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1]), 2)
    (tensor([0, 1, 3]), tensor([0, 0, 1]), tensor([1, 0, 2]))
    """
    if on_cpu(col):
        return _cpu.transpose(rowptr.contiguous(), col.contiguous(), num_cols)
    if not col.is_cuda:  # which would have to be waited for
        _check_pattern(rowptr, col, num_cols)
    sorted_col, perm = col.sort(stable=True)
    row = row_of_entries(rowptr, col)
    ends = torch.arange(num_cols + 1, device=col.device)
    return torch.searchsorted(sorted_col, ends), row[perm], perm


@transpose.register_fake
def _(rowptr: Tensor, col: Tensor, num_cols: int) -> Pattern:
    return rowptr.new_empty(num_cols + 1), torch.empty_like(col), torch.empty_like(col)


def row_of_entries(rowptr: Tensor, col: Tensor) -> Tensor:
    r"""The row of every entry :obj:`[E]` of a CSR pattern: the number of rows that ended before it.

    >>> row_of_entries(torch.tensor([0, 2, 2, 3]), torch.tensor([4, 5, 6]))
    tensor([0, 0, 2])
    """
    ended = rowptr.new_zeros(col.size(0) + 1)
    return ended.scatter_add(0, rowptr[1:], torch.ones_like(rowptr[1:])).cumsum(0)[:-1]


def scatter_product(
    rowptr: Tensor, col: Tensor, perm: Tensor | None, value: Tensor, x: Tensor, *transposed: Any
) -> Tensor:
    r"""As :meth:`spmm`, by operations that can be differentiated in any way, batched and traced,
    and that ONNX has. They hold a row for every entry.

    >>> rowptr, col = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1])
    >>> scatter_product(rowptr, col, None, torch.ones(3), torch.tensor([[1.0], [10.0]]))
    tensor([[11.],
            [10.]])
    """
    value = value if perm is None else value[perm]
    entries = single(value.unsqueeze(1) * x.index_select(0, col))
    out = entries.new_zeros(rowptr.size(0) - 1, x.size(1))
    row = row_of_entries(rowptr, col)
    return out.scatter_add(0, row.unsqueeze(1).expand_as(entries), entries).to(x.dtype)


def _check_pattern(rowptr: Tensor, col: Tensor, num_cols: int) -> None:
    # PyTorch's own operations follow indices unchecked, but for those that are recorded.
    if not readable(rowptr, col):
        return
    ascends = rowptr[0] == 0 and rowptr[-1] == col.numel() and (rowptr.diff() >= 0).all()
    if not ascends or (col.numel() > 0 and not 0 <= col.min() <= col.max() < num_cols):
        raise ValueError(
            f"Expected columns from 0 to {num_cols - 1}, and a row pointer that ascends to the "
            f"number of entries {col.numel()} (got others)"
        )


@operator("spmm", decomposes=True)
def _spmm(
    rowptr: Tensor,
    col: Tensor,
    perm: Tensor | None,
    value: Tensor,
    x: Tensor,
    rowptr_t: Tensor | None = None,
    col_t: Tensor | None = None,
    perm_t: Tensor | None = None,
) -> Tensor:
    # Entry e has the value `value[perm[e]]`, or `value[e]` without a permutation.
    if value.numel() != col.numel():
        raise ValueError(f"Expected {col.numel()} values (got {value.numel()})")
    if value.numel() == 0 or x.numel() == 0:
        return x.new_zeros(rowptr.numel() - 1, x.size(1))
    rowptr, col = rowptr.contiguous(), col.contiguous()
    if on_cpu(x):
        dtype = at_least_single(x.dtype)
        value, rows = value.to(dtype).contiguous(), x.to(dtype).contiguous()
        return _cpu.spmm(rowptr, col, value, rows, perm).to(x.dtype)
    value = value.contiguous() if perm is None else value[perm]
    if on_gpu(x):
        from pyg_attnpool.ops import _triton

        return _triton.spmm(rowptr, col, value, x.contiguous())
    _check_pattern(rowptr, col, x.size(0))
    if composing():
        return scatter_product(rowptr, col, None, value, x)
    return F.embedding_bag(
        col,
        x.contiguous(),
        rowptr,
        mode="sum",
        per_sample_weights=value,
        include_last_offset=True,
    )


@_spmm.register_fake
def _(
    rowptr: Tensor,
    col: Tensor,
    perm: Tensor | None,
    value: Tensor,
    x: Tensor,
    *transposed: Tensor | None,
) -> Tensor:
    return x.new_empty(rowptr.size(0) - 1, x.size(1))


def _spmm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rowptr, col, perm, value, x, *transposed = inputs
    keep_x = x if ctx.needs_input_grad[3] else None
    ctx.num_cols = x.size(0)
    ctx.save_for_backward(rowptr, col, perm, value, keep_x, *transposed)


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, perm, value, x, rowptr_t, col_t, perm_t = ctx.saved_tensors
    needs_value, needs_x = ctx.needs_input_grad[3:5]
    grad_value = grad_x = None
    if needs_x and rowptr_t is None:
        rowptr_t, col_t, perm_t = transpose(rowptr, col, ctx.num_cols)
        perm_t = perm_t if perm is None else perm[perm_t]
    if needs_value and needs_x and perm is None:
        grad_value, grad_x = _spmm_grads(rowptr, col, value, grad, x, rowptr_t, col_t, perm_t)
        return None, None, None, grad_value, grad_x, None, None, None
    if needs_value:
        grad_value = sddmm(rowptr, col, grad, x)
        if perm is not None:
            grad_value = torch.empty_like(grad_value).index_put((perm,), grad_value)
    if needs_x:
        grad_x = _spmm(rowptr_t, col_t, perm_t, value, grad, None, None, None)
    return None, None, None, grad_value, grad_x, None, None, None


_spmm.register_autograd(_spmm_backward, setup_context=_spmm_setup)


@operator("spmm_grads")
def _spmm_grads(
    rowptr: Tensor,
    col: Tensor,
    value: Tensor,
    grad: Tensor,
    x: Tensor,
    rowptr_t: Tensor,
    col_t: Tensor,
    perm_t: Tensor,
) -> tuple[Tensor, Tensor]:
    # The gradients of value and x in one pass, since both read the same rows of `grad`.
    pattern = rowptr_t.contiguous(), col_t.contiguous(), perm_t.contiguous()
    if on_cpu(x) and value.numel() > 0 and x.numel() > 0:
        dtype = at_least_single(x.dtype)
        values, rows, of_rows = (t.to(dtype).contiguous() for t in (value, x, grad))
        grad_x, grad_value = _cpu.spmm_grads(*pattern, values, of_rows, rows)
        return grad_value.to(x.dtype), grad_x.to(x.dtype)
    grad_value = sddmm(rowptr, col, grad, x)
    return grad_value, _spmm(rowptr_t, col_t, perm_t, value, grad, None, None, None)


@_spmm_grads.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    _, _, value, _, x, *_ = inputs
    return value.new_empty(value.shape), x.new_empty(x.shape)


def _spmm_grads_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _spmm_grads_backward(ctx: Any, of_value: Tensor, of_x: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, value, grad, x, *transposed = ctx.saved_tensors
    grad_value = grad_grad = grad_x = None
    if ctx.needs_input_grad[2]:
        grad_value = sddmm(rowptr, col, grad, of_x)
    if ctx.needs_input_grad[3]:
        grad_grad = spmm(rowptr, col, of_value, x) + spmm(rowptr, col, value, of_x)
    if ctx.needs_input_grad[4]:
        grad_x = _spmm(*transposed, of_value, grad, None, None, None)
    return None, None, grad_value, grad_grad, grad_x, None, None, None


_spmm_grads.register_autograd(_spmm_grads_backward, setup_context=_spmm_grads_setup)


def spmm(
    rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, transposed: Pattern | None = None
) -> Tensor:
    r"""Product of a sparse :obj:`[M, N]` matrix in CSR form with dense rows.

    Differentiable in :obj:`value` and :obj:`x`. Entries may repeat and stand in any order.

    Args:
        rowptr (torch.Tensor): Row pointer :obj:`[M + 1]`.
        col (torch.Tensor): Column of every entry :obj:`[E]`.
        value (torch.Tensor): Value of every entry :obj:`[E]`, of the type of :obj:`x`.
        x (torch.Tensor): Dense rows :obj:`[N, C]`.
        transposed (tuple, optional): The result of :meth:`transpose`. Where a pattern is used
            often, this saves every backward pass the transposition. (default: :obj:`None`)

    Returns:
        The rows :obj:`[M, C]`.

    >>> rowptr, col, value = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.ones(3)
    >>> spmm(rowptr, col, value, torch.tensor([[1.0, 2.0], [10.0, 20.0]]))
    tensor([[11., 22.],
            [10., 20.]])
    """
    return _spmm(rowptr, col, None, value, x, *(transposed or (None, None, None)))


@operator("sddmm")
def _sddmm(
    rowptr: Tensor,
    col: Tensor,
    a: Tensor,
    b: Tensor,
    rowptr_t: Tensor | None = None,
    col_t: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    if rowptr.numel() != a.size(0) + 1:
        raise ValueError(f"Expected a row pointer of {a.size(0) + 1} (got {rowptr.numel()})")
    if col.numel() == 0 or a.size(1) == 0:
        return a.new_zeros(col.numel())
    rowptr, col = rowptr.contiguous(), col.contiguous()
    if on_gpu(a):
        from pyg_attnpool.ops import _triton

        return _triton.sddmm(rowptr, col, a.contiguous(), b.contiguous())
    dtype = at_least_single(a.dtype)
    left, right = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    if on_cpu(a):
        return _cpu.sddmm(rowptr, col, left, right).to(a.dtype)
    if composing():
        return (left[row_of_entries(rowptr, col)] * right[col]).sum(dim=1).to(a.dtype)
    _check_pattern(rowptr, col, b.size(0))
    # The sampled product takes no half precision, and no more entries than a dense matrix of its
    # shape has. Where entries repeat and need more room, zero rows make the matrix larger.
    missing = -(-col.numel() // a.size(0)) - b.size(0)
    right = F.pad(right, (0, 0, 0, missing)) if missing > 0 else right
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        zeros = torch.zeros(col.numel(), dtype=dtype, device=a.device)
        pattern = torch.sparse_csr_tensor(
            rowptr, col, zeros, (left.size(0), right.size(0)), check_invariants=False
        )
        out = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0)
    return out.values().to(a.dtype)


@_sddmm.register_fake
def _(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, *transposed: Tensor | None) -> Tensor:
    return a.new_empty(col.size(0))


def _sddmm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, a, b, rowptr_t, col_t, perm = ctx.saved_tensors
    grad_a = grad_b = None
    if ctx.needs_input_grad[2]:
        grad_a = spmm(rowptr, col, grad, b)
    if ctx.needs_input_grad[3]:
        if rowptr_t is None:
            rowptr_t, col_t, perm = transpose(rowptr, col, b.size(0))
        grad_b = _spmm(rowptr_t, col_t, perm, grad, a, None, None, None)
    return None, None, grad_a, grad_b, None, None, None


_sddmm.register_autograd(_sddmm_backward, setup_context=_sddmm_setup)


def sddmm(
    rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, transposed: Pattern | None = None
) -> Tensor:
    r"""Row-wise dot products at the entries of a sparse :obj:`[M, N]` pattern in CSR form.

    Differentiable in :obj:`a` and :obj:`b`.

    Args:
        rowptr (torch.Tensor): Row pointer :obj:`[M + 1]`.
        col (torch.Tensor): Column of every entry :obj:`[E]`.
        a (torch.Tensor): Left rows :obj:`[M, C]`.
        b (torch.Tensor): Right rows :obj:`[N, C]`.
        transposed (tuple, optional): As in :meth:`spmm`. (default: :obj:`None`)

    Returns:
        One value per entry :obj:`[E]`.

    >>> sddmm(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.ones(1, 2), torch.eye(2) * 3)
    tensor([3., 3.])
    """
    return _sddmm(rowptr, col, a, b, *(transposed or (None, None, None)))


def ell_rowptr(index: Tensor) -> Tensor:
    r"""The CSR row pointer :obj:`[M + 1]` of a pattern :obj:`[M, k]` with :math:`k` slots in every
    row.

    >>> ell_rowptr(torch.zeros(3, 2))
    tensor([0, 2, 4, 6])
    """
    num_rows, k = index.shape
    return torch.arange(num_rows + 1, device=index.device) * k


def apply_mapping(
    index: Tensor, weight: Tensor, x: Tensor, num_source: int, transposed: Pattern | None = None
) -> Tensor:
    r"""Applies a mapping (equation (1) of the paper), differentiable in :obj:`weight` and
    :obj:`x`. The result has the type and layout of :obj:`x`, and is contiguous.

    Args:
        index (torch.Tensor): Source vertex of every slot :obj:`[M, k]`.
        weight (torch.Tensor): Weight of every slot :obj:`[M, k]`.
        x (torch.Tensor): Features :obj:`[N, F]`, :obj:`[B, N, F]` or :obj:`[B * N, F]`.
        num_source (int): The number of source vertices :math:`N`.
        transposed (tuple, optional): As in :meth:`spmm`. (default: :obj:`None`)

    Raises:
        ValueError: If :obj:`x` has none of the three shapes.
        TypeError: If :obj:`x` is not of floating point numbers.

    >>> index, weight = torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]])
    >>> apply_mapping(index, weight, torch.tensor([[4.0], [8.0]]), num_source=2)
    tensor([[7.]])
    """
    return on_rows(
        x, num_source, lambda rows: map_rows(index, weight, rows, num_source, transposed)
    )


def map_rows(
    index: Tensor, weight: Tensor, rows: Tensor, num_source: int, transposed: Pattern | None = None
) -> Tensor:
    r"""As :meth:`apply_mapping`, from rows :obj:`[N, B, F]` to rows :obj:`[M, B, F]`.

    >>> index, weight = torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]])
    >>> map_rows(index, weight, torch.tensor([[[4.0, 0.0]], [[8.0, 4.0]]]), num_source=2)
    tensor([[[7., 3.]]])
    """
    if rows.dim() != 3 or rows.size(0) != num_source:
        raise ValueError(f"Expected rows of shape [{num_source}, B, F] (got {list(rows.shape)})")
    value = weight.flatten().to(rows.dtype)
    flat = rows.reshape(rows.size(0), -1)
    y = spmm(ell_rowptr(index), index.flatten(), value, flat, transposed)
    return y.view(index.size(0), *rows.shape[1:])


def fuse_slots(
    index: Tensor, weight: Tensor, prior_index: Tensor, prior_weight: Tensor, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    r"""Mixes two mappings by scaling and concatenating their slots (equation (7)):
    :math:`\alpha \cdot \textrm{weight} + (1 - \alpha) \cdot \textrm{prior}`.

    Args:
        index (torch.Tensor): Source vertex of every slot :obj:`[M, k]`.
        weight (torch.Tensor): Weight of every slot :obj:`[M, k]`.
        prior_index (torch.Tensor): Source vertex of every slot of the prior :obj:`[M, P]`.
        prior_weight (torch.Tensor): Weight of every slot of the prior :obj:`[M, P]`.
        alpha (float or torch.Tensor): The share :math:`\alpha` of the first mapping.

    Returns:
        Source vertices and weights :obj:`[M, k + P]`.

    >>> one = torch.ones(1, 1)
    >>> fuse_slots(torch.tensor([[3]]), one, torch.tensor([[5]]), one, 0.25)
    (tensor([[3, 5]]), tensor([[0.2500, 0.7500]]))
    """
    weight = torch.cat([alpha * weight, (1 - alpha) * prior_weight], dim=1)
    return torch.cat([index, prior_index], dim=1), weight
