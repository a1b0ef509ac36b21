r"""The search for the keys of largest cosine, equations (3) and (4) of the paper, and the state
that one call leaves to the next."""

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
    own_types,
    single,
)

TILE = 1 << 21  # scores that PyTorch's operations hold at a time


class Search:
    r"""The search for the :math:`k` keys of largest cosine to every query, for queries and keys
    that move little from one call to the next, as parameters do in training.

    As molecular dynamics does with its neighbour lists, the search keeps more candidates than
    :math:`k`. It also keeps, for each query, an angle within which no other key can be: the angle
    of the last candidate when the query was searched, less the angles by which the query and any
    key have turned since. If the :math:`k`-th candidate is closer than this angle, the query needs
    no search. The other queries are searched; the scores of their candidates serve as a filter.

    The result always equals that of a full search. The angles are computed from the values of
    queries and keys, so it does not matter who changed them.

    The state is no part of a layer's :obj:`state_dict`, but is copied with the layer. Only the
    compiled operations use it; without them every call is a full search.

    Args:
        num_query (int): The number of queries :math:`M`.
        num_key (int): The number of keys :math:`N`.
        channels (int): Size of each query and key.
        k (int): The number of keys kept.
        dtype (torch.dtype, optional): The type of queries and keys.
            (default: :obj:`torch.float32`)

    >>> search = Search(num_query=1, num_key=3, channels=2, k=1)
    >>> search(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]), 1)
    (tensor([[1]]), tensor([[1.]]))
    """

    def __init__(
        self,
        num_query: int,
        num_key: int,
        channels: int,
        k: int,
        dtype: torch.dtype = torch.float32,
    ):
        # Keep 2k candidates, rounded up: they stay valid for several steps; more would slow each
        # step.
        kept = min(num_key, -(-2 * k // 16) * 16)
        # On the CPU, where alone it is used, also if a layer is made on another device.
        with torch.device("cpu"):
            self.last_query = torch.zeros(num_query, channels, dtype=dtype)
            self.last_key = torch.zeros(num_key, channels, dtype=dtype)
            self.candidates = torch.arange(kept, dtype=torch.int32).repeat(num_query, 1)
            self.angle = torch.zeros(num_query, dtype=torch.float64)
            self.searched = torch.zeros(2, dtype=torch.long)

    @property
    def share(self) -> float:
        r"""The share of queries that needed a search, over all calls so far."""
        return (self.searched[0] / self.searched[1].clamp(min=1)).item()

    def __call__(self, query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
        r"""Finds the keys of largest cosine to every query. Sizes and types other than announced
        are searched in full.

        Args:
            query (torch.Tensor): Queries :obj:`[M, c]`.
            key (torch.Tensor): Keys :obj:`[N, c]`.
            k (int): The number of keys kept.

        Returns:
            Key indices and cosines :obj:`[M, k]`, in descending order of cosine.
        """
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
    return _cpu.topk(single(query), single(key), k, *state)


@_topk_again.register_fake
def _(query: Tensor, key: Tensor, k: int, *state: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_topk(query, k)


def normalized(rows: Tensor) -> Tensor:
    r"""Rows at unit length, at least in single precision. Those shorter than :math:`10^{-12}` stay
    shorter.

    >>> normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return F.normalize(single(rows), dim=-1)


def _fake_topk(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = query.size(0), k
    dtype = at_least_single(query.dtype)
    return query.new_empty(size, dtype=torch.long), query.new_empty(size, dtype=dtype)


@operator("topk")
def full_search(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""As :meth:`cosine_topk`, with the cosines. It records no gradients.

    Args:
        query (torch.Tensor): Queries :obj:`[M, c]`.
        key (torch.Tensor): Keys :obj:`[N, c]`.
        k (int): The number of keys kept, at most :math:`N`.

    Returns:
        Key indices and cosines :obj:`[M, k]`, in descending order of cosine. A cosine that is no
        number, as of a vector that is not finite, comes before all others, as where PyTorch sorts.

    Raises:
        ValueError: If queries and keys have other numbers of channels, or there are fewer keys
            than :obj:`k`.
    """
    num_query, num_key = query.size(0), key.size(0)
    if query.size(1) != key.size(1) or not 1 <= k <= num_key:
        raise ValueError(
            f"Expected queries and keys of as many channels and 'k' between 1 and the number of "
            f"keys (got {list(query.shape)}, {list(key.shape)} and {k})"
        )
    if on_cpu(query):
        dtype = at_least_single(query.dtype)
        once = Search(num_query, num_key, query.size(1), k, dtype)
        once.candidates = once.candidates[:, :k].contiguous()  # no other call will use more
        return once(query, key, k)
    with own_types(query):
        query, key = normalized(query), normalized(key)
        if on_gpu(query):
            from pyg_attnpool.ops import _triton

            if k <= _triton.MAX_K:
                score, index = _triton.topk(query, key, k)
                return index, score
        if composing():  # nothing may depend on the scores that are found
            score = query @ key.t()
            if torch.onnx.is_in_onnx_export():  # where the smaller index comes first by definition
                score, index = score.topk(k)
            else:
                score, index = score.sort(dim=-1, descending=True, stable=True)
            return index[:, :k], score[:, :k]
        rows = max(1, TILE // num_key)
        found = [_largest(tile @ key.t(), k) for tile in query.split(rows)]
    indices, scores = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(scores)


@full_search.register_fake
def _(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _fake_topk(query, k)


def cosine_topk(query: Tensor, key: Tensor, k: int) -> Tensor:
    r"""The :math:`k` keys of largest cosine to every query, equations (3) and (4) of the paper.

    The :obj:`[M, N]` cosines are computed a tile at a time and never kept. Of equal cosines the
    smaller key index comes first, so that every backend selects the same keys.

    Args:
        query (torch.Tensor): Queries :obj:`[M, c]`.
        key (torch.Tensor): Keys :obj:`[N, c]`.
        k (int): The number of keys kept, at most :math:`N`.

    Returns:
        Key indices :obj:`[M, k]` in descending order of cosine.

    Raises:
        ValueError: As :meth:`full_search` does.

    >>> query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    >>> cosine_topk(query, key, k=2)
    tensor([[1, 2]])
    """
    return full_search(query.detach(), key.detach(), k)[0]


def _largest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # torch.topk may take any of several equal scores. If the scores k and k + 1 of a row are equal,
    # the choice matters, and the row is sorted in full.
    value, index = score.topk(min(k + 1, score.size(1)), dim=-1)
    index, order = index[:, :k].sort(dim=-1)
    order = value[:, :k].gather(1, order).sort(dim=-1, descending=True, stable=True).indices
    index = index.gather(1, order)
    if value.size(1) > k:
        last, next_ = value[:, k - 1], value[:, k]
        tied = ((last == next_) | (last.isnan() & next_.isnan())).nonzero().squeeze(1)
        if tied.numel() > 0:
            full = score[tied].sort(dim=-1, descending=True, stable=True).indices
            index[tied] = full[:, :k]
    return index, score.gather(1, index)
