from typing import Any, Literal

import torch

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.autoencoder import MeshAutoencoder
from pyg_attnpool.nn.resolver import Query

# The wider setting of the paper.
WIDER: dict[str, Any] = {
    "channels": (16, 32, 64, 128),
    "decoder_channels": (128, 64, 32, 32, 16),
}


def coma(
    hierarchy: MeshHierarchy,
    pool: Query = "qem",
    latent_channels: int = 8,
    wider: bool = False,
    K: int = 6,
    variant: Literal["default", "published"] = "default",
    **kwargs: Any,
) -> MeshAutoencoder:
    r"""The spectral mesh autoencoder of the `"Generating 3D Faces Using Convolutional Mesh
    Autoencoders" <https://arxiv.org/abs/1807.10267>`_ paper (CoMA), with quadric error metric
    (QEM) pooling as published there, or with the learned aggregation of the `"Learning Feature
    Aggregation for Deep 3D Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper.

    With four poolings to 5023, 1256, 314, 79 and 20 vertices and eight latent channels it has
    30,056 parameters, the wider setting 179,656. Attention adds 350,330 (and one for each layer's
    temperature) until :func:`~pyg_attnpool.nn.freeze` takes them away.

    Args:
        hierarchy (MeshHierarchy): The levels of the template, five unless channels are given.
        pool (str, optional): The aggregation down and up, such as :obj:`"qem"` or
            :obj:`"attention"`, see :func:`~pyg_attnpool.nn.resolver.pooling_resolver`.
            (default: :obj:`"qem"`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        wider (bool, optional): The channels of the paper's wider setting.
            (default: :obj:`False`)
        K (int, optional): Chebyshev filter size. (default: :obj:`6`)
        variant (str, optional): :obj:`"published"` is the model of the papers, with a ReLU on the
            latent code and their attention; :obj:`"default"` has a linear latent, which no
            dimension can die in, and the attention that wins. (default: :obj:`"default"`)
        **kwargs (optional): Additional arguments of
            :class:`~pyg_attnpool.models.autoencoder.AutoencoderConfig`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is out of range, the pooling is unknown, or channels are not as
            many as the levels.

    Example:
        >>> from pyg_attnpool.models import coma
        >>> network = coma(hierarchy, "attention", channels=(16, 16))  # of each level
        >>> network(torch.randn(2, 642, 3)).shape
        torch.Size([2, 642, 3])
    """
    model = MeshAutoencoder(
        hierarchy,
        **{
            "down": pool,
            "latent_channels": latent_channels,
            "latent_activation": "relu" if variant == "published" else None,
            "conv_kwargs": {"K": K},
            "variant": variant,
            **(WIDER if wider else {}),
            **kwargs,
        },
    )
    reset_published(model)
    return model


@torch.no_grad()
def reset_published(model: MeshAutoencoder) -> None:
    r"""Resets convolutions and fully connected layers to CoMA's initial values: everything
    N(0, 0.1²), the biases of the fully connected layers 0.1."""
    for conv in [*model.down_convs, *model.up_convs, model.out_conv]:
        for parameter in conv.parameters():
            parameter.normal_(std=0.1)
    for lin in [model.to_latent, model.from_latent]:
        lin.weight.normal_(std=0.1)
        lin.bias.fill_(0.1)
    if model.config.variational:  # the width of the prior
        model.to_log_variance.weight.normal_(std=0.1 / len(model.to_log_variance.weight[0]) ** 0.5)
        model.to_log_variance.bias.zero_()
