r"""The weights of the learned mapping at the keys that the search finds, equations (5) to (7)."""

from typing import Any

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import (
    at_least_single,
    composing,
    on_cpu,
    operator,
    own_types,
    single,
)
from pyg_attnpool.ops.search import Search, full_search, normalized
from pyg_attnpool.ops.sparse import Pattern, ell_rowptr, map_rows, sddmm, spmm, transpose


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
        search (Search, optional): The search of an earlier call, whose state is used and updated.
            (default: :obj:`None`, a full search)

    Returns:
        Source vertices and weights :obj:`[M, k + P]`, and where gradients are recorded the
        transposed pattern, for :meth:`~pyg_attnpool.ops.sparse.apply_mapping`.

    Raises:
        ValueError: As :meth:`~pyg_attnpool.ops.search.full_search` does.

    >>> query, key = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 4.0]])
    >>> attention(query, key, k=2)[:2]  # the cosines 1 and 0.6, divided by their sum
    (tensor([[1, 2]]), tensor([[0.6250, 0.3750]]))
    """
    with own_types(query):
        find = full_search if search is None else search
        index, score = find(query.detach(), key.detach(), k)
        prior_weight = query.new_empty(query.size(0), 0)
        if prior is not None:
            index, prior_weight = torch.cat([index, prior[0]], dim=1), prior[1].to(query.dtype)
        transposed = None
        if torch.is_grad_enabled() and not composing():
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
    rowptr_t: Tensor | None,
    col_t: Tensor | None,
    perm: Tensor | None,
) -> Tensor:
    # The weights by PyTorch's operations, differentiable any number of times. The slots of the
    # prior get a score too, which is not used: so one pattern serves all slots.
    query, key = normalized(query), normalized(key)
    pattern = None
    if rowptr_t is not None and col_t is not None and perm is not None:
        pattern = rowptr_t, col_t, perm
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
    return _cpu.attention(score, single(prior), *_scalars(log_beta, share)).to(query.dtype)


@_attention.register_fake
def _(*inputs: Any) -> Tensor:
    query, _, _, _, index, *_ = inputs
    return query.new_empty(index.shape)


def _scalars(log_beta: Tensor | None, share: Tensor | None) -> tuple[float, float]:
    scale = -1.0 if log_beta is None else log_beta.exp().item()
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
    # The gradients of query, key, and share and log_beta together.
    of_query, of_key, of_scalars = _cpu.attention_backward(
        single(query),
        single(key),
        index,
        score,
        single(prior),
        *_scalars(log_beta, share),
        single(grad),
        (rowptr_t, col_t, perm),
    )
    return of_query.to(query.dtype), of_key.to(query.dtype), of_scalars.to(query.dtype)


@_attention_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, *_ = inputs
    return query.new_empty(query.shape), key.new_empty(key.shape), query.new_empty(2)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _attention_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, score = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    again = torch.is_grad_enabled()  # second derivatives are asked for
    if again or composing():
        learned = [t for t, need in zip(inputs, needed, strict=False) if need]
        with torch.enable_grad():
            weight = _composed(*inputs)
        found = iter(torch.autograd.grad(weight, learned, grad, create_graph=again))
        return *(next(found) if need else None for need in needed), *[None] * 6
    of_query, of_key, of_scalars = _attention_backward(*inputs, score, grad)
    of_share, of_beta = (
        s if like is None else s.view_as(like)
        for s, like in zip(of_scalars, (inputs[3], inputs[2]), strict=True)
    )
    grads = of_query, of_key, of_beta, of_share
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 6


_attention.register_autograd(_attention_grads, setup_context=_attention_setup)


def attend(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    k: int,
    log_beta: Tensor | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    share: Tensor | None = None,
    search: Search | None = None,
) -> Tensor:
    r"""Applies the mapping of :meth:`attention` to rows, differentiable in these too. On a CPU its
    weights and their product are one operation, and so are all gradients.

    Args:
        x (torch.Tensor): Rows :obj:`[N, B, F]`.
        query, key, k, log_beta, prior, share, search: As in :meth:`attention`.

    Returns:
        Rows :obj:`[M, B, F]`, in the type of :obj:`x`.

    Raises:
        ValueError: As :meth:`attention` does, or if there is no row for every key.

    >>> query, key = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 4.0]])
    >>> attend(torch.tensor([[[5.0]], [[1.0]], [[9.0]]]), query, key, k=2)  # 0.625 and 0.375
    tensor([[[4.]]])
    """
    one_type = at_least_single(x.dtype) == at_least_single(query.dtype)
    if not (on_cpu(x) and on_cpu(query) and one_type):
        index, weight, transposed = attention(query, key, k, log_beta, prior, share, search)
        return map_rows(index, weight, x, key.size(0), transposed)
    if x.dim() != 3 or x.size(0) != key.size(0):
        raise ValueError(f"Expected rows of shape [{key.size(0)}, B, F] (got {list(x.shape)})")
    with own_types(x):
        find = full_search if search is None else search
        index, score = find(query.detach(), key.detach(), k)
        if prior is None:
            prior = index.new_empty(len(index), 0), query.new_empty(len(index), 0)
        prior_weight = prior[1].to(query.dtype)
        rows = x.reshape(x.size(0), -1)
        y = _attended(query, key, log_beta, share, index, score, prior[0], prior_weight, rows)
    return y.view(query.size(0), *x.shape[1:])


@operator("attended")
def _attended(
    query: Tensor,
    key: Tensor,
    log_beta: Tensor | None,
    share: Tensor | None,
    index: Tensor,
    score: Tensor,
    prior_index: Tensor,
    prior: Tensor,
    x: Tensor,
) -> Tensor:
    scalars = _scalars(log_beta, share)
    slots = index, score, prior_index.contiguous(), single(prior)
    return _cpu.attended(*slots, *scalars, single(x)).to(x.dtype)


@_attended.register_fake
def _(*inputs: Any) -> Tensor:
    *_, index, _, _, _, x = inputs
    return x.new_empty(index.size(0), x.size(1))


@operator("attended_backward")
def _attended_backward(
    query: Tensor,
    key: Tensor,
    log_beta: Tensor | None,
    share: Tensor | None,
    index: Tensor,
    score: Tensor,
    prior_index: Tensor,
    prior: Tensor,
    x: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The gradients of query, key, share and log_beta together, and x.
    slots = index, score, prior_index.contiguous(), single(prior)
    of_query, of_key, of_scalars, of_x = _cpu.attended_backward(
        single(query), single(key), *slots, *_scalars(log_beta, share), single(x), single(grad)
    )
    dtype = query.dtype
    return of_query.to(dtype), of_key.to(dtype), of_scalars.to(dtype), of_x.to(x.dtype)


@_attended_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, *_, x, _ = inputs
    like = query.new_empty(query.shape), key.new_empty(key.shape), query.new_empty(2)
    return *like, x.new_empty(x.shape)


def _attended_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _attended_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpoints make them anew for one reading
    query, key, log_beta, share, index, _, prior_index, prior, x = saved
    inputs = query, key, log_beta, share, x
    needed = *ctx.needs_input_grad[:4], ctx.needs_input_grad[8]
    again = torch.is_grad_enabled()  # second derivatives are asked for
    if again or composing():
        learned = [t for t, need in zip(inputs, needed, strict=True) if need]
        with torch.enable_grad():
            slots = torch.cat([index, prior_index], dim=1)
            weight = _composed(query, key, log_beta, share, slots, prior, None, None, None)
            y = spmm(ell_rowptr(slots), slots.flatten(), weight.flatten().to(x.dtype), x)
        of_learned = iter(torch.autograd.grad(y, learned, grad, create_graph=again))
        *grads, of_x = (next(of_learned) if need else None for need in needed)
        return *grads, *[None] * 4, of_x
    of_query, of_key, of_scalars, of_x = _attended_backward(*saved, grad)
    of_share, of_beta = (
        s if like is None else s.view_as(like)
        for s, like in zip(of_scalars, (share, log_beta), strict=True)
    )
    found = of_query, of_key, of_beta, of_share, of_x
    *grads, of_x = (g if need else None for g, need in zip(found, needed, strict=True))
    return *grads, *[None] * 4, of_x


_attended.register_autograd(_attended_grads, setup_context=_attended_setup)


def dense_attention(query: Tensor, key: Tensor, log_beta: Tensor | None = None) -> Tensor:
    r"""The learned mapping with every source vertex kept, as a dense matrix :obj:`[M, N]`. For
    small levels: scores and weights are held, and kept for the backward pass.

    Args:
        query (torch.Tensor): Queries of the target vertices :obj:`[M, c]`.
        key (torch.Tensor): Keys of the source vertices :obj:`[N, c]`.
        log_beta (torch.Tensor, optional): As in :meth:`attention`. (default: :obj:`None`)

    >>> dense_attention(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    tensor([[0.6250, 0.3750]])
    """
    with own_types(query):
        return _weights(normalized(query) @ normalized(key).t(), log_beta)


def _weights(score: Tensor, log_beta: Tensor | None) -> Tensor:
    if log_beta is not None:
        return (log_beta.exp() * score).softmax(dim=-1)
    kept = score.clamp(min=1e-25)
    return kept / kept.sum(dim=-1, keepdim=True)


def cosine_at(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    r"""The cosine of every query :obj:`[M, c]` to the keys :obj:`[N, c]` in its slots
    :obj:`[M, k]`, differentiable in query and key.

    >>> cosine_at(torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[1], [1]]))
    tensor([[0.6000],
            [0.8000]])
    """
    query, key = normalized(query), normalized(key)
    return sddmm(ell_rowptr(index), index.flatten(), query, key).view_as(index)
