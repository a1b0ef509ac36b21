r"""The decoder of a frozen model in one compiled call: no Python between its layers, which on a CPU
takes most of the time of a single mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import Module

from pyg_attnpool.models.plan import (
    Activation,
    Affine,
    Chebyshev,
    Gather,
    Linear,
    Spiral,
    Step,
    Sum,
    decoder_plan,
)
from pyg_attnpool.nn.base import IndexedModule, PoolingLayer
from pyg_attnpool.ops import _cpu

if TYPE_CHECKING:
    from pyg_attnpool.models.morphable import MorphableModel

DENSE, PRODUCT, CHEBYSHEV, SPIRAL, FINISH = range(5)
ACTIVATIONS = {"relu": 1, "elu": 2}


class CompiledDecoder:
    r"""A plan (:func:`~pyg_attnpool.models.plan.decoder_plan`) in single precision, on the CPU.

    Args:
        plan (list): The steps, of which the last is an :class:`~pyg_attnpool.models.plan.Affine`.

    Raises:
        ValueError: If the compiled steps do not make up for the plan.

    Example:
        >>> from pyg_attnpool.models.plan import run_plan
        >>> rng = np.random.default_rng(0)
        >>> plan = [Linear(rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 3))),
        ...         Affine(np.ones((5, 3)), np.zeros((5, 3)))]
        >>> z = torch.randn(4, 2)
        >>> np.allclose(CompiledDecoder(plan)(z), run_plan(plan, z), atol=1e-5)
        True
    """

    def __init__(self, plan: list[Step]):
        self._held: list[ndarray] = []  # what the steps point to
        self._steps: list[_cpu.Step] = []
        self._buffer = 0
        *before, last = plan
        if not isinstance(last, Affine) or not before:
            raise ValueError("Expected a plan that ends with an affine step (got another)")
        self._shape = last.scale.shape
        paths = before[0].paths if isinstance(before[0], Sum) and len(before) == 1 else [before]
        for i, path in enumerate(paths):
            self._add_path(path, Affine(last.scale, last.shift if i == 0 else 0 * last.shift))
        self._latent = paths[0][0].weight.shape[2]  # type: ignore[union-attr]
        self._array = (_cpu.Step * len(self._steps))(*self._steps)

    def __call__(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to meshes :obj:`[B, N, C]`."""
        if z.dim() != 2 or z.size(1) != self._latent or z.dtype != torch.float32 or not z.is_cpu:
            raise ValueError(
                f"Expected latent codes [B, {self._latent}] in single precision on the CPU (got "
                f"{list(z.shape)} of {z.dtype} on {z.device})"
            )
        z = z.contiguous()
        out = z.new_empty(len(z), *self._shape)
        threads = max(1, min(len(z), torch.get_num_threads()))
        scratch = _cpu.workspace((threads * 3 * self._buffer,), torch.float32)
        assert _cpu.library is not None
        _cpu.library.decode(
            len(self._array),
            len(z),
            self._latent,
            out[0].numel() if len(z) else 0,
            self._buffer,
            threads,
            self._array,
            z.data_ptr(),
            out.data_ptr(),
            scratch.data_ptr(),
        )
        return out

    def _add_path(self, path: list[Step], last: Affine) -> None:
        first = path[0]
        if not isinstance(first, Linear):
            raise ValueError(f"Expected a path that starts with a linear step (got {first})")
        if len(path) == 1:  # straight from the code to the mesh
            weight = (last.scale[..., None] * first.weight).reshape(-1, first.weight.shape[2])
            bias = last.scale * first.bias + last.shift
            self._add(DENSE, 0, 0, 0, weight.shape[1], weight=weight.T, bias=bias)
            return
        channels = 0
        for step in path:
            if isinstance(step, Activation):
                done = self._steps[-1]
                if done.activation or done.kind == PRODUCT:
                    raise ValueError(f"Expected an activation after a convolution (got {step})")
                done.activation = ACTIVATIONS[step.function]
            elif isinstance(step, Linear):
                rows, channels, latent = step.weight.shape
                weight, bias = _wide(step.weight, 1), _wide(step.bias, 1)
                wide = bias.shape[1]
                weight = weight.reshape(-1, latent).T
                self._add(DENSE, rows, 0, wide, latent, weight=weight, bias=bias)
            elif isinstance(step, Gather):
                wide, matrix = _width(channels), step.matrix
                self._add(PRODUCT, matrix.shape[0], wide, wide, 0, matrix=matrix)
            elif isinstance(step, Chebyshev | Spiral):
                weight, bias = _wide(_wide(step.weight, 1), 2), _wide(step.bias, 0)
                slots, wide, wide_out = weight.shape
                channels = step.weight.shape[2]
                if isinstance(step, Chebyshev):
                    rows = step.laplacian.shape[0]
                    kind, of = CHEBYSHEV, {"matrix": step.laplacian}
                else:
                    rows = len(step.index)
                    kind, of = SPIRAL, {"col": np.where(step.index < 0, rows, step.index)}
                self._add(kind, rows, wide, wide_out, slots, weight=weight, bias=bias, **of)
            else:
                raise ValueError(f"Expected a step that is compiled (got {type(step).__name__})")
        rows = len(last.scale)
        self._add(FINISH, rows, _width(channels), 0, 0, weight=last.scale, bias=last.shift)

    def _add(
        self,
        kind: int,
        rows: int,
        wide: int,
        wide_out: int,
        slots: int,
        matrix: Any = None,
        **arrays: ndarray,
    ) -> None:
        if matrix is not None:
            arrays |= {"rowptr": matrix.indptr, "col": matrix.indices, "value": matrix.data}
        pointers = {}
        for name, array in arrays.items():
            dtype = np.int32 if name in ("rowptr", "col") else np.float32
            self._held.append(np.ascontiguousarray(array, dtype=dtype))
            pointers[name] = self._held[-1].ctypes.data
        self._steps.append(
            _cpu.Step(kind=kind, rows=rows, in_=wide, out=wide_out, slots=slots, **pointers)
        )
        self._buffer = max(self._buffer, (rows + 1) * max(wide, wide_out))


def _width(channels: int) -> int:
    assert _cpu.library is not None
    vector = _cpu.library.decoder_width()
    return -(-channels // vector) * vector


def _wide(array: ndarray, axis: int) -> ndarray:
    # Filled up with zeros to whole vectors.
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, _width(array.shape[axis]) - array.shape[axis])
    return np.pad(array, missing)


# Methods that somebody has replaced on an object.
_OWN = frozenset({"forward", "rows_forward", "mapping", "slots", "decode"})

_known: WeakKeyDictionary[Module, tuple[Any, CompiledDecoder | None]] = WeakKeyDictionary()


def compiled_decoder(model: MorphableModel) -> CompiledDecoder | None:
    r"""The compiled decoder of a model as it is now. :obj:`None` where the model is not frozen,
    holds a layer that has no compiled step or hooks, is not in single precision on
    the CPU, or there is no compiled library.

    The decoder is made again when the model has changed, in whatever way: a number in its values, a
    layer, a hook or a method. An index is known by its tensor and PyTorch's count of edits, which
    those through :obj:`.data` and NumPy escape, as they do in every layer
    (:class:`~pyg_attnpool.nn.base.IndexedModule`).
    """
    if not _cpu.AVAILABLE or model.mean.dtype != torch.float32 or not model.mean.is_cpu:
        return None
    state = _state(model)
    if state is None:
        return None
    known = _known.get(model)
    if known is None or known[0] != state:
        known = state, _compile(model)
        _known[model] = known
    return known[1]


def _state(model: Module) -> list[int] | None:
    # What the plan depends on: the layers, their hooks, the values of their numbers, as neither
    # fused optimisers nor edits of `.data` count a version, and their indices by place and version.
    state: list[int] = []
    numbers: list[Tensor] = []
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
        for name in module._declared if isinstance(module, IndexedModule) else ():
            index = getattr(module, name)
            if not isinstance(index, Tensor) or index.is_inference():
                return None  # tensors of inference mode have no version
            state += (index.data_ptr(), index._version)
    for number in numbers:
        if not number.is_cpu or number.dtype is not torch.float32 or not number.is_contiguous():
            return None
        state.append(number.data_ptr())
    return [*state, _cpu.checksum(numbers)]


def _compile(model: MorphableModel) -> CompiledDecoder | None:
    for module in model.modules():
        learned = isinstance(module, PoolingLayer) and any(True for _ in module.parameters())
        if learned or module._forward_hooks or module._forward_pre_hooks:
            return None
    try:
        return CompiledDecoder(decoder_plan(model))
    except ValueError:
        return None
