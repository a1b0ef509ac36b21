r"""The base of all layers: the two layouts of features, indices that stay valid, and pooling layers
that stand where a model holds a matrix."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.ops.backend import composing, has_version, outside, plain
from pyg_attnpool.ops.layout import on_rows
from pyg_attnpool.ops.plan import available, checksum
from pyg_attnpool.ops.sparse import Pattern, ell_rowptr, map_rows, transpose

if TYPE_CHECKING:
    from pyg_attnpool.nn.mapping_pool import MappingPool


class Index(NamedTuple):
    r"""The range of an index: its shape, in which a letter stands for any size but zero, vertices
    from :obj:`low` to :obj:`end - 1`, and whether it is part of the :obj:`state_dict`."""

    shape: tuple[int | str, ...]
    end: int
    low: int
    persistent: bool


class IndexedModule(torch.nn.Module):
    r"""The base class of modules with indices: tensors of vertices, which compiled code follows.

    :meth:`register_index` declares an index with the vertices that it may hold. It moves with the
    module and is part of its :obj:`state_dict`, but is no buffer, since casts would round its
    numbers and averages over buffers would mix them: it stays long. It is checked before any part
    of a state is assigned, and in the next call after somebody has edited it in place or put
    another in its place; :meth:`_derive` then makes again what follows from it.

    Attributes:
        index_ranges (dict): The :class:`Index` of every declared index by its name.
    """

    # Weights with an entry for every entry of an index: a state may have another number of both.
    _of_slots: tuple[tuple[str, str], ...] = ()
    # Buffers that `_check` looks at beside the indices.
    _read: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.index_ranges: dict[str, Index] = {}
        # What was checked last: names, tensors, their places in memory and versions.
        self._seen: list[tuple[str, Tensor, int, int]] = []
        self._sum: int | None = None

    def register_index(
        self,
        name: str,
        index: Tensor,
        shape: tuple[int | str, ...],
        end: int,
        low: int = 0,
        persistent: bool = True,
    ) -> None:
        r"""Adds an index to the module.

        Args:
            name (str): Its name, by which it is an attribute.
            index (torch.Tensor): The index (long).
            shape (tuple): The shape that it keeps; a letter stands for any size but zero.
            end (int): One more than the largest vertex.
            low (int, optional): The smallest value. (default: :obj:`0`)
            persistent (bool, optional): Whether it is part of the :obj:`state_dict`.
                (default: :obj:`True`)

        Raises:
            TypeError: If it is no long tensor.
            ValueError: If its shape or a vertex does not fit.
        """
        check_index(name, index, shape, end, low)
        self.index_ranges[name] = Index(shape, end, low, persistent)
        setattr(self, name, index.long())

    def _check(self) -> None:
        r"""Raises where indices that are valid, one by one, do not fit together."""

    def _derive(self) -> None:
        r"""Makes what follows from the indices, which are valid."""

    def _renew(self) -> None:
        # Casts and loads give indices that are known to be valid.
        self._derive()
        self._seen = []
        for name in (*self.index_ranges, *self._read):
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor) and has_version(tensor):
                # Tensors that were made in inference mode count no edits.
                version = -1 if tensor.is_inference() else tensor._version
                self._seen.append((name, tensor, tensor.data_ptr(), version))
        self._sum = self._checksum()

    def _same(self, device: torch.device) -> bool:
        # Whether indices are those of the last call: the same tensors, whose place in memory
        # `index.data = ...` changes and whose version counts edits in place, of the same values.
        for name, tensor, place, version in self._seen:
            if getattr(self, name) is not tensor or tensor.data_ptr() != place:
                return False
            if version >= 0 and tensor._version != version:
                return False
        for name, index_name in self._of_slots:
            index = getattr(self, index_name)
            if index is not None and getattr(self, name).shape != index.shape:
                return False
        if not self._seen or self._seen[0][1].device != device:
            return False
        return self._sum == self._checksum()

    def _checksum(self) -> int | None:
        # Edits of `.data` and those by NumPy count no version. A GPU would have to be waited for.
        tensors = [tensor for _, tensor, _, _ in self._seen]
        if not available() or not all(t.is_cpu and t.is_contiguous() for t in tensors):
            return None
        return checksum(tensors)

    def _refresh(self, device: torch.device) -> None:
        # Looks at the indices where they are no longer those of the last call. What distributes a
        # module over devices knows its parameters and buffers alone, so indices follow the
        # features. A call that is traced has no values to look at.
        if not self.index_ranges or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if self._same(device):
            return
        # A checkpoint counts what is recorded: a first call must record what later ones do.
        with torch.no_grad(), outside() if composing() else nullcontext():
            for name, spec in self.index_ranges.items():
                index = getattr(self, name)
                check_index(name, index, spec.shape, spec.end, spec.low)
                moved = index.is_meta or device.type == "meta"
                setattr(self, name, index.long() if moved else index.to(device, torch.long))
            for name, index_name in self._of_slots:
                weight = getattr(self, name)
                if has_version(weight):
                    check_weight(name, weight, getattr(self, index_name).shape)
            self._check()
            self._renew()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IndexedModule:
        super()._apply(fn, recurse)
        whole = True
        for name, index in self.index_ranges.items():
            before = getattr(self, name)
            setattr(self, name, _moved(before, fn, index.low - 1))
            whole &= before.is_meta == getattr(self, name).is_meta
        if whole:
            self._derive()
        self._seen = []  # of `to_empty`, buffers have no values yet
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, index in self.index_ranges.items():
            if index.persistent:
                destination[prefix + name] = getattr(self, name).detach()

    def _check_state(self, state: abc.Mapping[str, Any], prefix: str) -> None:
        # Raises where a state does not fit this module, its submodules aside.
        for name, index in self.index_ranges.items():
            if index.persistent and prefix + name in state:
                loaded = state[prefix + name]
                check_index(prefix + name, loaded, index.shape, index.end, index.low)
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            loaded = state.get(prefix + name)
            if name in dict(self._of_slots) or own is None or not isinstance(loaded, Tensor):
                continue
            if loaded.is_floating_point() != own.is_floating_point():
                raise TypeError(f"Expected '{prefix + name}' of {own.dtype} (got {loaded.dtype})")
            if _vector(loaded).shape != _vector(own).shape:
                raise ValueError(
                    f"Expected '{prefix + name}' of shape {list(own.shape)} "
                    f"(got {list(loaded.shape)})"
                )
        for name, index_name in self._of_slots:
            own, like = getattr(self, name), state.get(prefix + index_name)
            weight = state.get(prefix + name, own)
            if isinstance(weight, Tensor):
                like = getattr(self, index_name) if like is None else like
                check_weight(prefix + name, weight, like.shape)

    def load_state_dict(self, state_dict: abc.Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        r"""As :meth:`torch.nn.Module.load_state_dict`. All layers look at their part of the state
        before any of them takes it.

        Raises:
            TypeError: If an index of the state is no long tensor.
            ValueError: If an index or a weight of the state does not fit.
        """
        for name, module in self.named_modules():
            if isinstance(module, IndexedModule):
                module._check_state(state_dict, f"{name}." if name else "")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        # Checked before anything is assigned, also where the layer is part of another module.
        self._check_state(state_dict, prefix)
        for name, index_name in self._of_slots:
            weight, index = getattr(self, name), state_dict.get(prefix + index_name)
            if index is not None and weight.shape != index.shape:
                weight.data = weight.new_zeros(index.shape)
        own = {prefix + name: name for name, index in self.index_ranges.items() if index.persistent}
        others = {key: value for key, value in state_dict.items() if key not in own}
        for name, parameter in self._parameters.items():
            if parameter is not None and prefix + name in others:
                # Earlier versions had scalars in the place of vectors of one number.
                loaded = others[prefix + name]
                if isinstance(loaded, Tensor) and loaded.dim() == 0:
                    others[prefix + name] = loaded.view_as(parameter)
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, *args)
        assign = local_metadata.get("assign_to_params_buffers", False)
        for key, name in own.items():
            if key in state_dict:
                loaded, now = state_dict[key].detach().long(), getattr(self, name)
                setattr(self, name, loaded if assign else loaded.to(now.device, copy=True))
            elif strict:
                missing_keys.append(key)
        self._renew()


def _vector(tensor: Tensor) -> Tensor:
    return tensor.view(1) if tensor.dim() == 0 else tensor


def weight_of(linear: Any) -> Tensor:
    r"""The weight of a linear layer that is not called: what :mod:`torch.nn.utils` has put before
    its call (:func:`~torch.nn.utils.weight_norm`, :func:`~torch.nn.utils.spectral_norm`,
    :mod:`~torch.nn.utils.prune`) makes the weight first."""
    for hook in linear._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(linear, ())
    weight: Tensor = linear.weight
    return weight


def _moved(index: Tensor, fn: Callable[[Tensor], Tensor], empty: int) -> Tensor:
    # What `fn` moves, shares or allocates, with the values of the index. `to_empty` takes an index
    # without values from the meta device, which refers to no vertex until a state is loaded.
    moved = fn(index)
    if moved is index or moved.is_meta:
        return moved
    if index.is_meta:
        return torch.full_like(index, empty, device=moved.device)
    return index.to(moved.device)


class VertexLayer(IndexedModule):
    r"""The base class of layers on the features of a fixed number of vertices. A subclass says in
    :meth:`rows_forward` what it does to rows; :meth:`forward` takes every layout.

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`; with :obj:`rows=True` rows :math:`(N, B, F)`
        - **output:** the same layout, contiguous
    """

    num_source: int
    in_channels: int | None = None

    def rows_forward(self, x: Tensor) -> Tensor:
        r"""Takes rows :obj:`[N, B, F]` to rows :obj:`[M, B, F']`."""
        raise NotImplementedError

    def forward(self, x: Tensor, rows: bool = False) -> Tensor:
        r"""Runs the layer.

        Args:
            x (torch.Tensor): The features, in one of the layouts above.
            rows (bool, optional): If set to :obj:`True`, takes and gives rows :obj:`[N, B, F]`.
                A network that keeps its features in rows transposes them only once.
                (default: :obj:`False`)

        Raises:
            TypeError: If the features are not floating point.
            ValueError: If the shape fits no layout.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected features as a tensor (got {type(x).__name__})")
        self._refresh(x.device)
        if self.in_channels is not None and x.size(-1) != self.in_channels:
            raise ValueError(f"Expected {self.in_channels} input channels (got {list(x.shape)})")
        if not rows:
            return on_rows(x, self.num_source, self.rows_forward)
        if x.dim() != 3 or x.size(0) != self.num_source:
            raise ValueError(
                f"Expected rows of shape [{self.num_source}, B, F] (got {list(x.shape)})"
            )
        if not x.is_floating_point():
            raise TypeError(f"Expected floating point features (got {x.dtype})")
        return self.rows_forward(x)


class PoolingLayer(VertexLayer):
    r"""The base class of layers that map features of :obj:`num_source` to :obj:`num_target`
    vertices by a :class:`~pyg_attnpool.Mapping`. It can be called, or stand where a model holds a
    matrix :obj:`[M, N]`: in :obj:`layer @ x`, :meth:`torch.matmul`, :meth:`torch.mm` and
    :meth:`torch.sparse.mm`, for features :obj:`[N, F]` or :obj:`[B, N, F]`, and in functions that
    read :meth:`size`, :meth:`_indices` and :meth:`_values` of a sparse COO tensor.

    If :obj:`dummy_weight` is set, the matrix is :obj:`[1, M + 1, N + 1]`: one more vertex stands at
    the end and keeps that share of its features. A call of the layer knows no such vertex.
    """

    num_target: int
    dummy_weight: float | None = None

    def mapping(self) -> Mapping:
        r"""The mapping that :meth:`forward` applies, differentiable."""
        raise NotImplementedError

    def slots(self) -> tuple[Tensor, Tensor]:
        r"""Index and weight :obj:`[M, k]` of :meth:`mapping`, without its checks."""
        mapping = self.mapping()
        return mapping.index, mapping.weight

    def freeze(self) -> MappingPool:
        r"""The layer without its parameters: the mapping as it is now, for inference.

        Raises:
            ValueError: If the layer holds a number that is not finite.
        """
        from pyg_attnpool.nn.mapping_pool import MappingPool  # the subclass that is frozen

        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        spoilt = [name for name, tensor in held.items() if not torch.isfinite(tensor).all()]
        if spoilt:
            raise ValueError(f"Expected finite {spoilt} to freeze {self} (got NaN or infinity)")
        with torch.no_grad():
            frozen = MappingPool(self.mapping())
        frozen.dummy_weight = self.dummy_weight
        return frozen.train(self.training)

    @property
    def shape(self) -> torch.Size:
        r"""The size of the matrix."""
        if self.dummy_weight is None:
            return torch.Size((self.num_target, self.num_source))
        return torch.Size((1, self.num_target + 1, self.num_source + 1))

    def size(self, dim: int | None = None) -> torch.Size | int:
        r"""The size of the matrix, or of one of its dimensions."""
        return self.shape if dim is None else self.shape[dim]

    def _indices(self) -> Tensor:
        r"""Row and column of every entry :obj:`[2, M * k]`, sorted by row. An entry may repeat."""
        self._check_sparse()
        index, _ = self.slots()
        row = torch.arange(self.num_target, device=index.device).unsqueeze(1).expand_as(index)
        return torch.stack([row.flatten(), index.flatten()])

    def _values(self) -> Tensor:
        r"""The value of every entry :obj:`[M * k]`, differentiable."""
        self._check_sparse()
        return self.slots()[1].flatten()

    def _check_sparse(self) -> None:
        if self.dummy_weight is not None:
            raise ValueError(
                f"Expected a matrix [num_target, num_source] to list the entries of "
                f"(got one with a dummy vertex {list(self.shape)})"
            )

    indices, values = _indices, _values

    def __matmul__(self, x: Any) -> Tensor:
        r"""The matrix times features :obj:`[N, F]` or :obj:`[B, N, F]`, with the dummy vertex where
        it has one.

        Raises:
            ValueError: If the features are of another number of vertices.
        """
        if not isinstance(x, Tensor):
            return NotImplemented
        num_source = self.shape[-1]
        if x.dim() not in (2, 3) or x.size(-2) != num_source:
            raise ValueError(
                f"Expected features of shape [{num_source}, F] or [B, {num_source}, F] "
                f"(got {list(x.shape)})"
            )
        if self.dummy_weight is None:
            return self(x)
        x = x if x.dim() == 3 else x.unsqueeze(0)
        return torch.cat([self(x[:, :-1]), self.dummy_weight * x[:, -1:]], dim=1)

    matmul = mm = __matmul__

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Sequence = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = (*args, *(kwargs or {}).values())
        products = (torch.matmul, torch.mm, torch.bmm, torch.sparse.mm)
        if func in products and len(operands) == 2 and isinstance(operands[0], PoolingLayer):
            return operands[0].__matmul__(operands[1])
        if func is Tensor.matmul and torch.compiler.is_compiling():
            # torch.compile hands over `layer @ x` and `x @ layer` alike, with the layer last. The
            # latter is no product of layers.
            x, layer = operands
            if isinstance(layer, PoolingLayer) and x.size(-1) != layer.shape[-2]:
                return layer.__matmul__(x)
        return NotImplemented

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.num_source}, {self.num_target})"


class PatternPool(PoolingLayer):
    r"""The base class of pooling layers whose slots are fixed, :obj:`index` :obj:`[M, k]`, with a
    weight for each. The transposed pattern, which the backward pass reads, follows from the index
    and is made again whenever another index is loaded.

    Args:
        mapping (Mapping): The slots, of which the index is kept.
    """

    index: Tensor
    weight: Tensor
    _of_slots: tuple[tuple[str, str], ...] = (("weight", "index"),)

    def __init__(self, mapping: Mapping):
        super().__init__()
        self.num_source = mapping.num_source
        self.num_target = mapping.num_target
        self.register_index(
            "index", mapping.index.clone(), (mapping.num_target, "k"), mapping.num_source
        )
        self._renew()

    def _derive(self) -> None:
        pattern = transpose(ell_rowptr(self.index), self.index.flatten(), self.num_source)
        self.rowptr_t, self.col_t, self.perm = pattern

    @property
    def transposed(self) -> Pattern:
        r"""The transposed pattern."""
        return self.rowptr_t, self.col_t, self.perm

    def slots(self) -> tuple[Tensor, Tensor]:
        r"""Index and weight :obj:`[M, k]` of every slot."""
        return self.index, self.weight

    def mapping(self) -> Mapping:
        r"""The mapping that :meth:`forward` applies, differentiable."""
        return Mapping(*self.slots(), self.num_source)

    def rows_forward(self, x: Tensor) -> Tensor:
        index, weight = self.slots()
        return map_rows(index, weight, x, self.num_source, self.transposed)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.num_source}, {self.num_target}, "
            f"k={self.index.size(1)})"
        )


def check_index(name: str, index: Any, shape: Sequence[int | str], end: int, low: int = 0) -> None:
    r"""Checks an index that comes from outside, such as a loaded state, before it is used.

    Args:
        name (str): The name of the index in the error.
        index (torch.Tensor): The index; of one without values, as on the meta device, only the
            shape is looked at.
        shape (tuple): The shape that it must have; a letter stands for any size but zero.
        end (int): One more than the largest vertex.
        low (int, optional): The smallest value. (default: :obj:`0`)

    Raises:
        TypeError: If it is no long tensor.
        ValueError: If its shape or a vertex does not fit.
    """
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"Expected '{name}' to be a long tensor (got {got})")
    fits = index.dim() == len(shape) and all(
        n > 0 if isinstance(s, str) else n == s for s, n in zip(shape, index.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"Expected '{name}' of shape [{expected}] (got {list(index.shape)})")
    if not plain(index) or index.numel() == 0:
        return
    smallest, largest = index.min().item(), index.max().item()
    if smallest < low or largest >= end:
        raise ValueError(
            f"Expected '{name}' of vertices from {low} to {end - 1} (got {smallest} to {largest})"
        )


def check_weight(name: str, weight: Tensor, shape: Sequence[int]) -> None:
    r"""Checks the weights of slots that come from outside, as :meth:`check_index` does.

    Raises:
        TypeError: If they are not floating point.
        ValueError: If they are not of :obj:`shape` or not finite.
    """
    if not weight.is_floating_point():
        raise TypeError(f"Expected '{name}' to be a floating point tensor (got {weight.dtype})")
    if weight.shape != torch.Size(shape):
        raise ValueError(f"Expected '{name}' of shape {list(shape)} (got {list(weight.shape)})")
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"Expected finite '{name}' (got NaN or infinity)")
