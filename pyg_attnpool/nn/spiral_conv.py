from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn.dense.linear import Linear

from pyg_attnpool.ops.gather import on_rows, spmm, transpose


class SpiralConv(torch.nn.Module):
    r"""The spiral convolution from the `"Neural 3D Morphable Models"
    <https://arxiv.org/abs/1905.02876>`_ paper

    .. math::
        \mathbf{x}^{\prime}_i = \mathbf{W} \, \big\Vert_{l=1}^{L} \mathbf{x}_{S(i, l)} + \mathbf{b}

    where :math:`S(i, l)` is the :math:`l`-th vertex on the spiral of vertex :math:`i`; where the
    spiral has none, zeros stand in its place.

    Features are gathered and then multiplied, or multiplied and then gathered, whichever moves
    less.

    Args:
        in_channels (int): Size of each input sample.
        out_channels (int): Size of each output sample.
        spirals (torch.Tensor): The spirals :obj:`[N, L]` (long), -1 for no vertex, as from
            :meth:`~pyg_attnpool.mesh.spiral_sequences`.
        bias (bool, optional): If set to :obj:`False`, the layer will not learn an additive bias.
            (default: :obj:`True`)

    Shapes:
        - **input:** features :math:`(N, F_{in})`, :math:`(B, N, F_{in})` or a mini-batch
          :math:`(B \cdot N, F_{in})`
        - **output:** the same with :math:`F_{out}`

    Raises:
        TypeError: If :obj:`spirals` is not integral.
        ValueError: If :obj:`spirals` is of the wrong shape or out of range.
    """

    def __init__(self, in_channels: int, out_channels: int, spirals: Tensor, bias: bool = True):
        super().__init__()
        if not isinstance(spirals, Tensor) or spirals.dtype not in (torch.int64, torch.int32):
            got: Any = spirals.dtype if isinstance(spirals, Tensor) else type(spirals).__name__
            raise TypeError(f"Expected 'spirals' to be a long tensor (got {got})")
        if spirals.dim() != 2 or spirals.numel() == 0:
            raise ValueError(f"Expected 'spirals' of shape [N, L] (got {list(spirals.shape)})")
        num_nodes, length = spirals.shape
        low, high = spirals.min().item(), spirals.max().item()
        if low < -1 or high >= num_nodes:
            raise ValueError(
                f"Expected 'spirals' of vertices -1 to {num_nodes - 1} (got {low} to {high})"
            )

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_nodes = num_nodes
        self.length = length
        self.lin = Linear(length * in_channels, out_channels, bias=bias)
        # Not persistent: weights are weights of any mesh of this size, as those of a graph are.
        self.register_buffer("spirals", spirals.long(), persistent=False)
        for name, tensor in self._pattern().items():
            self.register_buffer(name, tensor, persistent=False)

    def reset_parameters(self):
        r"""Resets all learnable parameters of the module."""
        self.lin.reset_parameters()

    def _pattern(self) -> dict[str, Tensor]:
        # The steps of all spirals that meet a vertex, as the matrix that sums the rows (vertex,
        # step) over the steps, or that copies rows (vertex) to rows (vertex, step).
        spirals = self.spirals
        step = torch.arange(self.length, device=spirals.device)
        used = spirals >= 0
        vertex = spirals[used]
        if self.out_channels < self.in_channels:
            counts = used.sum(dim=1)
            col = (spirals * self.length + step)[used]
            num_cols = self.num_nodes * self.length
        else:
            counts = used.flatten().long()
            col, num_cols = vertex, self.num_nodes
        rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        pattern = (rowptr, col, *transpose(rowptr, col, num_cols))
        return dict(zip(("rowptr", "col", "rowptr_t", "col_t", "perm"), pattern, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        r"""Convolves the features of all vertices."""
        if x.size(-1) != self.in_channels:
            raise ValueError(f"Expected {self.in_channels} input channels (got {list(x.shape)})")
        narrow = self.out_channels < self.in_channels
        return on_rows(x, self.num_nodes, self._multiply_first if narrow else self._gather_first)

    def _spmm(self, rows: Tensor) -> Tensor:
        ones = rows.new_ones(self.col.numel())
        return spmm(self.rowptr, self.col, ones, rows, (self.rowptr_t, self.col_t, self.perm))

    def _gather_first(self, x: Tensor) -> Tensor:
        rows = self._spmm(x.reshape(self.num_nodes, -1))
        steps = rows.view(self.num_nodes, self.length, x.size(1), self.in_channels)
        return self.lin(steps.transpose(1, 2).flatten(2))

    def _multiply_first(self, x: Tensor) -> Tensor:
        weight = self.lin.weight.view(self.out_channels, self.length, self.in_channels)
        steps = torch.einsum("nbf,olf->nlbo", x, weight)
        rows = self._spmm(steps.reshape(self.num_nodes * self.length, -1))
        out = rows.view(self.num_nodes, x.size(1), self.out_channels)
        return out if self.lin.bias is None else out + self.lin.bias.to(out.dtype)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, "
            f"length={self.length}, num_nodes={self.num_nodes})"
        )
