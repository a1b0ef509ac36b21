r"""GPU kernels, forward only: the products of :mod:`pyg_attnpool.ops.sparse` and the search of
:mod:`pyg_attnpool.ops.search`. This module is imported only where they run.

All three kernels accumulate in float32 (float64 for float64), use no atomics, and return the same
bits in every run.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # features that a warp holds at a time, 32 per thread
ROWS = 16  # queries that a program of the search serves
CHUNK = tl.constexpr(32)  # channels that the search multiplies at a time
NO_NUMBER = tl.constexpr(float("inf"))  # the place of a score that is none, above all others
PROGRAMS = 1024  # of the search, enough to occupy a large GPU
MAX_K = 256  # longer lists do not fit on every GPU


# An index is not followed out of its array. A check of all of them would have to wait for the GPU;
# instead a result that such an index takes part in is no number.


@triton.jit
def _entries(rowptr, row, num_entries):
    begin, end = tl.load(rowptr + row), tl.load(rowptr + row + 1)
    whole = (begin >= 0) & (begin <= end) & (end <= num_entries)
    return tl.where(whole, begin, 0), tl.where(whole, end, 0), whole


@triton.jit
def _sources(col, entry, end, num_source):
    source = tl.load(col + entry, entry < end, 0)
    inside = (source >= 0) & (source < num_source)
    return tl.where(inside, source, 0), inside


@triton.jit
def _spmm_kernel(
    rowptr,
    col,
    value,
    x,
    out,
    num_entries,
    num_source,
    num_channels,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Several entries of one row are in flight at a time, each with a run of channels.
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < num_channels
    begin, end, whole = _entries(rowptr, row, num_entries)
    dtype = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.where(whole, tl.zeros([BLOCK, CHANNELS], dtype), float("nan"))
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        source, inside = _sources(col, entry, end, num_source)
        weight = tl.load(value + entry, entry < end, 0).to(dtype)
        mask = (entry < end)[:, None] & valid
        features = tl.load(x + source[:, None] * num_channels + channel, mask, 0)
        total += tl.where(inside, weight, float("nan"))[:, None] * features.to(dtype)
    tl.store(out + row * num_channels + channel, tl.sum(total, axis=0), valid)


def spmm(rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor) -> Tensor:
    r"""Product of a sparse :obj:`[M, N]` matrix in CSR form with dense rows.

    Args:
        rowptr (torch.Tensor): Row pointer :obj:`[M + 1]`.
        col (torch.Tensor): Column of every entry :obj:`[E]`, in any order, repeated or not.
        value (torch.Tensor): Value of every entry :obj:`[E]`, of the type of :obj:`x`.
        x (torch.Tensor): Dense rows :obj:`[N, C]`.

    Returns:
        The rows :obj:`[M, C]`.
    """
    _check_sizes(rowptr, col, (col.numel(), value), (x.size(0), x))
    num_rows, num_channels = rowptr.numel() - 1, x.size(1)
    out = x.new_empty(num_rows, num_channels)
    block, channels = _tile(num_channels)
    with torch.cuda.device_of(x):
        _spmm_kernel[num_rows, triton.cdiv(num_channels, channels)](
            rowptr,
            col,
            value.contiguous(),
            x.contiguous(),
            out,
            col.numel(),
            x.size(0),
            num_channels,
            BLOCK=block,
            CHANNELS=channels,
            num_warps=1,
        )
    return out


@triton.jit
def _sddmm_kernel(
    rowptr,
    col,
    a,
    b,
    out,
    num_entries,
    num_source,
    num_channels,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end, whole = _entries(rowptr, row, num_entries)
    dtype = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        source, inside = _sources(col, entry, end, num_source)
        total = tl.zeros([BLOCK, CHANNELS], dtype)
        for first in range(0, num_channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            valid = channel < num_channels
            left = tl.load(a + row * num_channels + channel, valid, 0).to(dtype)
            mask = (entry < end)[:, None] & valid
            right = tl.load(b + source[:, None] * num_channels + channel, mask, 0)
            total += left * right.to(dtype)
        product = tl.where(inside & whole, tl.sum(total, axis=1), float("nan"))
        tl.store(out + entry, product, entry < end)


def sddmm(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Row-wise dot products at the entries of a sparse :obj:`[M, N]` pattern in CSR form.

    Args:
        rowptr (torch.Tensor): Row pointer :obj:`[M + 1]`.
        col (torch.Tensor): Column of every entry :obj:`[E]`, in any order, repeated or not.
        a (torch.Tensor): Left rows :obj:`[M, C]`.
        b (torch.Tensor): Right rows :obj:`[N, C]`, of the type of :obj:`a`.

    Returns:
        One value per entry :obj:`[E]`.
    """
    _check_sizes(rowptr, col, (rowptr.numel() - 1, a), (b.size(0), b))
    # An entry that no row has is no number either.
    out = a.new_full((col.numel(),), float("nan"))
    block, channels = _tile(a.size(1))
    with torch.cuda.device_of(a):
        _sddmm_kernel[(rowptr.numel() - 1,)](
            rowptr,
            col,
            a.contiguous(),
            b.contiguous(),
            out,
            col.numel(),
            b.size(0),
            a.size(1),
            BLOCK=block,
            CHANNELS=channels,
            num_warps=1,
        )
    return out


def _check_sizes(rowptr: Tensor, col: Tensor, *rows: tuple[int, Tensor]) -> None:
    if not rowptr.dtype == col.dtype == torch.int64:
        raise ValueError(f"Expected long indices (got {rowptr.dtype} and {col.dtype})")
    for size, tensor in rows:
        if tensor.size(0) != size or tensor.device != col.device or rowptr.device != col.device:
            raise ValueError(
                f"Expected {size} rows on {col.device} (got {list(tensor.shape)} on "
                f"{tensor.device})"
            )


def _tile(num_channels: int) -> tuple[int, int]:
    # Entries and channels of a tile: at most 256 channels leave four entries in flight, and more
    # than 16 entries few rows have.
    channels = min(256, triton.next_power_of_2(max(num_channels, 1)))
    return min(16, TILE // channels), channels


# The search. Tiles of scores are [keys, queries], so that a thread reduces over keys mostly within
# itself. Up to k = 32 a program is a single warp: it waits for no other, and loops as often as its
# own rows need. Two things keep insertions into the lists of the rows rare:
# * The keys of a tile lie as far apart as possible. Vertices that follow each other are often
#   neighbours in space: in their own order, key after key would come closer to a query.
# * Even so, in almost every tile some row finds a better key. It waits, in its place in the tile,
#   until another comes to the same place. Every pass then inserts one key in every row.
# Keys are ordered by score and, where scores are equal, by index. The order is total, so that the
# result does not depend on when a key comes.


@triton.jit
def _scores(query, key, row, index, num_query, end, CHANNELS: tl.constexpr):
    # IEEE arithmetic: TF32 would reorder close neighbours.
    dtype: tl.constexpr = query.dtype.element_ty
    score = tl.zeros([index.shape[0], row.shape[0]], dtype)
    for first in range(0, CHANNELS, CHUNK):
        channel = first + tl.arange(0, CHUNK)
        left = tl.load(key + index.to(tl.int64) * CHANNELS + channel, index < end, 0)
        right = query + row.to(tl.int64) * CHANNELS + channel[:, None]
        right = tl.load(right, row < num_query, 0)
        score = tl.dot(left, right, score, input_precision="ieee", out_dtype=dtype)
    # A score that is no number comes before all others, as where PyTorch sorts.
    score = tl.where(score == score, score, NO_NUMBER)
    return tl.where(index < end, score, float("-inf"))


@triton.jit
def _better(score, index, other_score, other_index):
    return (score > other_score) | ((score == other_score) & (index < other_index))


@triton.jit
def _best(score, index):
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(score == best, index, 2147483647), axis=0)


@triton.jit
def _worst(score, index):
    worst = tl.min(score, axis=0)
    return worst, tl.max(tl.where(score == worst, index, -2147483648), axis=0)


@triton.jit
def _insert(top, top_index, worst, worst_index, waiting, waiting_index):
    # In every row, the best that waits takes the slot of the worst in the list.
    best, best_index = _best(waiting, waiting_index)
    taken = (top_index == worst_index) & _better(best, best_index, worst, worst_index)
    top = tl.where(taken, best, top)
    top_index = tl.where(taken, best_index, top_index)
    worst, worst_index = _worst(top, top_index)
    waiting = tl.where(waiting_index == best_index, float("-inf"), waiting)
    return top, top_index, worst, worst_index, waiting


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def _topk_kernel(
    query,
    key,
    score_out,
    index_out,
    num_query,
    num_key,
    span,
    k,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.broadcast_to(tl.arange(0, BLOCK)[:, None], [BLOCK, ROWS])
    num_tiles = tl.cdiv(span, BLOCK)
    first = tl.program_id(1) * span + tl.arange(0, BLOCK)[:, None] * num_tiles
    end = tl.minimum(tl.program_id(1) * span + span, num_key)

    # The list starts as the first k keys of the first tile; the others wait. A slot without a key
    # has an index of its own, below all others. Slots from k on never lose their place.
    waiting = _scores(query, key, row, first, num_query, end, CHANNELS)
    waiting_index = tl.broadcast_to(first, [BLOCK, ROWS])
    top = tl.where(slot < k, waiting, float("inf"))
    top_index = tl.where((slot < k) & (first < end), first, -1 - slot)
    worst, worst_index = _worst(top, top_index)
    waiting = tl.where(slot < k, float("-inf"), waiting)

    for tile in range(1, num_tiles):
        index = first + tile
        score = _scores(query, key, row, index, num_query, end, CHANNELS)
        enters = _better(score, index, worst, worst_index)
        while _any(enters & _better(waiting, waiting_index, worst, worst_index)):
            top, top_index, worst, worst_index, waiting = _insert(
                top, top_index, worst, worst_index, waiting, waiting_index
            )
        waiting = tl.where(enters, score, waiting)
        waiting_index = tl.where(enters, index, waiting_index)
    while _any(_better(waiting, waiting_index, worst, worst_index)):
        top, top_index, worst, worst_index, waiting = _insert(
            top, top_index, worst, worst_index, waiting, waiting_index
        )

    # Indices are of keys also where a list is short.
    top = tl.where(slot < k, top, float("-inf"))
    out = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * k
    for i in range(k):
        best, best_index = _best(top, top_index)
        number = tl.where(best == NO_NUMBER, float("nan"), best)
        tl.store(score_out + out + i, number, row < num_query)
        valid_index = tl.minimum(tl.maximum(best_index, 0), num_key - 1)
        tl.store(index_out + out + i, valid_index, row < num_query)
        top = tl.where(top_index == best_index, float("-inf"), top)


def topk(query: Tensor, key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""The :math:`k` keys of largest inner product with every query. Of equal scores the smaller
    key index comes first.

    Args:
        query (torch.Tensor): Queries :obj:`[M, c]`, normalised, in float32 or float64.
        key (torch.Tensor): Keys :obj:`[N, c]`, likewise.
        k (int): The number of keys kept, at most :math:`N` and :obj:`MAX_K`.

    Returns:
        Scores and key indices :obj:`[M, k]`, in descending order of score.
    """
    num_query, num_key = query.size(0), key.size(0)
    query, key = (F.pad(x, (0, -x.size(1) % CHUNK.value)).contiguous() for x in (query, key))

    # Few queries occupy the GPU only if the keys are split. Every part fills a list of its own,
    # so that it should be long compared with k.
    blocks = triton.cdiv(num_query, ROWS)
    parts = min(triton.cdiv(PROGRAMS, max(blocks, 1)), num_key // (32 * max(k, 8)))
    span = triton.cdiv(num_key, max(parts, 1))
    parts = triton.cdiv(num_key, span)

    score = query.new_empty(num_query, parts * k)
    index = torch.empty(num_query, parts * k, dtype=torch.long, device=query.device)
    block = max(32, triton.next_power_of_2(k))
    with torch.cuda.device_of(query):
        _topk_kernel[blocks, parts](
            query,
            key,
            score,
            index,
            num_query,
            num_key,
            span,
            k,
            CHANNELS=query.size(1),
            BLOCK=block,
            ROWS=ROWS,
            num_warps=block // 32,
            num_stages=1,  # the loop over keys holds other loops and cannot be pipelined
        )
    if parts > 1:  # where scores are equal, the indices ascend already
        score, order = score.sort(dim=1, descending=True, stable=True)
        score, index = score[:, :k].contiguous(), index.gather(1, order[:, :k])
    return score, index
