from torch import Tensor
from torch_geometric.nn.dense.linear import Linear

from pyg_attnpool.nn.base import VertexLayer, weight_of
from pyg_attnpool.ops.backend import plain
from pyg_attnpool.ops.spiral import spiral_conv, spiral_pattern

PATTERN = ("spirals", "rowptr", "col", "slot", "rowptr_t", "col_t", "slot_t")


class SpiralConv(VertexLayer):
    r"""The spiral convolution from the `"Neural 3D Morphable Models"
    <https://arxiv.org/abs/1905.02876>`_ paper

    .. math::
        \mathbf{x}^{\prime}_i = \mathbf{W} \, \big\Vert_{l=1}^{L} \mathbf{x}_{S(i, l)} + \mathbf{b}

    where :math:`S(i, l)` is the :math:`l`-th vertex on the spiral of vertex :math:`i`; where the
    spiral has none, zeros stand in its place.

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

    Example:
        >>> conv = SpiralConv(3, 16, hierarchy.spirals(0, length=9))
        >>> conv(torch.randn(2, 642, 3)).shape
        torch.Size([2, 642, 16])
    """

    spirals: Tensor

    def __init__(self, in_channels: int, out_channels: int, spirals: Tensor, bias: bool = True):
        super().__init__()
        matrix = isinstance(spirals, Tensor) and spirals.dim() == 2
        num_nodes, length = spirals.shape if matrix else (0, 0)
        # Not persistent: weights are weights of any mesh of this size, as those of a graph are.
        shape = num_nodes or "N", length or "L"
        self.register_index("spirals", spirals, shape, num_nodes, -1, persistent=False)

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_source = num_nodes
        self.length = length
        self.lin = Linear(length * in_channels, out_channels, bias=bias)
        self._renew()

    def _derive(self) -> None:
        if plain(self.spirals):  # others have shapes alone
            for name, tensor in zip(PATTERN, spiral_pattern(self.spirals), strict=True):
                setattr(self, name, tensor)

    @property
    def num_nodes(self) -> int:
        r"""The number of nodes :math:`N`."""
        return self.num_source

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the module."""
        self.lin.reset_parameters()

    def rows_forward(self, x: Tensor) -> Tensor:
        weight = weight_of(self.lin).view(self.out_channels, self.length, -1)
        pattern = tuple(getattr(self, name) for name in PATTERN)
        return spiral_conv(pattern, x, weight.permute(1, 2, 0), self.lin.bias)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, "
            f"length={self.length}, num_nodes={self.num_nodes})"
        )
