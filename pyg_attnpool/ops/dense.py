r"""Dense products on rows :obj:`[N, B, F]`, which the convolutions share."""

from typing import TypeVar

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import on_cpu, single

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def checked(
    num_nodes: int, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Checks the sizes of rows, since the compiled operations would read beyond others, and casts
    the arguments of a convolution to the type of autocast, as a matrix product does.

    Args:
        num_nodes (int): The number of vertices :math:`N`.
        x (torch.Tensor): Rows :obj:`[N, B, F]`.
        weight (torch.Tensor): Weights :obj:`[K, F, F']`.
        bias (torch.Tensor, optional): Bias :obj:`[F']`.

    Raises:
        ValueError: If :obj:`x` has another shape.
    """
    if x.dim() != 3 or x.size(0) != num_nodes or x.size(2) != weight.size(1):
        raise ValueError(
            f"Expected rows of shape [{num_nodes}, B, {weight.size(1)}] (got {list(x.shape)})"
        )
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def combine(terms: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    r""":math:`\sum_k \mathbf{x}_k \mathbf{W}_k + \mathbf{b}` of :math:`K` terms :obj:`[N, B, F]`
    and weights :obj:`[K, F, F']`: rows :obj:`[N, B, F']`.

    >>> combine([torch.ones(3, 2, 1), torch.ones(3, 2, 1)], torch.ones(2, 1, 4), None).unique()
    tensor([2.])
    """
    if on_cpu(weight):
        return _cpu.convolve_slots(terms, weight.contiguous(), bias)
    weight = weight.flatten(0, 1).t()
    return torch.nn.functional.linear(torch.cat(terms, dim=-1), weight, bias)


def correlate(x: list[Tensor], g: list[Tensor]) -> Tensor:
    r""":math:`\mathbf{x}_k^{\top} \mathbf{g}_k` of :math:`K` rows :obj:`[N, B, F]` and
    :obj:`[N, B, F']`, summed over vertices and samples: :obj:`[K, F, F']`."""
    if not on_cpu(x[0]):
        return torch.stack(
            [a.flatten(0, 1).t() @ b.flatten(0, 1) for a, b in zip(x, g, strict=True)]
        )
    if x[0].size(-1) > g[0].size(-1):  # vectors of the processor run along the second one
        return _cpu.outer(g, x).transpose(1, 2).contiguous()
    return _cpu.outer(x, g)


def prepared(tensor: MaybeTensor) -> MaybeTensor:
    r"""The tensor, contiguous, and at least in single precision where the compiled operations take
    it."""
    if tensor is None:
        return tensor
    return single(tensor) if on_cpu(tensor) else tensor.contiguous()
