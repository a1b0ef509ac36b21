r"""The two layouts of vertex features: :obj:`[B, N, F]` for users, rows :obj:`[N, B, F]` for sparse
products."""

from collections.abc import Callable

import torch
from torch import Tensor


def on_rows(x: Tensor, num_nodes: int, op: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Calls :obj:`op` on features laid out as rows :obj:`[num_nodes, B, F]`.

    In rows the batch lies beside the channels, so that one sparse product serves all samples. The
    result is contiguous in the caller's layout. Several operations in a row should share one call,
    which saves a copy after each.

    >>> import torch
    >>> x = torch.arange(6.0).view(2, 3, 1)  # two samples of three vertices
    >>> on_rows(x, 3, lambda rows: rows[:2].cumsum(0)).flatten(1)
    tensor([[0., 1.],
            [3., 7.]])

    Args:
        x (torch.Tensor): Features :obj:`[N, F]`, :obj:`[B, N, F]`, or a mini-batch
            :obj:`[B * N, F]`.
        num_nodes (int): The number of nodes :math:`N`.
        op (callable): Maps rows :obj:`[N, B, F]` to rows :obj:`[M, B, F']`.

    Returns:
        Features in the layout of :obj:`x`, with :math:`M` for :math:`N` and :math:`F'` for
        :math:`F`.

    Raises:
        ValueError: If the shape of :obj:`x` is none of the three.
        TypeError: If :obj:`x` is not of floating point numbers.
    """
    batched = x.dim() == 3 and x.size(1) == num_nodes
    stacked = x.dim() == 2 and x.size(0) > 0 and x.size(0) % num_nodes == 0
    if not (batched or stacked):
        raise ValueError(
            f"Expected features of shape [{num_nodes}, F], [B, {num_nodes}, F] or "
            f"[B * {num_nodes}, F] (got {list(x.shape)})"
        )
    if not x.is_floating_point():
        raise TypeError(f"Expected floating point features (got {x.dtype})")
    if x.layout != torch.strided:
        raise TypeError(f"Expected dense features (got {x.layout})")
    if x.size(-1) == 0:
        raise ValueError(f"Expected at least one feature (got {list(x.shape)})")
    y = x if batched else x.view(-1, num_nodes, x.size(1))
    y = op(y.transpose(0, 1)).transpose(0, 1).contiguous()
    return y if batched else y.flatten(0, 1)
