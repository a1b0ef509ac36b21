r"""Layers around what PyG and others already have: a convolution of a graph that all samples share,
and any module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from torch_geometric.nn import MessagePassing

from pyg_attnpool.nn.base import VertexLayer


class GraphConv(VertexLayer):
    r"""A layer around any convolution of PyG, not PyG's own
    :class:`~torch_geometric.nn.conv.GraphConv`: it holds the graph of one level, which all samples
    share.

    Args:
        conv (torch_geometric.nn.MessagePassing): The convolution.
        edge_index (torch.Tensor): The edges :obj:`[2, E]`.
        num_nodes (int): The number of vertices :math:`N`.
        edge_attr (torch.Tensor, optional): Edge attributes :obj:`[E, D]`, the convolution's
            argument after :obj:`edge_index`. (default: :obj:`None`)

    Shapes:
        - **input:** features :math:`(N, F_{in})`, :math:`(B, N, F_{in})` or a mini-batch
          :math:`(B \cdot N, F_{in})`
        - **output:** the same with :math:`F_{out}`
    """

    edge_index: Tensor
    edge_attr: Tensor | None

    def __init__(
        self,
        conv: MessagePassing,
        edge_index: Tensor,
        num_nodes: int,
        edge_attr: Tensor | None = None,
    ):
        super().__init__()
        self.conv = conv
        self.num_source = num_nodes
        # Not persistent, as PyG's convolutions hold no graph either.
        self.register_index("edge_index", edge_index, (2, "E"), num_nodes, persistent=False)
        self.register_buffer("edge_attr", edge_attr, persistent=False)

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        self.conv.reset_parameters()

    def rows_forward(self, x: Tensor) -> Tensor:
        # The samples as one disconnected graph, which every convolution of PyG takes. Rows lie
        # vertex by vertex, so vertex i of sample b is node i * B + b.
        num_nodes, batch_size, _ = x.shape
        sample = torch.arange(batch_size, device=x.device)
        edges = (self.edge_index.unsqueeze(-1) * batch_size + sample).flatten(1)
        args = [edges]
        if self.edge_attr is not None:
            args.append(self.edge_attr.to(x.dtype).repeat_interleave(batch_size, dim=0))
        return self.conv(x.reshape(num_nodes * batch_size, -1), *args).view(
            num_nodes, batch_size, -1
        )


class AnyLayer(VertexLayer):
    r"""A layer around a module of features :math:`(B, N, F)` that knows nothing of rows.

    Args:
        layer (torch.nn.Module): The module.
        num_nodes (int): The number of vertices :math:`N`.
    """

    def __init__(self, layer: Module, num_nodes: int):
        super().__init__()
        self.layer = layer
        self.num_source = num_nodes

    def rows_forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def with_rows(layer: Module, num_nodes: int) -> VertexLayer:
    r"""The layer itself where it knows rows, or else an :class:`AnyLayer` around it."""
    return layer if isinstance(layer, VertexLayer) else AnyLayer(layer, num_nodes)
