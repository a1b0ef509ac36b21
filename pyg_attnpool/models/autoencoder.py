from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.nn.base import IndexedModule
from pyg_attnpool.nn.resolver import (
    Query,
    convolution_resolver,
    level_spirals,
    pooling_resolver,
)
from pyg_attnpool.nn.spiral_conv import SpiralConv

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    None: lambda x: x,
}


@dataclass(frozen=True)
class AutoencoderConfig:
    r"""The arguments of a :class:`MeshAutoencoder`, which are also its JSON on disk.

    Args:
        conv (str, type or callable, optional): The convolution, as in
            :func:`~pyg_attnpool.nn.resolver.convolution_resolver`. (default: :obj:`"cheb"`)
        down (str, type or callable, optional): The pooling, as in
            :func:`~pyg_attnpool.nn.resolver.pooling_resolver`. (default: :obj:`"qem"`)
        up (str, type or callable, optional): The unpooling, likewise. If :obj:`None`, that of
            :obj:`down`. (default: :obj:`None`)
        channels (tuple, optional): The channels after the convolution of each level of the
            encoder, from fine to coarse. (default: :obj:`(16, 16, 16, 32)`)
        decoder_channels (tuple, optional): The channels at the coarsest level, then those after
            the convolution of each level from coarse to fine. If :obj:`None`, those of the encoder
            in reverse: :obj:`(32, 32, 16, 16, 16)`. (default: :obj:`None`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        in_channels (int, optional): The features of a vertex, of which the first three are its
            coordinates. (default: :obj:`3`)
        activation (str, optional): The activation after every convolution but the last,
            :obj:`"relu"`, :obj:`"elu"` or :obj:`None`. (default: :obj:`"relu"`)
        latent_activation (str, optional): The activation of the latent code. A ReLU can kill a
            latent dimension for good. (default: :obj:`None`)
        expand_activation (str, optional): The activation of the layer from the latent code
            back to the coarsest level. (default: :obj:`"relu"`)
        out_bias (bool, optional): If set to :obj:`True`, the last convolution learns a bias.
            (default: :obj:`False`)
        conv_kwargs (dict, optional): Arguments of the convolution, such as :obj:`K` or
            :obj:`hops`. (default: :obj:`{}`)
        down_kwargs (dict, optional): Arguments of the pooling, such as :obj:`k`, :obj:`init` or
            :obj:`prior=None` for attention alone. Where a level has fewer vertices than :obj:`k`,
            all are kept. (default: :obj:`{}`)
        up_kwargs (dict, optional): Arguments of the unpooling, likewise. (default: :obj:`{}`)
        variant (str, optional): :obj:`"published"` starts attention with the settings of the
            paper, :obj:`"default"` with those that win. (default: :obj:`"default"`)
        variational (bool, optional): If set to :obj:`True`, the encoder gives the distribution of a
            code, see :meth:`MeshAutoencoder.objective`. (default: :obj:`False`)
        kl_weight (float, optional): The weight of its divergence. (default: :obj:`1e-3`)
        kl_warmup (int, optional): The steps in which this weight grows from zero.
            (default: :obj:`500`)
        free_bits (float, optional): What a latent channel may tell for free, in nats, so that it
            does not collapse. (default: :obj:`0.0`)

    Example:
        >>> from pyg_attnpool.models import AutoencoderConfig, MeshAutoencoder
        >>> config = AutoencoderConfig(conv="spiral", down="attention", channels=(8, 8))
        >>> MeshAutoencoder(hierarchy, config).config.latent_channels
        8
    """

    conv: Query = "cheb"
    down: Query = "qem"
    up: Query | None = None
    channels: Sequence[int] = (16, 16, 16, 32)
    decoder_channels: Sequence[int] | None = None
    latent_channels: int = 8
    in_channels: int = 3
    activation: str | None = "relu"
    latent_activation: str | None = None
    expand_activation: str | None = "relu"
    out_bias: bool = False
    conv_kwargs: dict[str, Any] = field(default_factory=dict)
    down_kwargs: dict[str, Any] = field(default_factory=dict)
    up_kwargs: dict[str, Any] = field(default_factory=dict)
    variant: Literal["default", "published"] = "default"
    variational: bool = False
    kl_weight: float = 1e-3
    kl_warmup: int = 500
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "in_channels"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), least=1))
        for name in ("activation", "latent_activation", "expand_activation"):
            value = getattr(self, name)
            if value not in ACTIVATIONS:
                raise ValueError(f"Expected '{name}' to be 'relu', 'elu' or None (got {value!r})")
        if self.variant not in ("default", "published"):
            raise ValueError(
                f"Expected 'variant' to be 'default' or 'published' (got {self.variant!r})"
            )
        if not isinstance(self.variational, bool):
            raise ValueError(f"Expected 'variational' to be a bool (got {self.variational!r})")
        if self.variational and self.latent_activation is not None:
            raise ValueError(
                f"Expected no 'latent_activation' of a variational network, whose codes are normal "
                f"(got {self.latent_activation!r})"
            )
        for name in ("kl_weight", "kl_warmup", "free_bits"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < inf:
                raise ValueError(f"Expected a finite '{name}' from zero (got {value!r})")
        # One form of everything, so that a config from JSON equals the one that was written.
        set_ = object.__setattr__
        set_(self, "up", self.down if self.up is None else self.up)
        channels = tuple(as_integer("channels", c, least=1) for c in self.channels)
        decoder = self.decoder_channels
        if decoder is None:
            decoder = channels[-1:] + channels[::-1]
        decoder = tuple(as_integer("decoder_channels", c, least=1) for c in decoder)
        set_(self, "channels", channels)
        set_(self, "decoder_channels", decoder)
        for name in ("conv_kwargs", "down_kwargs", "up_kwargs"):
            set_(self, name, dict(getattr(self, name) or {}))


class MeshAutoencoder(IndexedModule):
    r"""A convolutional autoencoder of registered meshes: convolution and pooling down a
    :class:`~pyg_attnpool.mesh.MeshHierarchy`, a fully connected layer to the latent code, and the
    same way back up. It computes on standardised features;
    :class:`~pyg_attnpool.models.MorphableModel` gives it units.

    Level :math:`l` of the encoder convolves, activates and pools to level :math:`l + 1`; level
    :math:`l` of the decoder unpools from level :math:`l + 1`, convolves and activates; a last
    convolution without activation follows.

    Args:
        hierarchy (MeshHierarchy): The levels of the template.
        config (AutoencoderConfig, optional): All other arguments in one object.
            (default: :obj:`None`)
        **kwargs (optional): The arguments of :class:`AutoencoderConfig`, in its place.

    Shapes:
        - **input:** vertex features :math:`(B, N, C)`
        - **output:** vertex features :math:`(B, N, C)`

    Raises:
        ValueError: If the channels do not fit the levels, or a name is unknown.

    Example:
        >>> from pyg_attnpool.models import MeshAutoencoder
        >>> network = MeshAutoencoder(hierarchy, conv="GATv2Conv", channels=(8, 8))
        >>> network.encode(torch.randn(2, 642, 3)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self, hierarchy: MeshHierarchy, config: AutoencoderConfig | None = None, **kwargs: Any
    ):
        super().__init__()
        if config is not None and kwargs:
            raise ValueError(f"Expected either 'config' or its arguments (got both, {set(kwargs)})")
        if config is None:
            known = [f.name for f in fields(AutoencoderConfig)]
            unknown = sorted(set(kwargs).difference(known))
            if unknown:
                raise TypeError(f"Expected arguments of {known} (got {unknown})")
            config = AutoencoderConfig(**kwargs)
        num_levels = len(hierarchy.down)
        channels, decoder_channels = config.channels, config.decoder_channels
        assert decoder_channels is not None and config.up is not None  # as the config has made them
        if len(channels) != num_levels or len(decoder_channels) != num_levels + 1:
            raise ValueError(
                f"Expected {num_levels} 'channels' and {num_levels + 1} 'decoder_channels' for a "
                f"hierarchy of {num_levels + 1} levels (got {len(channels)} and "
                f"{len(decoder_channels)})"
            )
        self.hierarchy = hierarchy
        self.config = config
        self.num_vertices = tuple(hierarchy.num_vertices)
        self.latent_channels = config.latent_channels

        conv_kwargs = dict(config.conv_kwargs)
        if config.conv in ("spiral", SpiralConv):
            # A level serves a convolution of the encoder and one or two of the decoder.
            levels = range(num_levels)
            conv_kwargs = {"spirals": [level_spirals(hierarchy, i, **conv_kwargs) for i in levels]}

        def conv(level: int, in_channels: int, out_channels: int, bias: bool = True) -> Module:
            return convolution_resolver(
                config.conv, hierarchy, level, in_channels, out_channels, bias, **conv_kwargs
            )

        def pooling(level: int, direction: Literal["down", "up"], features: int) -> Module:
            down = direction == "down"
            return pooling_resolver(
                config.down if down or config.up is None else config.up,
                hierarchy,
                level,
                direction,
                features,
                config.variant == "published",
                **(config.down_kwargs if down else config.up_kwargs),
            )

        widths = (config.in_channels, *channels)
        self.down_convs = ModuleList(
            conv(level, widths[level], widths[level + 1]) for level in range(num_levels)
        )
        self.pools = ModuleList(
            pooling(level, "down", widths[level + 1]) for level in range(num_levels)
        )
        coarsest = self.num_vertices[-1]
        self.to_latent = Linear(coarsest * channels[-1], config.latent_channels)
        if config.variational:
            self.to_log_variance = Linear(coarsest * channels[-1], config.latent_channels)
        self.from_latent = Linear(config.latent_channels, coarsest * decoder_channels[0])
        # From coarse to fine, in the order of use.
        order = list(enumerate(reversed(range(num_levels))))
        self.unpools = ModuleList(pooling(level, "up", decoder_channels[i]) for i, level in order)
        self.up_convs = ModuleList(
            conv(level, decoder_channels[i], decoder_channels[i + 1]) for i, level in order
        )
        self.out_conv = conv(0, decoder_channels[-1], config.in_channels, config.out_bias)

    def encode(self, x: Tensor) -> Tensor:
        r"""Vertex features :obj:`[B, N, C]` to latent codes :obj:`[B, latent_channels]`, of a
        variational network to their means."""
        return ACTIVATIONS[self.config.latent_activation](self.to_latent(self._pooled(x)))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Vertex features :obj:`[B, N, C]` to mean and logarithm of the variance
        :obj:`[B, latent_channels]` of their codes.

        Raises:
            ValueError: If the network is not variational.
        """
        if not self.config.variational:
            raise ValueError("Expected a variational network to have a posterior (got another)")
        pooled = self._pooled(x)
        return self.to_latent(pooled), self.to_log_variance(pooled)

    def objective(
        self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], step: int | Tensor
    ) -> Tensor:
        r"""What the training of a variational network minimises (`"Auto-Encoding Variational Bayes"
        <https://arxiv.org/abs/1312.6114>`_), with free bits (`"Improved Variational Inference with
        Inverse Autoregressive Flow" <https://arxiv.org/abs/1606.04934>`_):

        .. math::
            \ell \left( \mathrm{dec}(\mathbf{\mu} + \mathbf{\sigma} \, \mathbf{\epsilon}), \,
            \mathbf{x} \right) + w \, \min \left( 1, \tfrac{t + 1}{T + 1} \right) \sum_d \max \left(
            \lambda, \, \mathrm{KL}_d \right), \qquad
            \mathrm{KL}_d = \tfrac{1}{2} \left( \mu_d^2 + \sigma_d^2 - \ln \sigma_d^2 - 1
            \right)

        where :math:`\mathrm{KL}_d` is the mean over the batch, :math:`w` is :obj:`kl_weight`,
        :math:`T` is :obj:`kl_warmup` and :math:`\lambda` is :obj:`free_bits`.

        Args:
            x (torch.Tensor): Vertex features :obj:`[B, N, C]`.
            loss (callable): Takes output and target to a scalar.
            step (int or torch.Tensor): The number :math:`t` of steps before this one.
        """
        config = self.config
        mean, log_variance = self.posterior(x)
        noise = torch.randn_like(mean)
        out = self.decode(mean + (log_variance / 2).exp() * noise)
        told = divergence(mean, log_variance).mean(dim=0).clamp(min=config.free_bits).sum()
        warm = torch.as_tensor((step + 1) / (config.kl_warmup + 1)).clamp(max=1)
        return loss(out, x) + config.kl_weight * warm * told

    def _pooled(self, x: Tensor) -> Tensor:
        # Vertex features to all features of the coarsest level.
        expected = self.num_vertices[0], self.config.in_channels
        if x.dim() != 3 or x.shape[1:] != expected:
            raise ValueError(
                f"Expected vertices of shape [B, {expected[0]}, {expected[1]}] "
                f"(got {list(x.shape)})"
            )
        activation = ACTIVATIONS[self.config.activation]
        x = x.transpose(0, 1)
        for conv, pool in zip(self.down_convs, self.pools, strict=True):
            x = pool(activation(conv(x, rows=True)), rows=True)
        return x.transpose(0, 1).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to vertex features :obj:`[B, N, C]`."""
        if z.dim() != 2 or z.size(1) != self.latent_channels:
            raise ValueError(
                f"Expected latent codes of shape [B, {self.latent_channels}] (got {list(z.shape)})"
            )
        activation = ACTIVATIONS[self.config.activation]
        x = ACTIVATIONS[self.config.expand_activation](self.from_latent(z))
        x = x.unflatten(1, (self.num_vertices[-1], -1)).transpose(0, 1)
        for conv, unpool in zip(self.up_convs, self.unpools, strict=True):
            x = activation(conv(unpool(x, rows=True), rows=True))
        return self.out_conv(x, rows=True).transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs vertex features :obj:`[B, N, C]`."""
        return self.decode(self.encode(x))

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(num_vertices={list(self.num_vertices)}, "
            f"latent_channels={self.latent_channels})"
        )


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""The divergence in nats of normal distributions from the standard one, of each channel.

    Example:
        >>> divergence(torch.tensor([0.0, 2.0]), torch.zeros(2))
        tensor([0., 2.])
    """
    return (mean.square() + log_variance.exp() - log_variance - 1) / 2


def is_variational(network: Module) -> TypeGuard[MeshAutoencoder]:
    r"""Whether a network is trained by :meth:`MeshAutoencoder.objective`."""
    return isinstance(network, MeshAutoencoder) and network.config.variational
