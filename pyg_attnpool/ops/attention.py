import torch
import torch.nn.functional as F
from torch import Tensor

from pyg_attnpool.ops.gather import ell_rowptr, sddmm

TILE = 1 << 21  # scores held at a time


@torch.library.custom_op("pyg_attnpool::cosine_topk", mutates_args=())
def cosine_topk(query: Tensor, key: Tensor, k: int) -> Tensor:
    r"""The :math:`k` keys of largest cosine to every query, equations (3) and (4) of the paper.

    The :obj:`[M, N]` scores are formed a tile at a time and never kept. Of equal scores the
    smaller key index comes first, so that every backend selects the same.

    Args:
        query (torch.Tensor): Queries :obj:`[M, c]`.
        key (torch.Tensor): Keys :obj:`[N, c]`.
        k (int): The number of keys kept, at most :math:`N`.

    Returns:
        Key indices :obj:`[M, k]` in descending order of score.
    """
    num_query, num_key = query.size(0), key.size(0)
    index = torch.empty(num_query, k, dtype=torch.long, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1).t()
        rows = max(1, TILE // num_key)
        for start in range(0, num_query, rows):
            score = query[start : start + rows] @ key
            index[start : start + rows] = _topk(score, k)
    return index


@cosine_topk.register_fake
def _(query, key, k):
    return query.new_empty(query.size(0), k, dtype=torch.long)


def _topk(score: Tensor, k: int) -> Tensor:
    # torch.topk leaves open which of several equal scores it takes. One more than k shows the rows
    # where that matters, and only those are sorted in full.
    value, index = score.topk(min(k + 1, score.size(1)), dim=-1)
    index, order = index[:, :k].sort(dim=-1)
    order = value[:, :k].gather(1, order).sort(dim=-1, descending=True, stable=True).indices
    index = index.gather(1, order)
    if value.size(1) > k:
        tied = (value[:, k] == value[:, k - 1]).nonzero().squeeze(1)
        if tied.numel() > 0:
            full = score[tied].sort(dim=-1, descending=True, stable=True).indices
            index[tied] = full[:, :k]
    return index


def attention(
    query: Tensor, key: Tensor, k: int, log_beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The learned mapping in slots, equations (3) to (6) of the paper, differentiable in
    everything but the choice of the slots.

    Args:
        query (torch.Tensor): Queries of the target vertices :obj:`[M, c]`.
        key (torch.Tensor): Keys of the source vertices :obj:`[N, c]`.
        k (int): The number of slots per target vertex.
        log_beta (torch.Tensor, optional): If given, weights are
            :math:`\textrm{softmax}(\exp(\textrm{log\_beta}) \cdot s)`; otherwise scores are
            clamped to at least :math:`10^{-25}` and divided by their sum. (default: :obj:`None`)

    Returns:
        Source vertices and weights :obj:`[M, k]`.
    """
    with torch.autocast(query.device.type, enabled=False):
        index = cosine_topk(query.detach(), key.detach(), k)
        return index, _weights(cosine_at(query, key, index), log_beta)


def dense_attention(query: Tensor, key: Tensor, log_beta: Tensor | None = None) -> Tensor:
    r"""The learned mapping with every source vertex kept, as a dense matrix :obj:`[M, N]`. For
    small levels: scores and weights are held, and kept for the backward pass.

    Args:
        query (torch.Tensor): Queries of the target vertices :obj:`[M, c]`.
        key (torch.Tensor): Keys of the source vertices :obj:`[N, c]`.
        log_beta (torch.Tensor, optional): As in :meth:`attention`. (default: :obj:`None`)
    """
    with torch.autocast(query.device.type, enabled=False):
        return _weights(F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).t(), log_beta)


def _weights(score: Tensor, log_beta: Tensor | None) -> Tensor:
    if log_beta is not None:
        return (log_beta.exp() * score).softmax(dim=-1)
    kept = score.clamp(min=1e-25)
    return kept / kept.sum(dim=-1, keepdim=True)


def cosine_at(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    r"""The cosine of every query :obj:`[M, c]` to the keys :obj:`[N, c]` in its slots
    :obj:`[M, k]`."""
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    return sddmm(ell_rowptr(index), index.flatten(), query, key).view_as(index)
