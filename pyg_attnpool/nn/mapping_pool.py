from typing import Any

import torch

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.nn.base import PatternPool


class MappingPool(PatternPool):
    r"""Pooling or unpooling by a fixed mapping, such as that of quadric error metric (QEM)
    simplification or of a frozen :class:`~pyg_attnpool.nn.AttentionPool`:

    .. math::
        \mathbf{y}_i = \sum_{j=1}^{k} \textrm{weight}_{ij} \, \mathbf{x}_{\textrm{index}_{ij}}

    It has buffers and no parameters. A :obj:`state_dict` of another mapping between the same
    vertices can be loaded, with any number of slots. It can also stand where a model holds the
    matrix itself (:meth:`AttentionPool.from_mapping`).

    Args:
        mapping (Mapping): The mapping, or any matrix that :meth:`Mapping.from_matrix` takes.

    Shapes:
        - **input:** features :math:`(N, F)`, :math:`(B, N, F)` or a mini-batch
          :math:`(B \cdot N, F)` of :math:`N` source vertices
        - **output:** the same with :math:`M` target vertices

    Example:
        >>> pool = MappingPool(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
        >>> pool(torch.tensor([[1.0], [3.0], [5.0]])).tolist()
        [[2.0], [5.0]]
    """

    def __init__(self, mapping: Any):
        mapping = Mapping.from_matrix(mapping).detach()
        super().__init__(mapping)
        self.register_buffer("weight", mapping.weight.clone())

    @classmethod
    def empty(cls, num_source: int, num_target: int, k: int) -> "MappingPool":
        r"""A layer of :obj:`k` slots of weight zero, into which a :obj:`state_dict` is loaded."""
        index = torch.zeros(num_target, k, dtype=torch.long)
        return cls(Mapping(index, torch.zeros(num_target, k), num_source))
