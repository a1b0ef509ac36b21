r"""The encoder and the decoder of a frozen model in one compiled call each: no Python between
layers, which on a CPU takes most of the time of a single mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

from pyg_attnpool.models.plan import (
    Activation,
    Affine,
    Chebyshev,
    Gather,
    Linear,
    Spiral,
    Standardize,
    Step,
    Sum,
    decoder_plan,
    encoder_plan,
)
from pyg_attnpool.nn.base import IndexedModule, PoolingLayer
from pyg_attnpool.ops.backend import composing
from pyg_attnpool.ops.plan import (
    ACTIVATIONS,
    CHEBYSHEV,
    CLENSHAW,
    DENSE,
    DOTS,
    FINISH,
    INPUT,
    OUTPUT,
    PICK,
    PRODUCT,
    PROJECT,
    SPIRAL,
    STANDARDIZE,
    TERMS,
    CompiledStep,
    available,
    checksum,
    run_steps,
    vector_size,
)

if TYPE_CHECKING:
    from pyg_attnpool.models.morphable import MorphableModel

NEAR = 512  # rows among which those of as many entries are brought together
FEW = 16  # outputs of a linear layer with so many times more inputs are products with its rows


class _Value(NamedTuple):
    # Features [rows, channels] in a buffer, each row filled up to `width`.
    buffer: int
    rows: int
    channels: int
    width: int


class CompiledPlan:
    r"""A plan (:mod:`pyg_attnpool.models.plan`) in single precision, on the CPU.

    Args:
        plan (list): The steps of an encoder, which begin with
            :class:`~pyg_attnpool.models.plan.Standardize`, or of a decoder, which end with
            :class:`~pyg_attnpool.models.plan.Affine`.

    Raises:
        ValueError: If the compiled steps do not make up for the plan.

    Example:
        >>> from pyg_attnpool.models.plan import run_plan
        >>> rng = np.random.default_rng(0)
        >>> plan = [Linear(rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 3))),
        ...         Affine(np.ones((5, 3)), np.zeros((5, 3)))]
        >>> z = torch.randn(4, 2)
        >>> np.allclose(CompiledPlan(plan)(z), run_plan(plan, z), atol=1e-5)
        True
    """

    def __init__(self, plan: list[Step]):
        self._held: list[ndarray] = []  # what the steps point to
        self._steps: list[CompiledStep] = []
        self._sizes: list[int] = []  # of the buffers
        self._free: list[int] = []
        self._in = _input_shape(plan)
        rows, channels = self._in if len(self._in) == 2 else (1, *self._in)
        x = _Value(INPUT, rows, channels, channels)
        if isinstance(plan[-1], Affine):
            self._out: tuple[int, ...] = plan[-1].scale.shape
            self._end(plan[:-1], plan[-1], x, False)
        else:
            z = self._path(plan, x)
            if z.rows != 1:
                raise ValueError(f"Expected a plan that ends with a code (got {z.rows} vertices)")
            self._out = (z.channels,)
            self._finish(Affine(np.ones((1, z.channels)), np.zeros((1, z.channels))), z, False)
        places = np.cumsum([0, *self._sizes]).tolist()
        for step in self._steps:
            for name in ("source", "target", "work"):
                buffer = getattr(step, name)
                setattr(step, name, places[buffer] if buffer >= 0 else buffer)
        self._size = places[-1]
        self._array = (CompiledStep * len(self._steps))(*self._steps)

    def __call__(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, C]` to latent codes :obj:`[B, latent_channels]`, or back."""
        if x.shape[1:] != self._in or x.dtype != torch.float32 or not x.is_cpu or x.dim() == 0:
            raise ValueError(
                f"Expected {'meshes' if len(self._in) == 2 else 'latent codes'} "
                f"[B, {', '.join(map(str, self._in))}] in single precision on the CPU (got "
                f"{list(x.shape)} of {x.dtype} on {x.device})"
            )
        x = x.contiguous()
        out = x.new_empty(x.size(0), *self._out)
        run_steps(self._array, self._size, x, out)
        return out

    # The order of the steps ##########################################################

    def _path(self, plan: list[Step], x: _Value, keep: bool = False) -> _Value:
        # The steps of a plan from a value, which they may write over unless it is kept.
        first = x
        for step in plan:
            y = self._step(step, x, keep and x is first)
            if y is not x and not (keep and x is first):
                self._release(x)
            x = y
        return x

    def _step(self, step: Step, x: _Value, keep: bool) -> _Value:
        if isinstance(step, Activation):
            return self._activate(step, x)
        if isinstance(step, Linear):
            return self._linear(step, x)
        if isinstance(step, Gather):
            y = self._value(step.matrix.shape[0], x.channels)
            if x.buffer == INPUT:
                raise ValueError("Expected features that are filled up (got others)")
            self._add(PRODUCT, x, y, matrix=step.matrix)
            return y
        if isinstance(step, Chebyshev):
            return self._chebyshev(step, x, keep)
        if isinstance(step, Spiral):
            return self._spiral(step, x)
        if isinstance(step, Standardize):
            y = self._value(x.rows, x.channels)
            weight, bias = (_wide(array, 1) for array in (1 / step.std, step.mean))
            self._add(STANDARDIZE, x, y, weight=weight, bias=bias)
            return y
        if isinstance(step, Sum):
            return self._sum(step, x)
        raise ValueError(f"Expected a step that is compiled (got {type(step).__name__})")

    def _sum(self, step: Sum, x: _Value) -> _Value:
        y = self._path(step.paths[0], x, keep=True)
        for path in step.paths[1:]:
            *before, last = path
            if not isinstance(last, Linear):
                raise ValueError(f"Expected a path that ends with a linear step (got {last})")
            z = self._path(before, x, keep=True)
            self._linear(last, z, onto=y)
            if z is not x:
                self._release(z)
        return y

    def _end(self, plan: list[Step], affine: Affine, x: _Value, add: bool) -> None:
        # The last steps, which write to the output or add to it.
        last = plan[-1] if plan else None
        if isinstance(last, Sum):
            x = self._path(plan[:-1], x, keep=add)
            for i, path in enumerate(last.paths):
                later = affine if i == 0 else Affine(affine.scale, 0 * affine.shift)
                self._end(path, later, x, add or i > 0)
        elif isinstance(last, Linear):
            x = self._path(plan[:-1], x, keep=True)
            weight = affine.scale[..., None] * last.weight
            bias = affine.scale * last.bias + affine.shift
            self._dense(weight.reshape(-1, weight.shape[2]), bias.ravel(), x, None, add)
        else:
            self._finish(affine, self._path(plan, x, keep=True), add)

    # Memory ##########################################################################

    def _value(self, rows: int, channels: int, size: int | None = None) -> _Value:
        width = _width(channels)
        return _Value(
            self._buffer((rows + 1) * width if size is None else size), rows, channels, width
        )

    def _buffer(self, size: int) -> int:
        vector = vector_size()
        size = -(-size // vector) * vector + vector
        if not self._free:
            self._free.append(len(self._sizes))
            self._sizes.append(0)
        buffer = self._free.pop()
        self._sizes[buffer] = max(self._sizes[buffer], size)
        return buffer

    def _release(self, value: _Value) -> None:
        if value.buffer >= 0:
            self._free.append(value.buffer)

    # Steps ###########################################################################

    def _activate(self, step: Activation, x: _Value) -> _Value:
        done = self._steps[-1] if self._steps else None
        activated = (DENSE, DOTS, CHEBYSHEV, TERMS, SPIRAL, CLENSHAW, PICK)
        if done is None or done.kind not in activated or done.activation or done.add:
            raise ValueError(f"Expected an activation after a convolution or linear (got {step})")
        done.activation = ACTIVATIONS[step.function]
        return x

    def _linear(self, step: Linear, x: _Value, onto: _Value | None = None) -> _Value:
        rows, channels, size = step.weight.shape
        if size != x.rows * x.channels:
            raise ValueError(f"Expected {x.rows * x.channels} inputs of a linear step (got {size})")
        y = self._value(rows, channels) if onto is None else onto
        if (y.rows, y.channels) != (rows, channels):
            raise ValueError(f"Expected paths of {y.rows} vertices (got one of {rows})")
        weight = _wide(step.weight.reshape(rows, channels, x.rows, x.channels), 3, x.width)
        weight = weight.reshape(rows, channels, -1)
        if rows == 1 and FEW * channels < size:
            weight, bias = weight[0], step.bias[0]
            self._add(
                DOTS, x, y, channels, weight.shape[1], onto is not None, weight=weight, bias=bias
            )
        else:
            weight, bias = _wide(weight, 1), _wide(step.bias, 1)
            self._dense(weight.reshape(-1, weight.shape[2]), bias.ravel(), x, y, onto is not None)
        return y

    def _dense(
        self, weight: ndarray, bias: ndarray, x: _Value, y: _Value | None, add: bool
    ) -> None:
        # Weights [out, size] in blocks of four vectors of outputs, each block transposed.
        size, block = len(weight), 4 * vector_size()
        parts = [weight[i : i + block].T.ravel() for i in range(0, size, block)]
        y = _Value(OUTPUT, 1, size, size) if y is None else y._replace(width=size)
        self._add(DENSE, x, y, size, weight.shape[1], add, weight=np.concatenate(parts), bias=bias)

    def _chebyshev(self, step: Chebyshev, x: _Value, keep: bool) -> _Value:
        slots, _, channels = step.weight.shape
        width, rows = _width(channels), step.laplacian.shape[0]
        if x.buffer == INPUT:
            raise ValueError("Expected features that are filled up (got others)")
        if width < max(x.width, vector_size()):
            # The recurrence on products, which are narrower than the features (Clenshaw).
            planes = self._project(step.weight, x)
            y = self._value(rows, channels)
            bias = _wide(step.bias, 0)
            self._add(CLENSHAW, planes, y, channels, slots, matrix=step.laplacian, bias=bias)
            self._release(planes)
            return y
        if keep or x.width < vector_size():
            kind, size = TERMS, (slots - 1) * rows * x.width
        else:  # which writes over x
            kind, size = CHEBYSHEV, rows * x.width
        y = self._value(rows, channels)
        work = self._value(1, 1, size)
        self._add(
            kind,
            x,
            y,
            x.channels,
            slots,
            work=work,
            matrix=step.laplacian,
            weight=_wide(step.weight, 2),
            bias=_wide(step.bias, 0),
        )
        self._release(work)
        return y

    def _spiral(self, step: Spiral, x: _Value) -> _Value:
        slots, _, channels = step.weight.shape
        if x.buffer == INPUT:
            raise ValueError("Expected features that are filled up (got others)")
        rows, bias = len(step.index), _wide(step.bias, 0)
        _check_range(step.index, -1, x.rows)
        index = np.where(step.index < 0, rows, step.index)
        if _width(channels) < vector_size():
            planes = self._project(step.weight, x)
            y = self._value(rows, channels)
            self._add(PICK, planes, y, channels, slots, col=index * y.width, bias=bias)
            self._release(planes)
            return y
        y, weight = self._value(rows, channels), _wide(step.weight, 2)
        col = index * x.width
        self._add(SPIRAL, x, y, x.channels, slots, weight=weight, col=col, bias=bias)
        return y

    def _project(self, weight: ndarray, x: _Value) -> _Value:
        slots, channels, out = weight.shape
        width = _width(out)
        columns = _wide(weight, 2).transpose(1, 0, 2).reshape(channels, -1)
        columns = _wide(columns, 1, -(-columns.shape[1] // vector_size()) * vector_size())
        planes = self._value(x.rows, out, slots * (x.rows + 1) * width)
        self._add(PROJECT, x, planes, channels, slots, weight=columns)
        return planes

    def _finish(self, affine: Affine, x: _Value, add: bool) -> None:
        rows, channels = affine.scale.shape
        y = _Value(OUTPUT, rows, channels, channels)
        self._add(FINISH, x, y, channels, 0, add, weight=affine.scale, bias=affine.shift)

    def _add(
        self,
        kind: int,
        x: _Value,
        y: _Value,
        channels: int | None = None,
        slots: int = 0,
        add: bool = False,
        work: _Value | None = None,
        matrix: Any = None,
        **arrays: ndarray,
    ) -> None:
        if matrix is not None:
            if matrix.shape[1] != x.rows:
                raise ValueError(f"Expected a matrix of {x.rows} columns (got {matrix.shape[1]})")
            arrays |= _ordered(matrix, x.width)
        pointers = {}
        for name, array in arrays.items():
            dtype = np.int32 if name in ("order", "rowptr", "col") else np.float32
            self._held.append(np.ascontiguousarray(array, dtype=dtype))
            pointers[name] = self._held[-1].ctypes.data
        step = CompiledStep(
            kind=kind,
            rows=y.rows,
            in_=x.width,
            out=y.width,
            channels=x.channels if channels is None else channels,
            slots=slots,
            add=add,
            source=x.buffer,
            target=y.buffer,
            work=0 if work is None else work.buffer,
            **pointers,
        )
        self._steps.append(step)


def _input_shape(plan: list[Step]) -> tuple[int, ...]:
    first = plan[0]
    if isinstance(first, Standardize):
        return first.mean.shape
    if isinstance(first, Linear):
        return first.weight.shape[2:]
    if isinstance(first, Sum):
        return _input_shape(first.paths[0])
    raise ValueError(f"Expected a plan that starts with a linear step (got {first})")


def _ordered(matrix: csr_array, width: int) -> dict[str, ndarray]:
    # Rows of as many entries side by side, but none far from where it was: its neighbours, whose
    # rows of features are in the cache, are near it.
    lengths = np.diff(matrix.indptr)
    _check_range(lengths, 0, len(matrix.indices) + 1)
    _check_range(matrix.indices, 0, matrix.shape[1])
    order = np.lexsort((lengths, np.arange(len(lengths)) // NEAR))
    matrix = matrix[order]
    return {
        "order": order,
        "rowptr": matrix.indptr,
        "col": width * matrix.indices.astype(np.int64),
        "value": matrix.data,
    }


def _check_range(index: ndarray, low: int, end: int) -> None:
    # Somebody may have edited the tensors of a layer, which compiled steps follow anywhere.
    if index.size > 0 and not low <= index.min() <= index.max() < end:
        raise ValueError(
            f"Expected vertices from {low} to {end - 1} (got {index.min()} to {index.max()})"
        )


def _width(channels: int) -> int:
    # Four or eight where that is enough, or else whole vectors.
    vector = vector_size()
    narrow = [width for width in (4, 8) if channels <= width < vector]
    return narrow[0] if narrow else -(-channels // vector) * vector


def _wide(array: ndarray, axis: int, width: int | None = None) -> ndarray:
    # Filled up with zeros.
    missing = [(0, 0)] * array.ndim
    size = array.shape[axis]
    missing[axis] = (0, (_width(size) if width is None else width) - size)
    return np.pad(array, missing)


# Methods that somebody has replaced on an object.
_OWN = frozenset({"forward", "rows_forward", "mapping", "slots", "encode", "decode"})

Plan = Callable[["MorphableModel"], list[Step]]
_known: WeakKeyDictionary[Module, tuple[Any, dict[Plan, CompiledPlan | None]]] = WeakKeyDictionary()


def compiled_encoder(model: MorphableModel) -> CompiledPlan | None:
    r"""The compiled encoder of a model as it is now, as :func:`compiled_decoder`."""
    return _compiled(model, encoder_plan)


def compiled_decoder(model: MorphableModel) -> CompiledPlan | None:
    r"""The compiled decoder of a model as it is now. :obj:`None` where the model is not frozen,
    holds a layer that has no compiled step or hooks, is not in single precision on
    the CPU, or there is no compiled library; and where hooks of all modules are registered, or
    every operation has to be one of PyTorch's (:func:`~pyg_attnpool.ops.backend.composing`).

    The decoder is made again when the model has changed, in whatever way: a number in its values, a
    layer, a hook or a method. An index is known by its tensor and PyTorch's count of edits, which
    those through :obj:`.data` and NumPy escape, as they do in every layer
    (:class:`~pyg_attnpool.nn.base.IndexedModule`).
    """
    return _compiled(model, decoder_plan)


def _compiled(model: MorphableModel, plan: Plan) -> CompiledPlan | None:
    mean = model.mean
    if not available() or mean.dtype != torch.float32 or not mean.is_cpu:
        return None
    if composing() or _has_any_global_hook():  # somebody watches every operation or layer
        return None
    state = _state(model)
    if state is None:
        return None
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = state, {}
    made = known[1]
    if plan not in made:
        made[plan] = _compile(model, plan)
    return made[plan]


def _state(model: Module) -> list[int] | None:
    # What the plan depends on: the layers, their hooks, and the values of their numbers and
    # indices, as neither fused optimisers nor edits of `.data` count a version.
    state: list[int] = []
    numbers: list[Tensor] = []
    indices: list[Tensor] = []
    modules: list[Module | None] = [model]
    seen: set[int] = set()
    while modules:  # as Module.modules(), which takes several times as long
        module = modules.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        modules += module._modules.values()
        if not _OWN.isdisjoint(module.__dict__):
            return None
        state += (id(module), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for tensors in (module._parameters, module._buffers):
            numbers += [tensor for tensor in tensors.values() if tensor is not None]
        for name in module.index_ranges if isinstance(module, IndexedModule) else ():
            index = getattr(module, name)
            if not (isinstance(index, Tensor) and index.is_cpu and index.is_contiguous()):
                return None
            indices.append(index)
    for number in numbers:
        if not number.is_cpu or number.dtype is not torch.float32 or not number.is_contiguous():
            return None
    read = [*numbers, *indices]
    return [*state, *(tensor.data_ptr() for tensor in read), checksum(read)]


def _compile(model: MorphableModel, plan: Plan) -> CompiledPlan | None:
    for module in model.modules():
        learned = isinstance(module, PoolingLayer) and any(True for _ in module.parameters())
        if learned or module._forward_hooks or module._forward_pre_hooks:
            return None
    try:
        return CompiledPlan(plan(model))
    except ValueError:
        return None
