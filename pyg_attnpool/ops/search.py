r"""The search for the keys of largest cosine, equations (3) and (4) of the paper, and what one call
remembers for the next."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyg_attnpool.ops import _cpu
from pyg_attnpool.ops.backend import at_least_single, on_cpu, on_gpu, operator

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
            return full_search(query, key, k)
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
    return _cpu.topk(*single(query, key), k, *state)


@_topk_again.register_fake
def _(query, key, k, last_query, last_key, candidates, angle, searched):
    return _fake_topk(query, k)


def single(*tensors: Tensor) -> list[Tensor]:
    return [t.to(at_least_single(t.dtype)).contiguous() for t in tensors]


def normalized(rows: Tensor) -> Tensor:
    return F.normalize(*single(rows), dim=-1)


def _fake_topk(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = query.size(0), k
    dtype = at_least_single(query.dtype)
    return query.new_empty(size, dtype=torch.long), query.new_empty(size, dtype=dtype)


@operator("topk")
def full_search(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
        query, key = normalized(query), normalized(key)
        if on_gpu(query):
            from pyg_attnpool.ops import _triton

            if k <= _triton.MAX_K:
                score, index = _triton.topk(query, key, k)
                return index, score
        rows = max(1, TILE // num_key)
        found = [_largest(tile @ key.t(), k) for tile in query.split(rows)]
    index, score = zip(*found, strict=True)
    return torch.cat(index), torch.cat(score)


@full_search.register_fake
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
    return full_search(query.detach(), key.detach(), k)[0]


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
