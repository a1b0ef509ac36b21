from typing import Any

import torch
from torch import Tensor

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.ops.gather import apply_mapping, ell_rowptr, transpose


class MappingPool(torch.nn.Module):
    r"""Pooling or unpooling by a fixed mapping, such as that of quadric error metric (QEM)
    simplification or of a frozen :class:`~pyg_attnpool.nn.AttentionPool`:

    .. math::
        \mathbf{y}_i = \sum_{j=1}^{k} \textrm{weight}_{ij} \, \mathbf{x}_{\textrm{index}_{ij}}

    It has buffers and no parameters. A :obj:`state_dict` of another mapping between the same
    vertices can be loaded, with any number of slots, as that of a frozen attention has.

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

    def mapping(self) -> Mapping:
        r"""The fixed mapping."""
        return Mapping(self.index, self.weight, self.num_source)

    def forward(self, x: Tensor) -> Tensor:
        r"""Maps features from source to target vertices."""
        transposed = (self.rowptr_t, self.col_t, self.perm)
        return apply_mapping(self.index, self.weight, x, self.num_source, transposed)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.num_source}, {self.num_target}, "
            f"k={self.index.size(1)})"
        )
