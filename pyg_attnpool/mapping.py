from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.nn.pool.select import SelectOutput

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.ops.adjacency import pool_adjacency
from pyg_attnpool.ops.backend import has_version
from pyg_attnpool.ops.sparse import apply_mapping, fuse_slots


class Mapping:
    r"""A sparse matrix that takes features of :obj:`num_source` vertices to :obj:`num_target`
    vertices, with the same number of slots :math:`k` in every row:

    .. math::
        \mathbf{y}_i = \sum_{j=1}^{k} \textrm{weight}_{ij} \, \mathbf{x}_{\textrm{index}_{ij}}

    Quadric error metric (QEM) down-sampling has one slot, barycentric up-sampling three, attention
    :math:`k`. An unused slot has weight zero. A source vertex may stand in several slots of a row;
    their weights add.

    Args:
        index (torch.Tensor): The source vertex of every slot :obj:`[num_target, k]` (long).
        weight (torch.Tensor): The weight of every slot :obj:`[num_target, k]`.
        num_source (int): The number of source vertices.

    Raises:
        TypeError: If :obj:`index` is not integral or :obj:`weight` not floating point.
        ValueError: If the shapes differ, an index is out of range or a weight is not finite.

    Example:
        >>> mapping = Mapping(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0.5, 0.5], [1, 0]]), 3)
        >>> (mapping @ torch.tensor([[1.0], [3.0], [5.0]])).tolist()
        [[2.0], [5.0]]
    """

    def __init__(self, index: Tensor, weight: Tensor, num_source: int):
        _check(index, weight, num_source)
        self.index = index.long()
        self.weight = weight
        self.num_source = int(num_source)
        self._seen = self._now()

    def _now(self) -> tuple[int, int, torch.Size] | None:
        # Where the indices are, how often they were edited, and the shape of the weights. Tensors
        # of inference mode count no edits, and those that are traced have no place.
        if torch.compiler.is_compiling() or not has_version(self.index):
            return None
        version = -1 if self.index.is_inference() else self.index._version
        return self.index.data_ptr(), version, self.weight.shape

    def _check_edits(self) -> None:
        # What somebody has put into the tensors since they were checked.
        now = self._now()
        if now is not None and now != self._seen:
            _check(self.index, self.weight, self.num_source)
            self._seen = now

    @property
    def num_target(self) -> int:
        r"""The number of target vertices."""
        return self.index.size(0)

    @property
    def k(self) -> int:
        r"""The number of slots per row."""
        return self.index.size(1)

    @property
    def nnz(self) -> int:
        r"""The number of entries that a conversion stores."""
        return self._entries()[0].numel()

    @property
    def device(self) -> torch.device:
        r"""The device of the weights."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        r"""The type of the weights."""
        return self.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> Mapping:
        r"""Moves or casts as :meth:`torch.Tensor.to` does; the indices stay long."""
        weight = self.weight.to(*args, **kwargs)
        return Mapping(self.index.to(weight.device), weight, self.num_source)

    def detach(self) -> Mapping:
        r"""The same mapping without gradients."""
        return Mapping(self.index, self.weight.detach(), self.num_source)

    def __matmul__(self, x: Tensor) -> Tensor:
        r"""Maps features :obj:`[num_source, F]` or :obj:`[B, num_source, F]`."""
        if not isinstance(x, Tensor):
            return NotImplemented
        if x.dim() not in (2, 3) or x.size(-2) != self.num_source:
            raise ValueError(
                f"Expected features of shape [{self.num_source}, F] or [B, {self.num_source}, F] "
                f"(got {list(x.shape)})"
            )
        self._check_edits()
        return apply_mapping(self.index, self.weight, x, self.num_source)

    def fuse(self, other: Mapping, alpha: float | Tensor) -> Mapping:
        r"""The mixture :math:`\alpha \cdot \textrm{self} + (1 - \alpha) \cdot \textrm{other}`
        (equation (7) of the paper, with attention as :obj:`self` and the prior as :obj:`other`).

        Args:
            other (Mapping): A mapping between the same vertices.
            alpha (float or torch.Tensor): The share of this mapping; may carry gradients.
        """
        if not isinstance(other, Mapping):
            raise TypeError(f"Expected a Mapping to fuse with (got {type(other).__name__})")
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise ValueError(f"Expected one 'alpha' (got shape {list(alpha.shape)})")
        if (self.num_target, self.num_source) != (other.num_target, other.num_source):
            raise ValueError(
                f"Expected a mapping from {self.num_source} to {self.num_target} vertices "
                f"(got {other.num_source} to {other.num_target})"
            )
        self._check_edits()
        other._check_edits()
        index, weight = fuse_slots(self.index, self.weight, other.index, other.weight, alpha)
        return Mapping(index, weight, self.num_source)

    def pool_edges(
        self,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        remove_self_loops: bool = False,
        batch_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        r"""Pools the edges of a graph over the source vertices, so that the next convolution has a
        graph over the target vertices:

        .. math::
            \mathbf{A}^{\prime} = \mathbf{S} \mathbf{A} \mathbf{S}^{\top}

        where :math:`\mathbf{S}` is this mapping and :math:`A_{ij}` the weight of the edge
        :math:`(i, j)`. No dense matrix is formed. Weights that are trained keep their entries in
        :math:`\mathbf{A}^{\prime}` also where they are zero.

        Args:
            edge_index (torch.Tensor): The edges :obj:`[2, E]`; the weights of repeated edges add.
            edge_weight (torch.Tensor, optional): Their weights :obj:`[E]`; ones in the type of
                the mapping if :obj:`None`. (default: :obj:`None`)
            remove_self_loops (bool, optional): If set to :obj:`True`, leaves out the edges of a
                target vertex with itself, which stand for the edges inside its receptive field.
                (default: :obj:`False`)
            batch_size (int, optional): The number of graphs, for the edges of a mini-batch over
                :obj:`batch_size * num_source` vertices. (default: :obj:`1`)

        Returns:
            The edges :obj:`[2, E']`, sorted and without duplicates, and their weights
            :obj:`[E']` in the type of :obj:`edge_weight`, differentiable in the weights of
            mapping and edges.
        """
        row, col, weight = self.entries(batch_size)
        size = (batch_size * self.num_target, batch_size * self.num_source)
        return pool_adjacency(row, col, weight, size, edge_index, edge_weight, remove_self_loops)

    # Conversions #####################################################################

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        # Distinct entries sorted by row and column: other formats assume that no entry repeats.
        # A zero is dropped only where no gradient can make it something else.
        _check(self.index, self.weight, self.num_source)
        flat = torch.arange(self.num_target, device=self.device).unsqueeze(1) * self.num_source
        flat = (flat + self.index).flatten()
        entry, slot = flat.unique(return_inverse=True)
        weight = self.weight.new_zeros(entry.numel()).index_add(0, slot, self.weight.flatten())
        if not self.weight.requires_grad:
            used = weight != 0
            entry, weight = entry[used], weight[used]
        row = torch.div(entry, self.num_source, rounding_mode="floor")
        return row, entry - row * self.num_source, weight

    def entries(self, batch_size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        r"""Row, column and weight :obj:`[nnz]` of every entry, sorted, without duplicates, and
        differentiable in the weights.

        Args:
            batch_size (int, optional): How often the matrix stands along the diagonal, for the
                graphs of a mini-batch. (default: :obj:`1`)

        Raises:
            TypeError: If :obj:`batch_size` is no integer.
            ValueError: If it is not positive.
        """
        batch_size = as_integer("batch_size", batch_size, least=1)
        row, col, weight = self._entries()
        if batch_size == 1:
            return row, col, weight
        sample = torch.arange(batch_size, device=self.device).unsqueeze(1)
        row = (row + sample * self.num_target).flatten()
        col = (col + sample * self.num_source).flatten()
        return row, col, weight.repeat(batch_size)

    def to_sparse_tensor(self) -> Any:
        r"""The matrix as :class:`torch_sparse.SparseTensor` of size
        :obj:`(num_target, num_source)`, differentiable in the weights.

        Raises:
            ImportError: If :obj:`torch_sparse` is not installed.
        """
        try:
            from torch_sparse import SparseTensor
        except ImportError as e:
            raise ImportError(
                "'Mapping.to_sparse_tensor' requires 'torch_sparse': install it with "
                "`pip install torch_scatter torch_sparse --no-build-isolation`"
            ) from e
        row, col, weight = self._entries()
        return SparseTensor(
            row=row,
            col=col,
            value=weight,
            sparse_sizes=(self.num_target, self.num_source),
            is_sorted=True,
        )

    def to_torch_csr(self) -> Tensor:
        r"""The matrix as :func:`torch.sparse_csr_tensor`, differentiable in the weights."""
        row, col, weight = self._entries()
        ends = torch.arange(self.num_target + 1, device=self.device)
        size = (self.num_target, self.num_source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                torch.searchsorted(row, ends), col, weight, size, check_invariants=True
            )

    def to_edge_index(self) -> tuple[Tensor, Tensor]:
        r"""The matrix as the :obj:`edge_index` :obj:`[2, nnz]` of a bipartite graph, from source
        to target, and its weights :obj:`[nnz]`, differentiable in the weights."""
        row, col, weight = self._entries()
        return torch.stack([col, row]), weight

    def to_select_output(self) -> SelectOutput:
        r"""The matrix as the assignment of vertices to clusters of
        :mod:`torch_geometric.nn.pool.select`: source vertices are nodes, target vertices clusters.
        """
        row, col, weight = self._entries()
        return SelectOutput(col, self.num_source, row, self.num_target, weight)

    @classmethod
    def from_select_output(cls, output: SelectOutput) -> Mapping:
        r"""A mapping from the assignment of a pooling operator of PyG, differentiable in its
        weights, which are ones where it has none.

        Args:
            output (torch_geometric.nn.pool.select.SelectOutput): The assignment.
        """
        weight = output.weight
        if weight is None:
            weight = torch.ones(output.node_index.numel(), device=output.node_index.device)
        order = (output.cluster_index * output.num_nodes + output.node_index).argsort()
        row, col = output.cluster_index[order], output.node_index[order]
        return cls._from_coo(row, col, weight[order], (output.num_clusters, output.num_nodes))

    def to_scipy(self) -> Any:
        r"""The matrix as :class:`scipy.sparse.csr_array`, without gradients."""
        import scipy.sparse

        half = self.dtype not in (torch.float32, torch.float64)  # which scipy does not know
        mapping = self.detach().to("cpu", torch.float32 if half else self.dtype)
        row, col, weight = (t.numpy() for t in mapping._entries())
        size = (self.num_target, self.num_source)
        return scipy.sparse.coo_array((weight, (row, col)), shape=size).tocsr()

    def to_dense(self) -> Tensor:
        r"""The matrix :obj:`[num_target, num_source]`, differentiable in the weights. For small
        matrices and tests."""
        _check(self.index, self.weight, self.num_source)
        row = torch.arange(self.num_target, device=self.device).unsqueeze(1).expand_as(self.index)
        dense = self.weight.new_zeros(self.num_target, self.num_source)
        return dense.index_put((row, self.index), self.weight, accumulate=True)

    @classmethod
    def from_matrix(cls, matrix: Any) -> Mapping:
        r"""A mapping from any form of an :obj:`[num_target, num_source]` matrix.

        Args:
            matrix: A :class:`torch_sparse.SparseTensor`, a sparse COO or CSR or a dense
                :class:`torch.Tensor` (all differentiable in their values), a :mod:`scipy.sparse`
                matrix or array, or a :class:`Mapping`, which is returned as it is.

        Raises:
            TypeError: If the matrix is of another type.
            ValueError: If it is not two-dimensional or has no rows or columns.
        """
        if isinstance(matrix, Mapping):
            return matrix
        if isinstance(matrix, Tensor):
            _check_matrix(matrix.shape)
            if matrix.layout == torch.strided:
                row, col = matrix.detach().nonzero(as_tuple=True)
                return cls._from_coo(row, col, matrix[row, col], matrix.shape)
            _check_sparse(matrix)
            coo = matrix.to_sparse_coo().coalesce()
            row, col = coo.indices()
            return cls._from_coo(row, col, coo.values(), matrix.shape)
        if type(matrix).__name__ == "SparseTensor" and hasattr(matrix, "sparse_sizes"):
            _check_rowptr(matrix.storage._rowptr, matrix.nnz())
            row, col, value = matrix.coo()
            if value is None:  # an adjacency without values counts each entry once
                value = torch.ones(row.numel(), device=row.device)
            return cls._from_coo(row, col, value, matrix.sparse_sizes())
        if type(matrix).__module__.startswith("scipy.sparse"):
            _check_matrix(matrix.shape)
            if matrix.format in ("csr", "csc", "bsr"):
                matrix.check_format(full_check=True)
            coo = matrix.tocoo(copy=True)
            coo.sum_duplicates()
            value = torch.from_numpy(np.array(coo.data))
            if not (value.is_floating_point() or value.is_complex()):
                value = value.to(torch.get_default_dtype())
            row, col = (torch.from_numpy(i.astype(np.int64)) for i in (coo.row, coo.col))
            return cls._from_coo(row, col, value, matrix.shape)
        raise TypeError(
            f"Expected a Mapping, SparseTensor, torch or scipy matrix (got {type(matrix).__name__})"
        )

    @classmethod
    def _from_coo(cls, row: Tensor, col: Tensor, value: Tensor, size: Sequence[int]) -> Mapping:
        # Entries are sorted by row; an entry's slot is its place in its row.
        num_target, num_source = _check_matrix(size)
        for name, vertex, end in (("row", row, num_target), ("column", col, num_source)):
            if vertex.numel() > 0 and not 0 <= vertex.min() <= vertex.max() < end:
                raise ValueError(
                    f"Expected every {name} from 0 to {end - 1} "
                    f"(got {vertex.min().item()} to {vertex.max().item()})"
                )
        starts = torch.searchsorted(row, torch.arange(num_target, device=row.device))
        slot = torch.arange(row.numel(), device=row.device) - starts[row]
        k = int(slot.max()) + 1 if row.numel() > 0 else 1
        index = col.new_zeros(num_target, k).index_put((row, slot), col)
        weight = value.new_zeros(num_target, k).index_put((row, slot), value)
        return cls(index, weight, num_source)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.num_source}, {self.num_target}, k={self.k})"


def _check(index: Any, weight: Any, num_source: int) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"Expected 'index' to be a long tensor (got {got})")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"Expected 'weight' to be a floating point tensor (got {got})")
    if index.dim() != 2 or index.shape != weight.shape:
        raise ValueError(
            f"Expected 'index' and 'weight' of one shape [num_target, k] "
            f"(got {list(index.shape)} and {list(weight.shape)})"
        )
    if index.device != weight.device:
        raise ValueError(
            f"Expected 'index' and 'weight' on one device (got {index.device} and {weight.device})"
        )
    if not isinstance(num_source, int | np.integer):
        raise TypeError(f"Expected 'num_source' to be an integer (got {num_source!r})")
    if int(num_source) * len(index) >= 2**63:
        raise ValueError(f"Expected less than 2**63 pairs of vertices (got {num_source=})")
    if num_source < 1 or index.numel() == 0:
        raise ValueError(
            f"Expected at least one source vertex, target vertex and slot "
            f"(got num_source={num_source} and 'index' of shape {list(index.shape)})"
        )
    low, high = index.min().item(), index.max().item()
    if low < 0 or high >= num_source:
        raise ValueError(
            f"Expected source vertices from 0 to {num_source - 1} (got {low} to {high})"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("Expected finite weights (got NaN or infinity)")


def _check_sparse(matrix: Tensor) -> None:
    # PyTorch follows the indices of a sparse tensor, also where they were never checked.
    layout, detached = matrix.layout, matrix.detach()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
            if layout == torch.sparse_coo:
                entries = detached._indices(), detached._values()
                torch.sparse_coo_tensor(*entries, matrix.shape, check_invariants=True)
            else:
                rows = layout in (torch.sparse_csr, torch.sparse_bsr)
                names = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
                ends, inner = (getattr(detached, name)() for name in names)
                torch.sparse_compressed_tensor(
                    ends,
                    inner,
                    detached.values(),
                    matrix.shape,
                    layout=layout,
                    check_invariants=True,
                )
    except RuntimeError as e:
        raise ValueError(f"Expected a valid sparse matrix (got: {e})") from e


def _check_rowptr(rowptr: Tensor | None, nnz: int) -> None:
    # torch_sparse follows the row pointers of a SparseTensor, which it does not check.
    if rowptr is None:
        return
    ends = [rowptr[0].item(), rowptr[-1].item()] if rowptr.numel() else []
    if ends != [0, nnz] or (rowptr.diff() < 0).any():
        raise ValueError(f"Expected row pointers that ascend from 0 to {nnz} (got others)")


def _check_matrix(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"Expected a matrix of shape [num_target, num_source] (got {list(size)})")
    return int(size[0]), int(size[1])
