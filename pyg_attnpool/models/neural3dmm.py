from collections.abc import Sequence
from typing import Any, Literal

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.autoencoder import MeshAutoencoder
from pyg_attnpool.models.coma import WIDER
from pyg_attnpool.nn.resolver import Query


def neural3dmm(
    hierarchy: MeshHierarchy,
    pool: Query = "qem",
    latent_channels: int = 8,
    wider: bool = False,
    hops: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    reference: Sequence[int] | None = None,
    variant: Literal["default", "published"] = "default",
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
        pool (str, optional): The aggregation down and up, such as :obj:`"qem"` or
            :obj:`"attention"`, see :func:`~pyg_attnpool.nn.resolver.pooling_resolver`.
            (default: :obj:`"qem"`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        wider (bool, optional): The wider setting of channels. (default: :obj:`False`)
        hops (int or list, optional): The rings of a spiral, for all levels or each from fine to
            coarse. (default: :obj:`1`)
        dilation (int or list, optional): The step along a spiral, likewise. (default: :obj:`1`)
        reference (list, optional): The template vertices that orient the spirals, see
            :meth:`~pyg_attnpool.mesh.spiral_sequences`. (default: :obj:`None`)
        variant (str, optional): :obj:`"published"` starts attention with the settings of the
            paper, :obj:`"default"` with those that win. (default: :obj:`"default"`)
        **kwargs (optional): Additional arguments of
            :class:`~pyg_attnpool.models.autoencoder.AutoencoderConfig`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is out of range, the pooling is unknown, or channels are not as
            many as the levels.

    Example:
        >>> from pyg_attnpool.models import neural3dmm
        >>> network = neural3dmm(hierarchy, "attention", channels=(16, 16))  # of each level
        >>> network(torch.randn(2, 642, 3)).shape
        torch.Size([2, 642, 3])
    """
    return MeshAutoencoder(
        hierarchy,
        **{
            "conv": "spiral",
            "down": pool,
            "latent_channels": latent_channels,
            "activation": "elu",
            "latent_activation": None,
            "expand_activation": None,
            "out_bias": True,
            "conv_kwargs": {"hops": hops, "dilation": dilation, "reference": reference},
            "variant": variant,
            **(WIDER if wider else {}),
            **kwargs,
        },
    )
