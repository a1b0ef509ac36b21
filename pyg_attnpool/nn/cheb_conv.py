import torch
from torch import Tensor
from torch.nn import Parameter
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.nn.inits import zeros
from torch_geometric.utils import coalesce, degree, remove_self_loops

from pyg_attnpool.ops.gather import on_rows, spmm, transpose


class StaticChebConv(torch.nn.Module):
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
    """

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
        self.num_nodes = num_nodes
        self.lins = torch.nn.ModuleList(
            Linear(in_channels, out_channels, bias=False, weight_initializer="glorot")
            for _ in range(K)
        )
        self.bias = Parameter(torch.empty(out_channels)) if bias else None
        # Not persistent: a state_dict is that of PyG's layer, which holds no graph either.
        self.register_buffer("rowptr", rowptr, persistent=False)
        self.register_buffer("col", col, persistent=False)
        self.register_buffer("laplacian", value, persistent=False)
        transposed = transpose(rowptr, col, num_nodes)
        for name, tensor in zip(("rowptr_t", "col_t", "perm"), transposed, strict=True):
            self.register_buffer(name, tensor, persistent=False)

        self.reset_parameters()

    def reset_parameters(self):
        r"""Resets all learnable parameters of the module."""
        for lin in self.lins:
            lin.reset_parameters()
        zeros(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        r"""Convolves the features of all nodes."""
        if x.size(-1) != self.in_channels:
            raise ValueError(f"Expected {self.in_channels} input channels (got {list(x.shape)})")
        narrow = self.out_channels < self.in_channels
        return on_rows(x, self.num_nodes, self._clenshaw if narrow else self._recurrence)

    def _propagate(self, z: Tensor) -> Tensor:
        transposed = (self.rowptr_t, self.col_t, self.perm)
        rows = z.reshape(self.num_nodes, -1)
        out = spmm(self.rowptr, self.col, self.laplacian.to(z.dtype), rows, transposed)
        return out.view(z.shape)

    def _recurrence(self, x: Tensor) -> Tensor:
        terms = [x]
        if len(self.lins) > 1:
            terms.append(self._propagate(x))
        while len(terms) < len(self.lins):
            terms.append(2 * self._propagate(terms[-1]) - terms[-2])
        weight = torch.cat([lin.weight for lin in self.lins], dim=1)
        return torch.nn.functional.linear(torch.cat(terms, dim=-1), weight, self.bias)

    def _clenshaw(self, x: Tensor) -> Tensor:
        # b_k = x theta_k + 2 L b_{k+1} - b_{k+2} from the last term down, halved at the first.
        weight = torch.cat([lin.weight for lin in self.lins])
        terms = list(torch.nn.functional.linear(x, weight).split(self.out_channels, dim=-1))
        out = terms.pop()
        if terms:
            following = None
            while len(terms) > 1:
                b = terms.pop() + 2 * self._propagate(out)
                b = b if following is None else b - following
                out, following = b, out
            out = terms.pop() + self._propagate(out)
            out = out if following is None else out - following
        return out if self.bias is None else out + self.bias.to(out.dtype)

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
    return rowptr, col, -scale[row] * count * scale[col]
