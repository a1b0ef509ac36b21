r"""Dense products on rows :obj:`[N, B, F]`, which the convolutions share."""

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import at_least_single, on_cpu


def checked(num_nodes: int, x: Tensor, weight: Tensor, bias: Tensor | None):
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


def combine(terms: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    # The sum over k of the k-th term times the k-th weight.
    if on_cpu(weight):
        return _cpu.convolve_slots(terms, weight.contiguous(), bias)
    weight = weight.flatten(0, 1).t()
    return torch.nn.functional.linear(torch.cat(terms, dim=-1), weight, bias)


def correlate(x: list[Tensor], g: list[Tensor]) -> Tensor:
    # x_k^T g_k over all vertices and samples, [K, F, F'].
    if not on_cpu(x[0]):
        return torch.stack(
            [a.flatten(0, 1).t() @ b.flatten(0, 1) for a, b in zip(x, g, strict=True)]
        )
    if x[0].size(-1) > g[0].size(-1):  # the wider one fills the vectors
        return _cpu.outer(g, x).transpose(1, 2).contiguous()
    return _cpu.outer(x, g)


def prepared(*tensors: Tensor | None) -> list[Tensor | None]:
    # The compiled operations know contiguous single and double precision.
    single = [t if t is None or not on_cpu(t) else t.to(at_least_single(t.dtype)) for t in tensors]
    return [t if t is None else t.contiguous() for t in single]
