r"""The layers as a pooler of `torch-geometric-pool <https://pypi.org/project/torch-geometric-pool>`_
in its Select-Reduce-Lift-Connect form. Nothing else in this package needs that one."""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.typing import Adj

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.nn.base import PoolingLayer
from pyg_attnpool.ops.adjacency import pool_adjacency

try:
    from tgp.connect import Connect
    from tgp.lift import BaseLift
    from tgp.reduce import BaseReduce
    from tgp.select import Select, SelectOutput
    from tgp.src import BasePrecoarseningMixin, PoolingOutput, SRCPooling
    from tgp.utils.ops import (
        build_pooled_batch,
        connectivity_to_edge_index,
        connectivity_to_sparsetensor,
        connectivity_to_torch_coo,
        postprocess_adj_pool_sparse,
    )
except ImportError as e:
    raise ImportError(
        "'pyg_attnpool.integrations.tgp' requires 'torch-geometric-pool': install it with "
        '`pip install "pyg_attnpool[tgp]"`'
    ) from e


class MappingSelect(Select):
    r"""The assignment of a pooling layer of this package as the :math:`\texttt{select}` operator.
    It depends on no features.

    :obj:`s` is the transposed mapping :obj:`[N, M]` of :obj:`pool` and :obj:`s_inv` the transposed
    mapping of :obj:`unpool`, both sparse, with one block per graph of a mini-batch.

    Args:
        pool (torch.nn.Module): As in :class:`MappingPooling`.
        unpool (torch.nn.Module, optional): As in :class:`MappingPooling`. (default: :obj:`None`)

    Raises:
        ValueError: If :obj:`unpool` does not lead back.

    Example:
        >>> from pyg_attnpool.integrations.tgp import MappingSelect
        >>> MappingSelect(AttentionPool.from_hierarchy(hierarchy, 0))().s.shape
        torch.Size([642, 161])
    """

    def __init__(self, pool: PoolingLayer, unpool: PoolingLayer | None = None):
        super().__init__()
        if unpool is not None:
            found = (unpool.num_source, unpool.num_target)
            if found != (pool.num_target, pool.num_source):
                raise ValueError(
                    f"Expected an 'unpool' from {pool.num_target} to {pool.num_source} vertices "
                    f"(got {found[0]} to {found[1]})"
                )
        self.pool = pool
        self.unpool = unpool

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        for layer in (self.pool, self.unpool):
            reset = getattr(layer, "reset_parameters", None)  # a fixed mapping has none
            if reset is not None:
                reset()

    def forward(
        self,
        x: Tensor | None = None,
        edge_index: Adj | None = None,
        edge_weight: Tensor | None = None,
        *,
        batch: Tensor | None = None,
        num_nodes: int | None = None,
        **kwargs: Any,
    ) -> SelectOutput:
        r"""Returns the assignment, for as many graphs as :obj:`x`, :obj:`batch` or
        :obj:`num_nodes` has, or else for one.

        Raises:
            TypeError: If the features are not floating point.
            ValueError: If the graphs have other than :obj:`pool.num_source` vertices.
        """
        n = self.pool.num_source
        if x is not None:
            num_nodes = x.size(0)
        elif batch is not None:
            num_nodes = batch.numel()
        elif num_nodes is None:
            num_nodes = n
        if num_nodes == 0 or num_nodes % n != 0 or (x is not None and x.dim() != 2):
            got = num_nodes if x is None else list(x.shape)
            raise ValueError(
                f"Expected features [B * {n}, F] of graphs with {n} vertices (got {got})"
            )
        if x is not None and not x.is_floating_point():
            raise TypeError(f"Expected floating point features (got {x.dtype})")
        batch_size = num_nodes // n
        if batch is not None and not torch.equal(
            batch, build_pooled_batch(batch_size, n, batch.device)
        ):
            raise ValueError(
                f"Expected a 'batch' of {batch_size} graphs with {n} vertices each, in order "
                f"(got {torch.bincount(batch).tolist()})"
            )
        dtype = torch.get_default_dtype() if x is None else x.dtype
        s = _blocks(self.pool.mapping(), batch_size, dtype).t()
        s_inv = None
        if self.unpool is not None:
            s_inv = _blocks(self.unpool.mapping(), batch_size, dtype).t()
        return SelectOutput(s=s, s_inv=s_inv, batch=batch)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}(pool={self.pool}, unpool={self.unpool})"


def _blocks(mapping: Mapping, batch_size: int, dtype: torch.dtype) -> Tensor:
    # The matrix as sparse COO, repeated along the diagonal.
    row, col, weight = mapping.entries(batch_size)
    return torch.sparse_coo_tensor(
        torch.stack([row, col]),
        weight.to(dtype),
        (batch_size * mapping.num_target, batch_size * mapping.num_source),
        is_coalesced=True,
    )


class MappingReduce(BaseReduce):
    r"""The :math:`\texttt{reduce}` operator :math:`\mathbf{S}^{\top} \mathbf{X}` of
    :class:`~tgp.reduce.BaseReduce`. It puts pooled vertices to which no vertex is assigned into
    their graph as well.

    Example:
        >>> from pyg_attnpool.integrations.tgp import MappingReduce, MappingSelect
        >>> so = MappingSelect(AttentionPool.from_hierarchy(hierarchy, 0))()
        >>> x, batch = MappingReduce()(torch.randn(642, 3), so)
        >>> x.shape
        torch.Size([161, 3])
    """

    @staticmethod
    def reduce_batch(select_output: SelectOutput, batch: Tensor | None) -> Tensor | None:
        r"""The graph of every pooled vertex: all graphs have equally many."""
        if batch is None:
            return None
        batch_size = int(batch.max()) + 1
        return build_pooled_batch(
            batch_size, select_output.num_supernodes // batch_size, batch.device
        )


class MappingConnect(Connect):
    r"""The :math:`\texttt{connect}` operator :math:`\mathbf{S}^{\top} \mathbf{A} \mathbf{S}` for
    sparse assignments of a vertex to any number of pooled vertices, without a dense matrix
    (:meth:`~pyg_attnpool.Mapping.pool_edges`).

    Args:
        remove_self_loops (bool, optional): If set to :obj:`False`, keeps self-loops.
            (default: :obj:`True`)
        degree_norm (bool, optional): If set to :obj:`True`, normalises by
            :math:`\mathbf{D}^{-1/2} \mathbf{A} \mathbf{D}^{-1/2}`. (default: :obj:`False`)
        edge_weight_norm (bool, optional): If set to :obj:`True`, divides by the largest absolute
            weight of every graph. (default: :obj:`False`)

    Example:
        >>> from pyg_attnpool.integrations.tgp import MappingConnect, MappingSelect
        >>> so = MappingSelect(AttentionPool.from_hierarchy(hierarchy, 0))()
        >>> edge_index, weight = MappingConnect()(hierarchy.edge_index(0), so)
        >>> edge_index.shape[1] == len(weight)
        True
    """

    def __init__(
        self,
        remove_self_loops: bool = True,
        degree_norm: bool = False,
        edge_weight_norm: bool = False,
    ):
        super().__init__()
        self.remove_self_loops = remove_self_loops
        self.degree_norm = degree_norm
        self.edge_weight_norm = edge_weight_norm

    def forward(
        self,
        edge_index: Adj,
        so: SelectOutput,
        *,
        edge_weight: Tensor | None = None,
        batch_pooled: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Adj, Tensor | None]:
        r"""Returns the pooled adjacency in the form of :obj:`edge_index`, which is an edge index,
        a sparse COO tensor or a :class:`torch_sparse.SparseTensor`, and its weights, which are
        :obj:`None` for the latter two."""
        edges, edge_weight = connectivity_to_edge_index(edge_index, edge_weight)
        pooled, weight = pool_adjacency(
            so.cluster_index,
            so.node_index,
            so.weight,
            (so.num_supernodes, so.num_nodes),
            edges,
            edge_weight,
        )
        if batch_pooled is None:  # a single graph
            batch_pooled = pooled.new_zeros(so.num_supernodes)
        pooled, weight = postprocess_adj_pool_sparse(
            pooled,
            weight,
            num_nodes=so.num_supernodes,
            remove_self_loops=self.remove_self_loops,
            degree_norm=self.degree_norm,
            edge_weight_norm=self.edge_weight_norm,
            batch_pooled=batch_pooled,
        )
        if not isinstance(edge_index, Tensor):
            return connectivity_to_sparsetensor(pooled, weight, so.num_supernodes), None
        if edge_index.is_sparse:
            return connectivity_to_torch_coo(pooled, weight, so.num_supernodes), None
        return pooled, weight

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(remove_self_loops={self.remove_self_loops}, "
            f"degree_norm={self.degree_norm}, edge_weight_norm={self.edge_weight_norm})"
        )


class MappingPooling(BasePrecoarseningMixin, SRCPooling):
    r"""A pooling layer of this package as a sparse pooler of `torch-geometric-pool
    <https://pypi.org/project/torch-geometric-pool>`_, for graphs that share their vertices:

    .. math::
        \mathbf{X}_{\textrm{pool}} = \mathbf{S}^{\top} \mathbf{X}, \qquad
        \mathbf{A}_{\textrm{pool}} = \mathbf{S}^{\top} \mathbf{A} \mathbf{S}, \qquad
        \mathbf{X}_{\textrm{lift}} = \mathbf{S}_{\textrm{inv}}^{\top} \mathbf{X}_{\textrm{pool}}

    where :math:`\mathbf{S}^{\top}` is the mapping of :obj:`pool` and
    :math:`\mathbf{S}_{\textrm{inv}}^{\top}` that of :obj:`unpool`. Where :obj:`pool` and
    :obj:`unpool` are fixed, it can be used for pre-coarsening.

    Where :math:`\mathbf{A}_{\textrm{pool}}` goes into convolutions that divide by the roots of
    degrees, take :meth:`AttentionPool.published`: a mapping of the default start sharpens, with
    negative weights too.

    Args:
        pool (AttentionPool or MappingPool): The pooling, from :math:`N` to :math:`M` vertices.
        unpool (AttentionUnpool or MappingPool, optional): The way back, from :math:`M` to
            :math:`N` vertices. If :obj:`None`, lifts by the transposed mapping :math:`\mathbf{S}`.
            (default: :obj:`None`)
        remove_self_loops (bool, optional): As in :class:`MappingConnect`. (default: :obj:`True`)
        degree_norm (bool, optional): As in :class:`MappingConnect`. (default: :obj:`False`)
        edge_weight_norm (bool, optional): As in :class:`MappingConnect`. (default: :obj:`False`)

    Shapes:
        - **input:** features :math:`(B \cdot N, F)`, edges :math:`(2, E)`, weights :math:`(E)`
        - **output:** a :class:`~tgp.src.PoolingOutput` with features :math:`(B \cdot M, F)`, or
          features :math:`(B \cdot N, F)` if :obj:`lifting`

    Raises:
        ValueError: If :obj:`unpool` does not lead back.

    Example:
        >>> from pyg_attnpool.integrations.tgp import MappingPooling
        >>> pooling = MappingPooling(AttentionPool.from_hierarchy(hierarchy, 0))
        >>> out = pooling(x=torch.randn(642, 3), adj=hierarchy.edge_index(0))
        >>> out.x.shape
        torch.Size([161, 3])
    """

    def __init__(
        self,
        pool: PoolingLayer,
        unpool: PoolingLayer | None = None,
        remove_self_loops: bool = True,
        degree_norm: bool = False,
        edge_weight_norm: bool = False,
    ):
        super().__init__(
            selector=MappingSelect(pool, unpool),
            reducer=MappingReduce(),
            lifter=BaseLift(matrix_op="precomputed"),
            connector=MappingConnect(remove_self_loops, degree_norm, edge_weight_norm),
        )

    def forward(
        self,
        x: Tensor,
        adj: Adj | None = None,
        edge_weight: Tensor | None = None,
        so: SelectOutput | None = None,
        batch: Tensor | None = None,
        lifting: bool = False,
        **kwargs: Any,
    ) -> PoolingOutput | Tensor:
        r"""Pools features and adjacency, or lifts features again.

        Args:
            x (torch.Tensor): The features to pool, or to lift.
            adj (torch.Tensor or SparseTensor, optional): The edges to pool.
                (default: :obj:`None`)
            edge_weight (torch.Tensor, optional): Their weights. (default: :obj:`None`)
            so (SelectOutput, optional): The assignment that was used to pool, needed if
                :obj:`lifting`. (default: :obj:`None`)
            batch (torch.Tensor, optional): The graph of every vertex. (default: :obj:`None`)
            lifting (bool, optional): If set to :obj:`True`, lifts. (default: :obj:`False`)
        """
        if lifting:
            return self.lift(x_pool=x, so=so)
        so = self.select(x=x, batch=batch)
        x_pool, batch_pooled = self.reduce(x=x, so=so, batch=batch)
        edge_index, edge_weight = self.connect(
            edge_index=adj, so=so, edge_weight=edge_weight, batch_pooled=batch_pooled
        )
        return PoolingOutput(
            x=x_pool, edge_index=edge_index, edge_weight=edge_weight, batch=batch_pooled, so=so
        )
