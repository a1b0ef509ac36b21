r"""The learned mapping: the search for the largest cosines, and the weights at what it finds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.gather import (
    Pattern,
    at_least_single,
    ell_rowptr,
    on_cpu,
    on_gpu,
    sddmm,
    transpose,
)
from pyg_attnpool.ops.operator import operator

TILE = 1 << 21  # scores held at a time


class Search:
    r"""The search for the :math:`k` keys of largest cosine to every query, for queries and keys
    that move little from one call to the next, as parameters do in training.

    As molecular dynamics does with its neighbour lists, it keeps more candidates than are asked
    for, and for each query an angle within which no other key can be: that of its last candidate
    when it was searched, less all that query and keys have turned by since. A query whose
    :math:`k`-th candidate is closer than this angle needs no search. The others are searched, with
    their candidates' scores as a filter. The result is that of a full search, always: what queries
    and keys turned by is taken from their values, whoever changed them.

    It is remembered outside of :obj:`state_dict`, copied with the layer, and kept where the
    compiled operations run; elsewhere every call is a full search.

    Args:
        num_query (int): The number of queries :math:`M`.
        num_key (int): The number of keys :math:`N`.
        channels (int): Size of each query and key.
        k (int): The number of keys kept.
        dtype (torch.dtype, optional): The type of queries and keys.
            (default: :obj:`torch.float32`)
    """

    def __init__(
        self,
        num_query: int,
        num_key: int,
        channels: int,
        k: int,
        dtype: torch.dtype = torch.float32,
    ):
        # Twice as many last for some steps; more cost more in every one.
        kept = min(num_key, -(-2 * k // 16) * 16)
        self.last_query = torch.zeros(num_query, channels, dtype=dtype)
        self.last_key = torch.zeros(num_key, channels, dtype=dtype)
        self.candidates = torch.arange(kept, dtype=torch.int32).repeat(num_query, 1)
        self.angle = torch.zeros(num_query, dtype=torch.float64)
        self.searched = torch.zeros(2, dtype=torch.long)

    @property
    def share(self) -> float:
        r"""The share of queries that were searched, of all that were asked for."""
        return (self.searched[0] / self.searched[1].clamp(min=1)).item()

    def __call__(self, query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
        r"""The keys :obj:`[M, k]` of largest cosine to every query, best first, and these."""
        known = query.shape == self.last_query.shape and key.shape == self.last_key.shape
        known = known and at_least_single(query.dtype) == self.last_query.dtype
        if not on_cpu(query) or not known or not 1 <= k <= self.candidates.size(1):
            return _topk(query, key, k)
        state = self.last_query, self.last_key, self.candidates, self.angle, self.searched
        return _topk_again(query, key, k, *state)


@operator("topk_again", ("last_query", "last_key", "candidates", "angle", "searched"))
def _topk_again(
    query: Tensor,
    key: Tensor,
    k: int,
    last_query: Tensor,
    last_key: Tensor,
    candidates: Tensor,
    angle: Tensor,
    searched: Tensor,
) -> tuple[Tensor, Tensor]:
    state = last_query, last_key, candidates, angle, searched
    return _cpu.topk(*_single(query, key), k, *state)


@_topk_again.register_fake
def _(query, key, k, last_query, last_key, candidates, angle, searched):
    return _fake_topk(query, k)


def _single(*tensors: Tensor) -> list[Tensor]:
    return [t.to(at_least_single(t.dtype)).contiguous() for t in tensors]


def _normalized(rows: Tensor) -> Tensor:
    return F.normalize(*_single(rows), dim=-1)


def _fake_topk(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = query.size(0), k
    dtype = at_least_single(query.dtype)
    return query.new_empty(size, dtype=torch.long), query.new_empty(size, dtype=dtype)


@operator("topk")
def _topk(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    num_query, num_key = query.size(0), key.size(0)
    if query.size(1) != key.size(1) or not 1 <= k <= num_key:
        raise ValueError(
            f"Expected queries and keys of as many channels and 'k' between 1 and the number of "
            f"keys (got {list(query.shape)}, {list(key.shape)} and {k})"
        )
    if on_cpu(query):
        dtype = at_least_single(query.dtype)
        once = Search(num_query, num_key, query.size(1), k, dtype)
        once.candidates = once.candidates[:, :k].contiguous()  # none to spare for another call
        return once(query, key, k)
    with torch.autocast(query.device.type, enabled=False):
        query, key = _normalized(query), _normalized(key)
        if on_gpu(query):
            from pyg_attnpool.ops import _triton

            if k <= _triton.MAX_K:
                score, index = _triton.topk(query, key, k)
                return index, score
        rows = max(1, TILE // num_key)
        found = [_largest(tile @ key.t(), k) for tile in query.split(rows)]
    index, score = zip(*found, strict=True)
    return torch.cat(index), torch.cat(score)


@_topk.register_fake
def _(query, key, k):
    return _fake_topk(query, k)


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
    return _topk(query.detach(), key.detach(), k)[0]


def _largest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
    return index, score.gather(1, index)


def attention(
    query: Tensor,
    key: Tensor,
    k: int,
    log_beta: Tensor | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    share: Tensor | None = None,
    search: Search | None = None,
) -> tuple[Tensor, Tensor, Pattern | None]:
    r"""The learned mapping in slots, equations (3) to (7) of the paper, differentiable in
    everything but the choice of the slots.

    Args:
        query (torch.Tensor): Queries of the target vertices :obj:`[M, c]`.
        key (torch.Tensor): Keys of the source vertices :obj:`[N, c]`.
        k (int): The number of learned slots per target vertex.
        log_beta (torch.Tensor, optional): If given, weights are
            :math:`\textrm{softmax}(\exp(\textrm{log\_beta}) \cdot s)`; otherwise scores are
            clamped to at least :math:`10^{-25}` and divided by their sum. (default: :obj:`None`)
        prior (tuple, optional): Source vertices and weights :obj:`[M, P]` of the prior, whose
            slots follow the learned ones. (default: :obj:`None`)
        share (torch.Tensor, optional): The share :math:`w_a` of the learned slots beside those of
            the prior. (default: :obj:`None`)
        search (Search, optional): If given, what the last call found is used again.
            (default: :obj:`None`)

    Returns:
        Source vertices and weights :obj:`[M, k + P]`, and where gradients are recorded the
        transposed pattern, for :meth:`~pyg_attnpool.ops.gather.apply_mapping`.
    """
    with torch.autocast(query.device.type, enabled=False):
        find = _topk if search is None else search
        index, score = find(query.detach(), key.detach(), k)
        prior_weight = query.new_empty(query.size(0), 0)
        if prior is not None:
            index, prior_weight = torch.cat([index, prior[0]], dim=1), prior[1].to(query.dtype)
        transposed = None
        if torch.is_grad_enabled():
            transposed = transpose(ell_rowptr(index), index.flatten(), key.size(0))
        inputs = query, key, log_beta, share, index, prior_weight, *(transposed or [None] * 3)
        weight = _attention(*inputs, score) if on_cpu(query) else _composed(*inputs)
    return index, weight, transposed


def _composed(
    query: Tensor,
    key: Tensor,
    log_beta: Tensor | None,
    share: Tensor | None,
    index: Tensor,
    prior: Tensor,
    *transposed: Tensor | None,
) -> Tensor:
    # The prior's slots have a score too, so that one pattern serves for all.
    query, key = _normalized(query), _normalized(key)
    pattern = None if transposed[0] is None else transposed
    score = sddmm(ell_rowptr(index), index.flatten(), query, key, pattern).view_as(index)
    weight = _weights(score[:, : index.size(1) - prior.size(1)], log_beta)
    return weight if share is None else torch.cat([share * weight, (1 - share) * prior], dim=1)


@operator("attention")
def _attention(
    query: Tensor,
    key: Tensor,
    log_beta: Tensor | None,
    share: Tensor | None,
    index: Tensor,
    prior: Tensor,
    rowptr_t: Tensor | None,
    col_t: Tensor | None,
    perm: Tensor | None,
    score: Tensor,
) -> Tensor:
    # As `_composed`, from the cosines that the search has found.
    return _cpu.attention(score, *_single(prior), *_scalars(log_beta, share)).to(query.dtype)


@_attention.register_fake
def _(query, key, log_beta, share, index, prior, rowptr_t, col_t, perm, score):
    return query.new_empty(index.shape)


def _scalars(log_beta: Tensor | None, share: Tensor | None) -> tuple[float, float]:
    scale = 0.0 if log_beta is None else log_beta.exp().item()
    return scale, 1.0 if share is None else share.item()


@operator("attention_backward")
def _attention_backward(
    query: Tensor,
    key: Tensor,
    log_beta: Tensor | None,
    share: Tensor | None,
    index: Tensor,
    prior: Tensor,
    rowptr_t: Tensor,
    col_t: Tensor,
    perm: Tensor,
    score: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _single(query, key)
    weights = score, *_single(prior), *_scalars(log_beta, share), *_single(grad)
    out = _cpu.attention_backward(*rows, index, *weights, (rowptr_t, col_t, perm))
    return tuple(t.to(query.dtype) for t in out)


@_attention_backward.register_fake
def _(query, key, log_beta, share, index, prior, rowptr_t, col_t, perm, score, grad):
    return query.new_empty(query.shape), key.new_empty(key.shape), query.new_empty(2)


def _attention_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _attention_grads(ctx, grad):
    *inputs, score = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # second derivatives are asked for
        learned = [t for t, need in zip(inputs, needed, strict=False) if need]
        found = iter(torch.autograd.grad(_composed(*inputs), learned, grad, create_graph=True))
        grads = [next(found) if need else None for need in needed]
    else:
        of_query, of_key, scalars = _attention_backward(*inputs, score, grad)
        grads = of_query, of_key, scalars[1], scalars[0]
        grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return *grads, *[None] * 6


_attention.register_autograd(_attention_grads, setup_context=_attention_setup)


def dense_attention(query: Tensor, key: Tensor, log_beta: Tensor | None = None) -> Tensor:
    r"""The learned mapping with every source vertex kept, as a dense matrix :obj:`[M, N]`. For
    small levels: scores and weights are held, and kept for the backward pass.

    Args:
        query (torch.Tensor): Queries of the target vertices :obj:`[M, c]`.
        key (torch.Tensor): Keys of the source vertices :obj:`[N, c]`.
        log_beta (torch.Tensor, optional): As in :meth:`attention`. (default: :obj:`None`)
    """
    with torch.autocast(query.device.type, enabled=False):
        return _weights(_normalized(query) @ _normalized(key).t(), log_beta)


def _weights(score: Tensor, log_beta: Tensor | None) -> Tensor:
    if log_beta is not None:
        return (log_beta.exp() * score).softmax(dim=-1)
    kept = score.clamp(min=1e-25)
    return kept / kept.sum(dim=-1, keepdim=True)


def cosine_at(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    r"""The cosine of every query :obj:`[M, c]` to the keys :obj:`[N, c]` in its slots
    :obj:`[M, k]`."""
    query, key = _normalized(query), _normalized(key)
    return sddmm(ell_rowptr(index), index.flatten(), query, key).view_as(index)
