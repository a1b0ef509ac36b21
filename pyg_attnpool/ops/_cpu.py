r"""The compiled operations of :obj:`csrc`, for contiguous tensors in single or double precision.

Set-up builds the library three times, for different instruction sets; this module loads the one
that fits the processor. Where none could be built, :obj:`AVAILABLE` is :obj:`False`, and
:mod:`pyg_attnpool.ops` uses operations of PyTorch instead.

The callers check shapes and types. The functions here only allocate the results.
"""

import ctypes
import math
import os
import threading
from ctypes import POINTER, c_double, c_int64, c_void_p
from pathlib import Path
from struct import unpack_from
from typing import Any

import torch
from torch import Tensor

VERSION = 3  # that of csrc/sparse.cpp: raised in both with every change of a function's arguments
DTYPES = {torch.float32: "float", torch.float64: "double"}

SIZE, NUMBER, ARRAY, ARRAYS = c_int64, c_double, c_void_p, POINTER(c_void_p)
# The arguments of every function, in the order of its declaration.
TYPED = {  # compiled for each of DTYPES, whose name is appended
    # M, C, rowptr, col, perm, value, x, scale, minus, out
    "spmm": [SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, NUMBER, ARRAY, ARRAY],
    # N, C, K, rowptr, col, value, x, out
    "terms": [SIZE, SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY],
    # M, C, rowptr, col, a, b, out
    "sddmm": [SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY],
    # N, C, rowptr_t, col_t, perm, value, g, x, grad_x, grad_value
    "spmm_grads": [SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY],
    # M, B, F, G, S, x, weight, bias, out
    "convolve_slots": [SIZE, SIZE, SIZE, SIZE, SIZE, ARRAYS, ARRAY, ARRAY, ARRAY],
    # M, B, F, G, S, rowptr, col, slot, x, weight, bias, out
    "convolve_entries": [*[SIZE] * 5, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY],
    # M, B, F, G, S, x, g, index, out
    "outer": [SIZE, SIZE, SIZE, SIZE, SIZE, ARRAYS, ARRAYS, ARRAY, ARRAY],
    # M, N, c, k, K, query, key, last_query, last_key, candidates, angle, index, score, searched
    "topk": [*[SIZE] * 5, *[ARRAY] * 9],
    # M, k, P, score, prior, scale, share, weight
    "attention": [SIZE, SIZE, SIZE, ARRAY, ARRAY, NUMBER, NUMBER, ARRAY],
    # M, N, c, k, P, query, key, index, score, prior, scale, share, grad, rowptr_t, col_t, perm,
    # grad_query, grad_key, grad_scalars
    "attention_backward": [*[SIZE] * 5, *[ARRAY] * 5, NUMBER, NUMBER, *[ARRAY] * 7],
}
UNTYPED = {
    # M, N, rowptr, col, rowptr_t, col_t, perm
    "transpose_pattern": [SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY, ARRAY],
}
ARGUMENTS = UNTYPED | {
    f"{name}_{dtype}": types for name, types in TYPED.items() for dtype in DTYPES.values()
}


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
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
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
        for path in sorted(Path(__file__).parent.glob(f"_cpu_{name}.*")):
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
    r"""Calls a function of the library. The caller holds the tensors until it returns."""
    getattr(library, name)(*(_converted(arg) for arg in args))


def _converted(arg: Tensor | list[Tensor] | int | float | None) -> Any:
    if isinstance(arg, Tensor):
        return arg.data_ptr()
    if isinstance(arg, list):
        return (c_void_p * len(arg))(*(tensor.data_ptr() for tensor in arg))
    return arg


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
    pattern = rowptr, col, perm, value
    call(f"spmm_{DTYPES[x.dtype]}", *out.shape, *pattern, x, scale, minus, out)
    return out


def terms(rowptr: Tensor, col: Tensor, value: Tensor, x: Tensor, K: int) -> list[Tensor]:
    r"""The Chebyshev terms :math:`T_0(\mathbf{A}) \mathbf{x}` to
    :math:`T_{K-1}(\mathbf{A}) \mathbf{x}` of rows :obj:`[N, B, F]`, in the workspace."""
    out = workspace((K - 1, *x.shape), x.dtype)
    sizes = (x.size(0), x[0].numel(), K)
    call(f"terms_{DTYPES[x.dtype]}", *sizes, rowptr, col, value, x, out)
    return [x, *out]


def sddmm(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""The dot products of rows of :obj:`a` and :obj:`b` at the entries of a CSR pattern."""
    out = a.new_empty(col.numel())
    call(f"sddmm_{DTYPES[a.dtype]}", *a.shape, rowptr, col, a, b, out)
    return out


def spmm_grads(
    rowptr_t: Tensor, col_t: Tensor, perm: Tensor, value: Tensor, g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The gradients of :obj:`x` and :obj:`value` from that of their product, given its transposed
    pattern."""
    out = torch.empty_like(x), torch.empty_like(value)
    call(f"spmm_grads_{DTYPES[x.dtype]}", *x.shape, rowptr_t, col_t, perm, value, g, x, *out)
    return out


def transpose(rowptr: Tensor, col: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""The transposed CSR pattern and the entry that each of its entries came from."""
    out = rowptr.new_empty(num_cols + 1), torch.empty_like(col), torch.empty_like(col)
    call("transpose_pattern", rowptr.numel() - 1, num_cols, rowptr, col, *out)
    return out


def convolve_slots(x: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    r""":math:`\sum_s \mathbf{x}_s \mathbf{W}_s + \mathbf{b}` for rows :obj:`[N, B, F]` of every
    slot and weights :obj:`[S, F, G]`."""
    (num_nodes, batch, _), (slots, F, G) = x[0].shape, weight.shape
    out = weight.new_empty(num_nodes, batch, G)
    name = f"convolve_slots_{DTYPES[out.dtype]}"
    call(name, num_nodes, batch, F, G, slots, x, weight, bias, out)
    return out


def convolve_entries(
    rowptr: Tensor, col: Tensor, slot: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    r""":math:`\sum_e \mathbf{x}_{\textrm{col}(e)} \mathbf{W}_{\textrm{slot}(e)} + \mathbf{b}` over
    the entries of every row, for rows :obj:`[N, B, F]` and weights :obj:`[S, F, G]`."""
    slots, F, G = weight.shape
    out = x.new_empty(rowptr.numel() - 1, x.size(1), G)
    name = f"convolve_entries_{DTYPES[x.dtype]}"
    call(name, *out.shape[:2], F, G, slots, rowptr, col, slot, x, weight, bias, out)
    return out


def outer(x: list[Tensor], g: list[Tensor], index: Tensor | None = None) -> Tensor:
    r""":math:`\mathbf{x}_s^{\top} \mathbf{g}_s` summed over vertices and samples, :obj:`[S, F, G]`,
    for rows :obj:`[N, B, F]` and :obj:`[M, B, G]` of every slot. With :obj:`index` :obj:`[M, S]`,
    row :obj:`index[i, s]` of the former meets row :obj:`i` of the latter; -1 meets none."""
    (_, batch, F), (num_nodes, _, G) = x[0].shape, g[0].shape
    out = g[0].new_empty(len(x), F, G)
    call(f"outer_{DTYPES[out.dtype]}", num_nodes, batch, F, G, len(x), x, g, index, out)
    return out


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
        call(f"topk_{DTYPES[query.dtype]}", *sizes, query, key, *state, index, score, searched)
    return index, score


def attention(score: Tensor, prior: Tensor, scale: float, share: float) -> Tensor:
    r"""Weights :obj:`[M, k + P]` from the cosines :obj:`[M, k]` of the learned slots and the
    weights :obj:`[M, P]` of the prior's. A :obj:`scale` of zero divides the former by their sum,
    another is the :math:`\beta` of their softmax; :obj:`share` is what the learned slots count."""
    (num_query, k), slots = score.shape, prior.size(1)
    weight = score.new_empty(num_query, k + slots)
    name = f"attention_{DTYPES[score.dtype]}"
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
    call(f"attention_backward_{DTYPES[query.dtype]}", *sizes, *inputs, *transposed, *out)
    return out
