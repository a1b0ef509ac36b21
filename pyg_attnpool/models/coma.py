from typing import Any

import torch

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.autoencoder import (
    WIDER_DECODER_CHANNELS,
    WIDER_ENCODER_CHANNELS,
    MeshAutoencoder,
)


def coma(
    hierarchy: MeshHierarchy,
    pool: str = "qem",
    latent_channels: int = 8,
    wider: bool = False,
    latent_activation: str | None = "relu",
    **kwargs: Any,
) -> MeshAutoencoder:
    r"""The spectral mesh autoencoder of the `"Generating 3D Faces Using Convolutional Mesh
    Autoencoders" <https://arxiv.org/abs/1807.10267>`_ paper (CoMA), with quadric error metric
    (QEM) pooling as published there, or with the learned aggregation of the `"Learning Feature
    Aggregation for Deep 3D Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper.

    With four poolings to 5023, 1256, 314, 79 and 20 vertices and eight latent channels it has
    30,056 parameters, the wider setting 179,656. Attention adds 350,330 until
    :func:`~pyg_attnpool.export.freeze_attention` takes them away.

    Args:
        hierarchy (MeshHierarchy): The levels of the template, five unless channels are given.
        pool (str, optional): :obj:`"qem"` or :obj:`"attention"`, down and up.
            (default: :obj:`"qem"`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        wider (bool, optional): The channels of the paper's wider setting.
            (default: :obj:`False`)
        latent_activation (str, optional): :obj:`"relu"` as published, or :obj:`None`.
            (default: :obj:`"relu"`)
        **kwargs (optional): Additional arguments of :class:`MeshAutoencoder`.
    """
    if wider:
        kwargs.setdefault("encoder_channels", WIDER_ENCODER_CHANNELS)
        kwargs.setdefault("decoder_channels", WIDER_DECODER_CHANNELS)
    model = MeshAutoencoder(
        hierarchy,
        down=pool,
        latent_channels=latent_channels,
        latent_activation=latent_activation,
        **kwargs,
    )
    reset_published(model)
    return model


@torch.no_grad()
def reset_published(model: MeshAutoencoder):
    r"""Resets convolutions and fully connected layers to CoMA's initial values: everything
    N(0, 0.1²), the biases of the fully connected layers 0.1."""
    for conv in [*model.down_convs, *model.up_convs, model.out_conv]:
        for parameter in conv.parameters():
            parameter.normal_(std=0.1)
    for lin in [model.to_latent, model.from_latent]:
        lin.weight.normal_(std=0.1)
        lin.bias.fill_(0.1)
