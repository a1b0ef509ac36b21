r"""What all layers share: the two layouts of features, index buffers that stay valid, and pooling
layers that stand where a model holds a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.ops.layout import on_rows
from pyg_attnpool.ops.sparse import Pattern, ell_rowptr, map_rows, transpose

if TYPE_CHECKING:
    from pyg_attnpool.nn.mapping_pool import MappingPool


class VertexLayer(torch.nn.Module):
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VertexLayer:
        # Casts are for features. An index that became floating point would be read as nonsense.
        indices = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and not buffer.is_floating_point()
        }
        for name in indices:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, index in indices.items():
            self._buffers[name] = _moved(index, fn)
        return self


def _moved(index: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    # What `fn` moves, shares or allocates, with the values of the index. `to_empty` takes an index
    # without values from the meta device; zeros are a valid vertex until a state is loaded.
    moved = fn(index)
    if moved is index or moved.is_meta:
        return moved
    if index.is_meta:
        return torch.zeros_like(index, device=moved.device)
    return index.to(moved.device)


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
        r"""The layer without its parameters: the mapping as it is now, for inference."""
        from pyg_attnpool.nn.mapping_pool import MappingPool  # the subclass that is frozen

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
    _of_slots: tuple[str, ...] = ("index", "weight")

    def __init__(self, mapping: Mapping):
        super().__init__()
        self.num_source = mapping.num_source
        self.num_target = mapping.num_target
        self.register_buffer("index", mapping.index.clone())
        for name in ("rowptr_t", "col_t", "perm"):
            self.register_buffer(name, None, persistent=False)
        self._refresh()

    def _refresh(self) -> None:
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A loaded state may have another number of slots, as that of a frozen attention has. It is
        # checked before anything of it is assigned.
        state = {name: state_dict.get(prefix + name) for name in self._of_slots}
        index = state["index"]
        if index is not None:
            check_index(prefix + "index", index, (self.num_target, None), self.num_source)
        for name, loaded in state.items():
            if isinstance(loaded, Tensor) and name != "index":
                check_weight(prefix + name, loaded, (self.index if index is None else index).shape)
        for name, loaded in state.items():
            own = getattr(self, name)
            if isinstance(loaded, Tensor) and loaded.shape != own.shape:
                own.data = own.new_zeros(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.index = self.index.long()
        self._refresh()

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.num_source}, {self.num_target}, "
            f"k={self.index.size(1)})"
        )


def check_index(
    name: str, index: Any, shape: tuple[int | None, int | None], num_source: int, low: int = 0
) -> None:
    r"""Checks an index that comes from outside, such as a loaded state, before it is used.

    Args:
        name (str): What the error calls it.
        index (torch.Tensor): The index; of the meta device only the shape is known.
        shape (tuple): The shape that it must have; :obj:`None` allows any size but zero.
        num_source (int): One more than the largest vertex.
        low (int, optional): The smallest value. (default: :obj:`0`)

    Raises:
        TypeError: If it is no long tensor.
        ValueError: If its shape or a vertex does not fit.
    """
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"Expected '{name}' to be a long tensor (got {got})")
    fits = index.dim() == len(shape) and index.numel() > 0
    if not fits or any(s not in (None, n) for s, n in zip(shape, index.shape, strict=True)):
        expected = ["k" if s is None else s for s in shape]
        raise ValueError(f"Expected '{name}' of shape {expected} (got {list(index.shape)})")
    if index.is_meta:
        return
    smallest, largest = index.min().item(), index.max().item()
    if smallest < low or largest >= num_source:
        raise ValueError(
            f"Expected '{name}' of vertices from {low} to {num_source - 1} "
            f"(got {smallest} to {largest})"
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
