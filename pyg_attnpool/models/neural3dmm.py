from collections.abc import Sequence
from typing import Any

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.autoencoder import (
    WIDER_DECODER_CHANNELS,
    WIDER_ENCODER_CHANNELS,
    MeshAutoencoder,
)


def neural3dmm(
    hierarchy: MeshHierarchy,
    pool: str = "qem",
    latent_channels: int = 8,
    wider: bool = False,
    hops: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    reference: Sequence[int] | None = None,
    **kwargs: Any,
) -> MeshAutoencoder:
    r"""The spiral mesh autoencoder of the `"Neural 3D Morphable Models"
    <https://arxiv.org/abs/1905.02876>`_ paper, with quadric error metric (QEM) pooling as published
    there, or with the learned aggregation of the `"Learning Feature Aggregation for Deep 3D
    Morphable Models" <https://arxiv.org/abs/2105.02173>`_ paper, whose authors released no code for
    it.

    ELU follows every convolution but the last; both fully connected layers are linear. The defaults
    are the settings of the second paper; those of the first are :obj:`wider=True`,
    :obj:`hops=2` and :obj:`dilation=[2, 2, 1, 1]`.

    Args:
        hierarchy (MeshHierarchy): The levels of the template, five unless channels are given.
        pool (str, optional): :obj:`"qem"` or :obj:`"attention"`, down and up.
            (default: :obj:`"qem"`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        wider (bool, optional): The wider setting of channels. (default: :obj:`False`)
        hops (int or list, optional): The rings of a spiral, for all levels or each from fine to
            coarse. (default: :obj:`1`)
        dilation (int or list, optional): The step along a spiral, likewise. (default: :obj:`1`)
        reference (list, optional): The template vertices that orient the spirals, see
            :meth:`~pyg_attnpool.mesh.spiral_sequences`. (default: :obj:`None`)
        **kwargs (optional): Additional arguments of :class:`MeshAutoencoder`.
    """
    if wider:
        kwargs.setdefault("encoder_channels", WIDER_ENCODER_CHANNELS)
        kwargs.setdefault("decoder_channels", WIDER_DECODER_CHANNELS)
    return MeshAutoencoder(
        hierarchy,
        conv="spiral",
        down=pool,
        latent_channels=latent_channels,
        activation="elu",
        latent_activation=None,
        expand_activation=None,
        out_bias=True,
        spirals={"hops": hops, "dilation": dilation, "reference": reference},
        **kwargs,
    )
