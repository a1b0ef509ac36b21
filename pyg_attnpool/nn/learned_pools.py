r"""The other poolings of the paper's comparison (table 1)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch_geometric.nn.inits import glorot

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn.base import PatternPool, PoolingLayer, VertexLayer
from pyg_attnpool.nn.cheb_conv import StaticChebConv


class FullPool(PoolingLayer):
    r"""Pooling or unpooling whose whole mapping matrix is a parameter:

    .. math::
        \mathbf{Y} = \mathbf{M} \mathbf{X}, \qquad
        \mathbf{M} \in \mathbb{R}^{\textrm{num\_target} \times \textrm{num\_source}}

    Args:
        num_source (int): The number of source vertices :math:`N`.
        num_target (int): The number of target vertices :math:`M`.

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`
        - **output:** the same with :math:`M` for :math:`N`

    Example:
        >>> from pyg_attnpool.nn import FullPool
        >>> FullPool(642, 161)(torch.randn(2, 642, 3)).shape
        torch.Size([2, 161, 3])
    """

    def __init__(self, num_source: int, num_target: int):
        super().__init__()
        if min(num_source, num_target) < 1:
            raise ValueError(
                f"Expected 'num_source' and 'num_target' to be positive "
                f"(got {num_source} and {num_target})"
            )
        self.num_source = num_source
        self.num_target = num_target
        self.weight = Parameter(torch.empty(num_target, num_source))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        glorot(self.weight)

    def rows_forward(self, x: Tensor) -> Tensor:
        return torch.einsum("mn,nbf->mbf", self.weight, x)

    def mapping(self) -> Mapping:
        r"""The matrix, with a slot for every source vertex."""
        index = torch.arange(self.num_source, device=self.weight.device)
        return Mapping(index.repeat(self.num_target, 1), self.weight, self.num_source)


class WeightedPool(PatternPool):
    r"""Pooling or unpooling over fixed neighbourhoods with a trainable weight per neighbour:

    .. math::
        \mathbf{y}_i = \sum_{j=1}^{k} w_{ij} \, \mathbf{x}_{\textrm{index}_{ij}}

    Args:
        mapping (Mapping): The neighbourhoods and their initial weights, or any matrix that
            :meth:`Mapping.from_matrix` takes. A slot of weight zero is no neighbour.

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)` of :math:`N` source vertices
        - **output:** the same with :math:`M` target vertices

    Example:
        >>> from pyg_attnpool.nn import WeightedPool
        >>> pool = WeightedPool(hierarchy.down[0])
        >>> pool.mapping().nnz == hierarchy.down[0].nnz
        True
    """

    initial_weight: Tensor
    _of_slots = (("weight", "index"), ("initial_weight", "index"))

    def __init__(self, mapping: Any):
        mapping = Mapping.from_matrix(mapping).detach()
        super().__init__(mapping)
        self.weight = Parameter(torch.empty_like(mapping.weight))
        self.register_buffer("initial_weight", mapping.weight.clone())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        self.weight.copy_(self.initial_weight)

    def slots(self) -> tuple[Tensor, Tensor]:
        r"""Index and weight :obj:`[M, k]` of every slot; zero where there is no neighbour."""
        return self.index, self.weight * (self.initial_weight != 0)


class DiffPool(VertexLayer):
    r"""Unlike :func:`torch_geometric.nn.dense_diff_pool`, a layer with a convolution of its own,
    for one sparse graph that all samples share.

    The differentiable pooling from the `"Hierarchical Graph Representation Learning with
    Differentiable Pooling" <https://arxiv.org/abs/1806.08804>`_ paper, with a graph convolution of
    the features themselves as the network that assigns:

    .. math::
        \mathbf{Y} = \mathrm{softmax}(\mathrm{conv}(\mathbf{X}))^{\top} \mathbf{X}

    The softmax is over the target vertices. The assignment is another one for every sample, so it
    cannot be frozen.

    Args:
        in_channels (int): Size of each input sample.
        num_target (int): The number of target vertices :math:`M`.
        edge_index (torch.Tensor): The edges :obj:`[2, E]` of the source level.
        num_source (int): The number of source vertices :math:`N`.
        K (int, optional): Chebyshev filter size of the convolution. (default: :obj:`2`)

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)`
        - **output:** the same with :math:`M` for :math:`N`

    Example:
        >>> from pyg_attnpool.nn import DiffPool
        >>> pool = DiffPool(3, 161, hierarchy.edge_index(0), num_source=642)
        >>> pool(torch.randn(2, 642, 3)).shape
        torch.Size([2, 161, 3])
    """

    def __init__(
        self, in_channels: int, num_target: int, edge_index: Tensor, num_source: int, K: int = 2
    ):
        super().__init__()
        self.num_source = num_source
        self.num_target = num_target
        self.conv = StaticChebConv(in_channels, num_target, K, edge_index, num_source)

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        self.conv.reset_parameters()

    def rows_forward(self, x: Tensor) -> Tensor:
        assignment = self.conv(x, rows=True).softmax(dim=-1)
        # In this order the gradient of the assignment, the largest tensor, lies as it does.
        return (x.permute(1, 2, 0) @ assignment.transpose(0, 1)).permute(2, 0, 1)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.num_source}, {self.num_target})"


def average_mapping(hierarchy: MeshHierarchy, level: int, up: bool) -> Mapping:
    r"""Equal weights over what simplification joined, between a level and the next coarser one.

    Down, a coarse vertex takes the fine vertices that :obj:`hierarchy.up[level]` draws mostly from
    it. Up, a fine vertex takes the coarse vertices that :obj:`hierarchy.up[level]` draws on.

    Args:
        hierarchy (MeshHierarchy): The levels of the template.
        level (int): The finer of the two levels.
        up (bool): The direction, from coarse to fine if :obj:`True`.
    """
    mapping = hierarchy.up[level]
    if up:
        used = (mapping.weight != 0).to(mapping.dtype)
        return Mapping(mapping.index, used / used.sum(dim=1, keepdim=True), mapping.num_source)
    owner = _owner(hierarchy, level)
    entry = torch.stack([owner, torch.arange(len(owner))])
    weight = 1 / torch.bincount(owner)[owner].double()
    size = (mapping.num_source, mapping.num_target)
    return Mapping.from_matrix(torch.sparse_coo_tensor(entry, weight, size, check_invariants=True))


def ring_mapping(hierarchy: MeshHierarchy, level: int, up: bool) -> Mapping:
    r"""Equal weights over a source vertex and its neighbours by an edge, between a level and the
    next coarser one. Down, that source vertex is the one that simplification kept; up, the one that
    :obj:`hierarchy.up[level]` draws mostly on.

    Args:
        hierarchy (MeshHierarchy): As in :meth:`average_mapping`.
        level (int): As in :meth:`average_mapping`.
        up (bool): As in :meth:`average_mapping`.
    """
    source = level + 1 if up else level
    centre = _owner(hierarchy, level) if up else hierarchy.down[level].index[:, 0]
    size = hierarchy.num_vertices[source]
    loops = torch.arange(size).repeat(2, 1)
    entry = torch.cat([hierarchy.edge_index(source), loops], dim=1)
    ones = torch.ones(entry.size(1), dtype=torch.float64)
    ring = torch.sparse_coo_tensor(entry, ones, (size, size), check_invariants=True)
    field = Mapping.from_matrix(ring)
    index, weight = field.index[centre], field.weight[centre]
    return Mapping(index, weight / weight.sum(dim=1, keepdim=True), size)


def _owner(hierarchy: MeshHierarchy, level: int) -> Tensor:
    # The vertex of the next coarser level that each vertex is mostly drawn from.
    up = hierarchy.up[level]
    return up.index.gather(1, up.weight.argmax(dim=1, keepdim=True)).squeeze(1)
