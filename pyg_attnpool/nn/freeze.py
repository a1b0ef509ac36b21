from typing import TypeGuard

from torch.nn import Module

from pyg_attnpool.nn.base import PoolingLayer
from pyg_attnpool.nn.mapping_pool import MappingPool


def freeze(model: Module) -> Module:
    r"""Replaces every pooling layer of a model that can be a fixed mapping
    (:class:`AttentionPool`, :class:`AttentionUnpool`, :class:`FullPool`, :class:`WeightedPool`), in
    place, by the :class:`MappingPool` of its present mapping. The model that remains has the
    parameters of its QEM twin and computes the same as before.

    Args:
        model (torch.nn.Module): Any module that holds pooling layers.

    Returns:
        The same model; if it is itself a pooling layer, its :class:`MappingPool`.

    Raises:
        ValueError: If a layer holds a number that is not finite. The model stays as it was.

    Example:
        >>> freeze(torch.nn.Sequential(AttentionPool(9, 4)))
        Sequential(
          (0): MappingPool(9, 4, k=2)
        )
    """
    if _learned(model):
        return model.freeze()
    # A layer that is used in several places stays one layer.
    frozen = {layer: layer.freeze() for layer in model.modules() if _learned(layer)}
    for module in list(model.modules()):
        # Not named_children(), which names a child once that stands under two names.
        for name, child in module._modules.items():
            if child in frozen:
                setattr(module, name, frozen[child])
    return model


def _learned(layer: Module) -> TypeGuard[PoolingLayer]:
    return isinstance(layer, PoolingLayer) and not isinstance(layer, MappingPool)


freeze_attention = freeze  # its older name
