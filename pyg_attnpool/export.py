from torch.nn import Module

from pyg_attnpool.nn.attention_pool import AttentionPool, AttentionUnpool


def freeze_attention(model: Module) -> Module:
    r"""Replaces every :class:`AttentionPool` and :class:`AttentionUnpool` of a model, in place, by
    the :class:`MappingPool` of its present mapping. What remains has the parameters of the model's
    QEM twin and computes what the model computed.

    Args:
        model (torch.nn.Module): Any module that holds attention layers.

    Returns:
        The same model; if it is itself an attention layer, its :class:`MappingPool`.
    """
    if isinstance(model, AttentionPool | AttentionUnpool):
        return model.freeze()
    frozen = {  # a layer used in several places stays one layer
        layer: layer.freeze()
        for layer in model.modules()
        if isinstance(layer, AttentionPool | AttentionUnpool)
    }
    for module in list(model.modules()):
        # Not named_children(), which names a child once that stands under two names.
        for name, child in module._modules.items():
            if child in frozen:
                setattr(module, name, frozen[child])
    return model
