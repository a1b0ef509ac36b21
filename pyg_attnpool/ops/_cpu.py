r"""The compiled operations of :obj:`csrc`, for contiguous tensors in single or double precision.

Set-up builds the library three times, for different instruction sets; this module loads the one
that fits the processor. Where none could be built, :obj:`AVAILABLE` is :obj:`False`, and
:mod:`pyg_attnpool.ops` uses operations of PyTorch instead.

Indices come from files and from users, who may change them at any time. So every array is checked
where its address is handed over: its type and size here, and where its indices point in the
compiled function itself, which costs little beside what it does with the rows there.
"""

import ctypes
import math
import os
import threading
from collections.abc import Callable
from ctypes import POINTER, c_double, c_int64, c_void_p
from pathlib import Path
from struct import unpack_from
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 8  # that of csrc/sparse.cpp: raised in both with every change of a function's arguments
SERIAL = 1 << 15  # that of csrc/simd.h
DTYPES = {torch.float32: "float", torch.float64: "double"}


class Kind(NamedTuple):
    r"""The kind of an argument of a function: its type in C, that of the elements of an array
    (:obj:`None` for the type that the function computes in), and whether it may be left out."""

    ctype: Any
    dtype: torch.dtype | None = None
    optional: bool = False


SIZE, NUMBER = Kind(c_int64), Kind(c_double)
ARRAY, ARRAYS = Kind(c_void_p), Kind(POINTER(c_void_p))
INDEX, INDEX32, DOUBLE = (Kind(c_void_p, t) for t in (torch.int64, torch.int32, torch.float64))
MAYBE_ARRAY, MAYBE_INDEX = ARRAY._replace(optional=True), INDEX._replace(optional=True)
# The arguments of every function, in the order of its declaration, and from the sizes, which come
# first, the number of elements of every array. Arrays are contiguous and on the CPU.
Signature = tuple[list[Kind], Callable[..., tuple[int, ...]]]
TYPED: dict[str, Signature] = {  # compiled for each of DTYPES, whose name is appended
    # M, C, N, E, rowptr, col, perm, value, x, scale, minus, out
    "spmm": (
        [*[SIZE] * 4, INDEX, INDEX, MAYBE_INDEX, ARRAY, ARRAY, NUMBER, MAYBE_ARRAY, ARRAY],
        lambda M, C, N, E: (M + 1, E, E, E, N * C, M * C, M * C),
    ),
    # N, C, K, E, rowptr, col, value, x, out
    "terms": (
        [*[SIZE] * 4, INDEX, INDEX, ARRAY, ARRAY, ARRAY],
        lambda N, C, K, E: (N + 1, E, E, N * C, (K - 1) * N * C),
    ),
    # M, C, N, E, rowptr, col, a, b, out
    "sddmm": (
        [*[SIZE] * 4, INDEX, INDEX, ARRAY, ARRAY, ARRAY],
        lambda M, C, N, E: (M + 1, E, M * C, N * C, E),
    ),
    # N, C, M, E, rowptr_t, col_t, perm, value, g, x, grad_x, grad_value
    "spmm_grads": (
        [*[SIZE] * 4, *[INDEX] * 3, *[ARRAY] * 5],
        lambda N, C, M, E: (N + 1, E, E, E, M * C, N * C, N * C, E),
    ),
    # M, B, F, G, S, x, weight, bias, out
    "convolve_slots": (
        [*[SIZE] * 5, ARRAYS, ARRAY, MAYBE_ARRAY, ARRAY],
        lambda M, B, F, G, S: (M * B * F, S * F * G, G, M * B * G),
    ),
    # M, B, F, G, S, N, E, rowptr, col, slot, x, weight, bias, out
    "convolve_entries": (
        [*[SIZE] * 7, *[INDEX] * 3, ARRAY, ARRAY, MAYBE_ARRAY, ARRAY],
        lambda M, B, F, G, S, N, E: (M + 1, E, E, N * B * F, S * F * G, G, M * B * G),
    ),
    # M, B, F, G, S, N, x, g, index, out
    "outer": (
        [*[SIZE] * 6, ARRAYS, ARRAYS, MAYBE_INDEX, ARRAY],
        lambda M, B, F, G, S, N: (N * B * F, M * B * G, M * S, S * F * G),
    ),
    # M, N, c, k, K, query, key, last_query, last_key, candidates, angle, index, score, searched
    "topk": (
        [*[SIZE] * 5, *[ARRAY] * 4, INDEX32, DOUBLE, INDEX, ARRAY, INDEX],
        lambda M, N, c, k, K: (M * c, N * c, M * c, N * c, M * K, M, M * k, M * k, 2),
    ),
    # M, k, P, score, prior, scale, share, weight
    "attention": (
        [SIZE, SIZE, SIZE, ARRAY, ARRAY, NUMBER, NUMBER, ARRAY],
        lambda M, k, P: (M * k, M * P, M * (k + P)),
    ),
    # M, N, c, k, P, query, key, index, score, prior, scale, share, grad, rowptr_t, col_t, perm,
    # grad_query, grad_key, grad_scalars
    "attention_backward": (
        [*[SIZE] * 5, ARRAY, ARRAY, INDEX, ARRAY, ARRAY, NUMBER, NUMBER, ARRAY, *[INDEX] * 3]
        + [ARRAY] * 3,
        lambda M, N, c, k, P: (
            *(M * c, N * c, M * (k + P), M * k, M * P, M * (k + P)),
            *(N + 1, M * (k + P), M * (k + P), M * c, N * c, 2),
        ),
    ),
    # M, N, C, k, P, index, score, prior_index, prior, scale, share, x, out
    "attended": (
        [*[SIZE] * 5, INDEX, ARRAY, INDEX, ARRAY, NUMBER, NUMBER, ARRAY, ARRAY],
        lambda M, N, C, k, P: (M * k, M * k, M * P, M * P, N * C, M * C),
    ),
    # M, N, C, c, k, P, threads, query, key, index, score, prior_index, prior, scale, share, x,
    # grad, scratch, grad_query, grad_key, grad_scalars, grad_x
    "attended_backward": (
        [*[SIZE] * 7, ARRAY, ARRAY, INDEX, ARRAY, INDEX, ARRAY, NUMBER, NUMBER, *[ARRAY] * 7],
        lambda M, N, C, c, k, P, threads: (
            *(M * c, N * c, M * k, M * k, M * P, M * P, N * C, M * C, (threads - 1) * N * C),
            *(M * c, N * c, 2, N * C),
        ),
    ),
}
UNTYPED: dict[str, Signature] = {
    # M, N, E, rowptr, col, rowptr_t, col_t, perm
    "transpose_pattern": (
        [SIZE, SIZE, SIZE, *[INDEX] * 5],
        lambda M, N, E: (M + 1, E, N + 1, E, E),
    ),
    # M, N, F, room, points, vertices, faces, row, face, found
    "near_faces": (
        [*[SIZE] * 4, DOUBLE, DOUBLE, *[INDEX] * 4],
        lambda M, N, F, room: (3 * M, 3 * N, 3 * F, room, room, 2),
    ),
}


def _of_type(kinds: list[Kind], dtype: torch.dtype | None) -> list[Kind]:
    arrays = (c_void_p, POINTER(c_void_p))
    return [k._replace(dtype=k.dtype or dtype) if k.ctype in arrays else k for k in kinds]


# The same by the name in the library: the arguments after the sizes, and the number of sizes.
FUNCTIONS: dict[str, tuple[list[Kind], int, Callable[..., tuple[int, ...]]]] = {
    full: (_of_type(kinds[kinds.count(SIZE) :], dtype), kinds.count(SIZE), numels)
    for table, dtypes in ((UNTYPED, {None: ""}), (TYPED, {t: f"_{n}" for t, n in DTYPES.items()}))
    for name, (kinds, numels) in table.items()
    for dtype, suffix in dtypes.items()
    for full in [name + suffix]
}


class CompiledStep(ctypes.Structure):
    r"""One step of an encoder or decoder, as csrc/plan.cpp has it."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "rows", "in_", "out", "channels", "slots")),
        *((name, c_int64) for name in ("activation", "add", "source", "target", "work")),
        *((name, c_void_p) for name in ("order", "rowptr", "col", "value", "weight", "bias")),
    )


def open_library(path: Path) -> ctypes.CDLL | None:
    r"""Loads one build. :obj:`None` if it is incomplete, of another system or of another version
    of the sources, which would be called with wrong arguments."""
    # Not imported as a module: this binds to the OpenMP threads of PyTorch, which is loaded first.
    try:
        library = ctypes.CDLL(str(path)) if _whole(path) else None
    except OSError:
        return None
    if library is None or not hasattr(library, f"pyg_attnpool_{VERSION}"):
        return None
    for name, (kinds, num_sizes, _) in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [c_int64] * num_sizes + [kind.ctype for kind in kinds]
        function.restype = c_int64
    library.run_plan.argtypes = [*[c_int64] * 6, POINTER(CompiledStep), *[c_void_p] * 3]
    library.run_plan.restype, library.plan_width.restype = None, c_int64
    library.checksum.argtypes = [c_int64, POINTER(c_int64), POINTER(c_void_p)]
    library.checksum.restype = ctypes.c_uint64
    return library


def _whole(path: Path) -> bool:
    # Loading an ELF file that was cut off raises nothing and kills the process. The table of its
    # sections is at its end.
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return len(header) == 64
    (table,), (size, count) = unpack_from("<Q", header, 40), unpack_from("<HH", header, 58)
    return path.stat().st_size >= table + size * count


def _best() -> ctypes.CDLL | None:
    names = {"AVX512": ("avx512", "avx2", "any"), "AVX2": ("avx2", "any")}
    for name in names.get(torch.backends.cpu.get_cpu_capability(), ("any",)):
        # Earlier set-ups wrote the version of Python into the name.
        paths = Path(__file__).parent.glob(f"_cpu_{name}.*")
        for path in sorted(paths, key=lambda path: (path.stem != f"_cpu_{name}", path)):
            library = open_library(path)
            if library is not None:
                return library
    return None


library = _best()
AVAILABLE = library is not None

# Threads that share a layer share the state of its search. A fork waits for the lock: the child
# gets it free, and gets no state that is half written.
search_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=search_lock.acquire,
        after_in_parent=search_lock.release,
        after_in_child=search_lock.release,
    )

_local = threading.local()


def workspace(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    r"""Memory for intermediate results, one block per thread and type. The next call in the same
    thread returns the same block, so that the system need not map and clear fresh pages."""
    numel = math.prod(size)
    blocks: dict[torch.dtype, Tensor] = getattr(_local, "workspace", {})
    tensor = blocks.get(dtype)
    if tensor is None or tensor.numel() < numel:
        tensor = torch.empty(numel, dtype=dtype)
        _local.workspace = {**blocks, dtype: tensor}
    return tensor[:numel].view(size)


def call(name: str, *args: Tensor | list[Tensor] | int | float | None) -> None:
    r"""Calls a function of the library. The caller holds the tensors until it returns.

    Raises:
        ValueError: If an array is not of the size and type that the function takes, or an index
            points outside of the array that it is for.
    """
    kinds, num_sizes, numels = FUNCTIONS[name]
    sizes = args[:num_sizes]
    expected = numels(*sizes)
    converted: list[Any] = list(sizes)
    array = 0
    for arg, (_, dtype, optional) in zip(args[num_sizes:], kinds, strict=True):
        if dtype is None:  # a number
            if not isinstance(arg, (int, float)):
                raise TypeError(f"Expected a number in '{name}' (got {type(arg).__name__})")
            converted.append(arg)
            continue
        numel = expected[array]
        array += 1
        if isinstance(arg, Tensor):
            converted.append(_address(name, arg, dtype, numel))
        elif isinstance(arg, list):
            addresses = [_address(name, tensor, dtype, numel) for tensor in arg]
            converted.append((c_void_p * len(arg))(*addresses))
        elif arg is None and optional:
            converted.append(None)
        else:
            raise TypeError(f"Expected a tensor in '{name}' (got {type(arg).__name__})")
    if getattr(library, name)(*converted) != 0:
        raise ValueError(
            f"Expected indices within the rows that they point to, row pointers that ascend to the "
            f"number of entries, and at least one key (got others in '{name}' with arrays of "
            f"{expected})"
        )


def _address(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    fits = tensor.dtype is dtype and tensor.numel() == numel
    if fits and tensor.is_cpu and tensor.is_contiguous():
        return tensor.data_ptr()
    raise ValueError(
        f"Expected a contiguous array of {numel} elements of {dtype} on the CPU in '{name}' "
        f"(got {list(tensor.shape)} of {tensor.dtype} on {tensor.device})"
    )


def _named(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"Expected numbers of {list(DTYPES)} in '{name}' (got {tensor.dtype})")
    return f"{name}_{DTYPES[tensor.dtype]}"


def spmm(
    rowptr: Tensor,
    col: Tensor,
    value: Tensor,
    x: Tensor,
    perm: Tensor | None = None,
    scale: float = 1.0,
    minus: Tensor | None = None,
) -> Tensor:
    r""":math:`\textrm{scale} \cdot \mathbf{A} \mathbf{x} - \textrm{minus}` for the CSR matrix
    :math:`\mathbf{A}`, whose values :obj:`perm` puts in their order, and rows :obj:`[N, C]`."""
    out = x.new_empty(rowptr.numel() - 1, x.size(1))
    sizes = *out.shape, x.size(0), col.numel()
    call(_named("spmm", x), *sizes, rowptr, col, perm, value, x, scale, minus, out)
    return out


def terms(rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, K: int) -> list[Tensor]:
    r"""The Chebyshev terms :math:`T_0(\mathbf{A}) \mathbf{x}` to
    :math:`T_{K-1}(\mathbf{A}) \mathbf{x}` of rows :obj:`[N, B, F]`, in the workspace."""
    out = workspace((K - 1, *x.shape), x.dtype)
    sizes = (x.size(0), x.size(1) * x.size(2), K, col.numel())
    call(_named("terms", x), *sizes, rowptr, col, value, x, out)
    return [x, *out]


def sddmm(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""The dot products of rows of :obj:`a` and :obj:`b` at the entries of a CSR pattern."""
    out = a.new_empty(col.numel())
    call(_named("sddmm", a), *a.shape, b.size(0), col.numel(), rowptr, col, a, b, out)
    return out


def spmm_grads(
    rowptr_t: Tensor, col_t: Tensor, perm: Tensor, value: Tensor, g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The gradients of :obj:`x` and :obj:`value` from that of their product, given its transposed
    pattern."""
    out = torch.empty_like(x), torch.empty_like(value)
    sizes = *x.shape, g.size(0), col_t.numel()
    call(_named("spmm_grads", x), *sizes, rowptr_t, col_t, perm, value, g, x, *out)
    return out


def transpose(rowptr: Tensor, col: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""The transposed CSR pattern and the entry that each of its entries came from."""
    out = rowptr.new_empty(num_cols + 1), torch.empty_like(col), torch.empty_like(col)
    call("transpose_pattern", rowptr.numel() - 1, num_cols, col.numel(), rowptr, col, *out)
    return out


def convolve_slots(x: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    r""":math:`\sum_s \mathbf{x}_s \mathbf{W}_s + \mathbf{b}` for rows :obj:`[N, B, F]` of every
    slot and weights :obj:`[S, F, G]`."""
    (num_nodes, batch, _), (slots, F, G) = x[0].shape, weight.shape
    out = weight.new_empty(num_nodes, batch, G)
    name = _named("convolve_slots", out)
    _one_per_slot(slots, x)
    call(name, num_nodes, batch, F, G, slots, x, weight, bias, out)
    return out


def convolve_entries(
    rowptr: Tensor, col: Tensor, slot: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    r""":math:`\sum_e \mathbf{x}_{\textrm{col}(e)} \mathbf{W}_{\textrm{slot}(e)} + \mathbf{b}` over
    the entries of every row, for rows :obj:`[N, B, F]` and weights :obj:`[S, F, G]`."""
    slots, F, G = weight.shape
    out = x.new_empty(rowptr.numel() - 1, x.size(1), G)
    name = _named("convolve_entries", x)
    sizes = *out.shape[:2], F, G, slots, x.size(0), col.numel()
    call(name, *sizes, rowptr, col, slot, x, weight, bias, out)
    return out


def outer(x: list[Tensor], g: list[Tensor], index: Tensor | None = None) -> Tensor:
    r""":math:`\mathbf{x}_s^{\top} \mathbf{g}_s` summed over vertices and samples, :obj:`[S, F, G]`,
    for rows :obj:`[N, B, F]` and :obj:`[M, B, G]` of every slot. With :obj:`index` :obj:`[M, S]`,
    row :obj:`index[i, s]` of the former meets row :obj:`i` of the latter; -1 meets none."""
    (num_rows, batch, F), (num_nodes, _, G) = x[0].shape, g[0].shape
    out = g[0].new_empty(len(x), F, G)
    _one_per_slot(len(x), g)
    sizes = num_nodes, batch, F, G, len(x), num_rows
    call(_named("outer", out), *sizes, x, g, index, out)
    return out


def _one_per_slot(slots: int, rows: list[Tensor]) -> None:
    if len(rows) != slots:
        raise ValueError(f"Expected rows for {slots} slots (got {len(rows)})")


def topk(
    query: Tensor,
    key: Tensor,
    k: int,
    last_query: Tensor,
    last_key: Tensor,
    candidates: Tensor,
    angle: Tensor,
    searched: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""The :math:`k` keys of largest cosine to every query and their cosines; see
    :class:`pyg_attnpool.ops.search.Search` for the state, which this updates."""
    index = candidates.new_empty(query.size(0), k, dtype=torch.long)
    score = query.new_empty(index.shape)
    sizes = (query.size(0), key.size(0), key.size(1), k, candidates.size(1))
    state = (last_query, last_key, candidates, angle)
    with search_lock:
        call(_named("topk", query), *sizes, query, key, *state, index, score, searched)
    return index, score


def attention(score: Tensor, prior: Tensor, scale: float, share: float) -> Tensor:
    r"""Weights :obj:`[M, k + P]` from the cosines :obj:`[M, k]` of the learned slots and the
    weights :obj:`[M, P]` of the prior's. A negative :obj:`scale` divides the former by their sum,
    another is the :math:`\beta` of their softmax; :obj:`share` is what the learned slots count."""
    (num_query, k), slots = score.shape, prior.size(1)
    weight = score.new_empty(num_query, k + slots)
    name = _named("attention", score)
    call(name, num_query, k, slots, score, prior, scale, share, weight)
    return weight


def attention_backward(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    score: Tensor,
    prior: Tensor,
    scale: float,
    share: float,
    grad: Tensor,
    transposed: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of query and key, and those of share and logarithm of the scale :obj:`[2]`."""
    out = torch.empty_like(query), torch.empty_like(key), query.new_empty(2)
    sizes = (query.size(0), *key.shape, score.size(1), prior.size(1))
    inputs = query, key, index, score, prior, scale, share, grad
    call(_named("attention_backward", query), *sizes, *inputs, *transposed, *out)
    return out


def attended(
    index: Tensor,
    score: Tensor,
    prior_index: Tensor,
    prior: Tensor,
    scale: float,
    share: float,
    x: Tensor,
) -> Tensor:
    r"""The product of the weights of :meth:`attention` with rows :obj:`[N, C]`."""
    out = x.new_empty(index.size(0), x.size(1))
    sizes = index.size(0), *x.shape, index.size(1), prior.size(1)
    inputs = index, score, prior_index, prior, scale, share, x
    call(_named("attended", x), *sizes, *inputs, out)
    return out


def attended_backward(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    score: Tensor,
    prior_index: Tensor,
    prior: Tensor,
    scale: float,
    share: float,
    x: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients of query and key, those of share and logarithm of the scale :obj:`[2]`, and
    that of the rows, from that of their product."""
    of_scalars = query.new_empty(2)
    out = torch.empty_like(query), torch.empty_like(key), of_scalars, torch.empty_like(x)
    (num_query, k), (num_key, channels), slots = index.shape, x.shape, prior.size(1)
    threads = torch.get_num_threads() if num_query * (k + slots) * channels > SERIAL else 1
    scratch = workspace((threads - 1, *x.shape), x.dtype)
    sizes = num_query, num_key, channels, query.size(1), k, slots, threads
    inputs = query, key, index, score, prior_index, prior, scale, share, x, grad
    call(_named("attended_backward", x), *sizes, *inputs, scratch, *out)
    return out
