from typing import Any

import torch
from torch import Tensor

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.ops.layout import on_rows
from pyg_attnpool.ops.sparse import ell_rowptr, map_rows, transpose


class MatrixProtocol:
    r"""Lets a pooling layer stand where a model holds a matrix :obj:`[M, N]`: in :obj:`layer @ x`,
    :meth:`torch.matmul`, :meth:`torch.mm` and :meth:`torch.sparse.mm`, for features
    :obj:`[N, F]` or :obj:`[B, N, F]`, and in functions that read :meth:`size`, :meth:`_indices`
    and :meth:`_values` of a sparse COO tensor.

    If :obj:`dummy_weight` is set, the matrix is :obj:`[1, M + 1, N + 1]`: one more vertex stands
    at the end and keeps that share of its features. A call of the layer knows no such vertex.
    """

    num_source: int
    num_target: int
    dummy_weight: float | None = None

    def _slots(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

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
        index, _ = self._slots()
        row = torch.arange(self.num_target, device=index.device).unsqueeze(1).expand_as(index)
        return torch.stack([row.flatten(), index.flatten()])

    def _values(self) -> Tensor:
        r"""The value of every entry :obj:`[M * k]`, differentiable."""
        self._check_sparse()
        return self._slots()[1].flatten()

    def _check_sparse(self):
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
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        operands = (*args, *(kwargs or {}).values())
        products = (torch.matmul, torch.mm, torch.bmm, torch.sparse.mm)
        if func in products and len(operands) == 2 and isinstance(operands[0], MatrixProtocol):
            return operands[0].__matmul__(operands[1])
        return NotImplemented


class MappingPool(MatrixProtocol, torch.nn.Module):
    r"""Pooling or unpooling by a fixed mapping, such as that of quadric error metric (QEM)
    simplification or of a frozen :class:`~pyg_attnpool.nn.AttentionPool`:

    .. math::
        \mathbf{y}_i = \sum_{j=1}^{k} \textrm{weight}_{ij} \, \mathbf{x}_{\textrm{index}_{ij}}

    It has buffers and no parameters. A :obj:`state_dict` of another mapping between the same
    vertices can be loaded, with any number of slots, as that of a frozen attention has. It can
    also stand where a model holds the matrix itself (:meth:`AttentionPool.from_mapping`).

    Args:
        mapping (Mapping): The mapping, or any matrix that :meth:`Mapping.from_matrix` takes.

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)` of :math:`N` source vertices
        - **output:** the same with :math:`M` target vertices
    """

    index: Tensor
    weight: Tensor

    def __init__(self, mapping: Any):
        super().__init__()
        mapping = Mapping.from_matrix(mapping).detach()
        self.num_source = mapping.num_source
        self.num_target = mapping.num_target
        self.register_buffer("index", mapping.index.clone())
        self.register_buffer("weight", mapping.weight.clone())
        # Follows from the index; kept so that the backward pass need not sort.
        for name, tensor in zip(("rowptr_t", "col_t", "perm"), self._transpose(), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.register_load_state_dict_post_hook(self._refresh)

    def _transpose(self):
        return transpose(ell_rowptr(self.index), self.index.flatten(), self.num_source)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any):
        for name in ("index", "weight"):
            loaded, own = state_dict.get(prefix + name), getattr(self, name)
            if loaded is not None and loaded.shape[:-1] == own.shape[:-1]:
                setattr(self, name, own.new_zeros(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _refresh(module: "MappingPool", incompatible_keys: Any):
        # A loaded index must be as valid as a constructed one, and so must what follows from it.
        Mapping(module.index, module.weight, module.num_source)
        module.rowptr_t, module.col_t, module.perm = module._transpose()

    def _slots(self) -> tuple[Tensor, Tensor]:
        return self.index, self.weight

    def mapping(self) -> Mapping:
        r"""The fixed mapping."""
        return Mapping(self.index, self.weight, self.num_source)

    def forward(self, x: Tensor) -> Tensor:
        r"""Maps features from source to target vertices."""
        return on_rows(x, self.num_source, self.rows)

    def rows(self, x: Tensor) -> Tensor:
        r"""As :meth:`forward`, from rows :obj:`[N, B, F]` to rows :obj:`[M, B, F]`, so that a
        network transposes its features only once."""
        transposed = self.rowptr_t, self.col_t, self.perm
        return map_rows(self.index, self.weight, x, self.num_source, transposed)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.num_source}, {self.num_target}, "
            f"k={self.index.size(1)})"
        )
