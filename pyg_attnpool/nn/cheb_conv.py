from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.nn.inits import zeros
from torch_geometric.utils import coalesce, degree, remove_self_loops

from pyg_attnpool.nn.base import VertexLayer, check_weight, weight_of
from pyg_attnpool.ops.backend import has_version
from pyg_attnpool.ops.cheb import cheb_conv
from pyg_attnpool.ops.sparse import transpose


class StaticChebConv(VertexLayer):
    r"""The chebyshev spectral graph convolutional operator from the `"Convolutional Neural
    Networks on Graphs with Fast Localized Spectral Filtering"
    <https://arxiv.org/abs/1606.09375>`_ paper, for one graph that never changes

    .. math::
        \mathbf{X}^{\prime} = \sum_{k=1}^{K} \mathbf{Z}^{(k)} \cdot \mathbf{\Theta}^{(k)}, \qquad
        \mathbf{Z}^{(k)} = 2 \cdot \mathbf{\hat{L}} \cdot \mathbf{Z}^{(k-1)} - \mathbf{Z}^{(k-2)}

    with :math:`\mathbf{Z}^{(1)} = \mathbf{X}`, :math:`\mathbf{Z}^{(2)} = \mathbf{\hat{L}}
    \cdot \mathbf{X}` and the scaled, symmetrically normalised Laplacian
    :math:`\mathbf{\hat{L}} = \mathbf{L} - \mathbf{I} = - \mathbf{D}^{-1/2} \mathbf{A}
    \mathbf{D}^{-1/2}` (:math:`\lambda_{\max} = 2`) computed once.

    It has the parameters and the :obj:`state_dict` of :class:`torch_geometric.nn.ChebConv` and
    computes the same. Where the output is narrower than the input, the recurrence runs on the
    products :math:`\mathbf{X} \mathbf{\Theta}^{(k)}` instead (Clenshaw's algorithm).

    Args:
        in_channels (int): Size of each input sample.
        out_channels (int): Size of each output sample.
        K (int): Chebyshev filter size :math:`K`.
        edge_index (torch.Tensor): The edge indices :obj:`[2, E]` of an undirected graph.
        num_nodes (int): The number of nodes :math:`N`.
        bias (bool, optional): If set to :obj:`False`, the layer will not learn an additive bias.
            (default: :obj:`True`)

    Shapes:
        - **input:** features :math:`(N, F_{in})`, :math:`(B, N, F_{in})` or a mini-batch
          :math:`(B \cdot N, F_{in})`
        - **output:** the same with :math:`F_{out}`

    Raises:
        ValueError: If :obj:`K` is not positive or :obj:`edge_index` is of the wrong shape, out of
            range or not symmetric.

    Example:
        >>> conv = StaticChebConv(3, 16, K=6, edge_index=hierarchy.edge_index(0), num_nodes=642)
        >>> conv(torch.randn(2, 642, 3)).shape
        torch.Size([2, 642, 16])
    """

    rowptr: Tensor
    col: Tensor
    laplacian: Tensor
    _read = ("laplacian",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        K: int,
        edge_index: Tensor,
        num_nodes: int,
        bias: bool = True,
    ):
        super().__init__()
        if K < 1:
            raise ValueError(f"Expected a filter size 'K' of at least 1 (got {K})")
        rowptr, col, value = _scaled_laplacian(edge_index, num_nodes)

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_source = num_nodes
        self.lins: Any = torch.nn.ModuleList(
            Linear(in_channels, out_channels, bias=False, weight_initializer="glorot")
            for _ in range(K)
        )
        self.bias = Parameter(torch.empty(out_channels)) if bias else None
        # Not persistent: a state_dict is that of PyG's layer, which holds no graph either.
        num_edges = col.numel()
        self.register_index("rowptr", rowptr, (num_nodes + 1,), num_edges + 1, persistent=False)
        self.register_index("col", col, (num_edges,), num_nodes, persistent=False)
        self.register_buffer("laplacian", value, persistent=False)

        self.reset_parameters()
        self._renew()

    def _check(self) -> None:
        # The backward pass takes the Laplacian for its own transpose.
        if not (has_version(self.col) and has_version(self.laplacian)):
            return
        check_weight("laplacian", self.laplacian, self.col.shape)
        rowptr, col, perm = transpose(self.rowptr, self.col, self.num_source)
        entries = torch.equal(rowptr, self.rowptr) and torch.equal(col, self.col)
        if not (entries and torch.equal(self.laplacian[perm], self.laplacian)):
            raise ValueError("Expected a symmetric 'laplacian' (got one that was edited)")

    @property
    def num_nodes(self) -> int:
        r"""The number of nodes :math:`N`."""
        return self.num_source

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        for lin in self.lins:
            lin.reset_parameters()
        zeros(self.bias)

    def rows_forward(self, x: Tensor) -> Tensor:
        weight = torch.stack([weight_of(lin).t() for lin in self.lins])
        laplacian = self.rowptr, self.col, self.laplacian
        return cheb_conv(laplacian, x, weight, self.bias)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, "
            f"K={len(self.lins)}, num_nodes={self.num_nodes})"
        )


def _scaled_laplacian(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.is_floating_point():
        raise ValueError(
            f"Expected 'edge_index' to be a long tensor of shape [2, E] "
            f"(got {edge_index.dtype} of shape {list(edge_index.shape)})"
        )
    edge_index, _ = remove_self_loops(edge_index.long())
    if edge_index.numel() > 0 and not 0 <= edge_index.min() <= edge_index.max() < num_nodes:
        raise ValueError(
            f"Expected nodes from 0 to {num_nodes - 1} in 'edge_index' "
            f"(got {edge_index.min().item()} to {edge_index.max().item()})"
        )
    # A repeated edge counts as often as it stands there, as it does in PyG.
    count = torch.ones(edge_index.size(1), device=edge_index.device)
    edge_index, count = coalesce(edge_index, count, num_nodes=num_nodes)
    swapped, swapped_count = coalesce(edge_index.flip(0), count, num_nodes=num_nodes)
    if not (torch.equal(swapped, edge_index) and torch.equal(swapped_count, count)):
        raise ValueError("Expected 'edge_index' to be undirected (got an edge in one direction)")
    row, col = edge_index
    scale = torch.zeros(num_nodes, device=row.device).index_add(0, row, count).pow(-0.5)
    rowptr = torch.cat([row.new_zeros(1), degree(row, num_nodes, torch.long).cumsum(0)])
    return rowptr, col, -(scale[row] * scale[col]) * count  # symmetric to the last digit
