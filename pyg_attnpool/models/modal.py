from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList, Sequential, SiLU

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.resolver import Query, pooling_resolver

Blocks = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class ModalConfig:
    r"""The arguments of a :class:`ModalAutoencoder`, which are also its JSON on disk.

    Args:
        pool (str, type or callable, optional): The aggregation that carries modes from their level
            up to the template, as in :func:`~pyg_attnpool.nn.resolver.pooling_resolver`.
            (default: :obj:`"attention"`)
        latent_channels (int, optional): Size of the latent code :math:`L`. (default: :obj:`8`)
        modes (int, optional): The number of modes beyond the :math:`L` of the code itself, as far
            as there are training meshes for them. (default: :obj:`64`)
        level (int, optional): The level that these modes are of. On level 0, that of the template,
            nothing carries them up. (default: :obj:`1`)
        hidden_channels (int, optional): Size of the hidden layers between code and modes.
            (default: :obj:`512`)
        in_channels (int, optional): The features of a vertex, of which the first three are its
            coordinates. (default: :obj:`3`)
        pool_kwargs (dict, optional): Arguments of the aggregation. (default: :obj:`{}`)

    Example:
        >>> from pyg_attnpool.models import ModalAutoencoder, ModalConfig
        >>> ModalAutoencoder(hierarchy, ModalConfig(latent_channels=4, modes=16))
        ModalAutoencoder(num_vertices=642, latent_channels=4, modes=16, level=1)
    """

    pool: Query = "attention"
    latent_channels: int = 8
    modes: int = 64
    level: int = 1
    hidden_channels: int = 512
    in_channels: int = 3
    pool_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {
            "latent_channels": 1,
            "modes": 0,
            "level": 0,
            "hidden_channels": 1,
            "in_channels": 3,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"Expected '{name}' to be an integer from {low} (got {value!r})")
        object.__setattr__(self, "pool_kwargs", dict(self.pool_kwargs or {}))


class ModalAutoencoder(Module):
    r"""An autoencoder that starts as principal component analysis and keeps it as one of its paths.

    With the :math:`L` principal components :math:`\mathbf{V}` of the training meshes, the mapping
    :math:`\mathbf{D}` to a coarser level of the template, the principal components
    :math:`\mathbf{W}` of what :math:`\mathbf{V}` leaves there, and the learned aggregation
    :math:`\mathbf{U}` back up,

    .. math::
        \mathbf{c} &= \mathbf{V}^{\top} \mathbf{x}, \qquad
        \mathbf{d} = \mathbf{W}^{\top} \mathbf{D} (\mathbf{x} - \mathbf{V} \mathbf{c})

        \mathbf{z} &= \mathbf{c} / \mathbf{s} + g(\mathbf{c}, \mathbf{d})

        \hat{\mathbf{x}} &= \mathbf{V} \left( \mathbf{s} \, \mathbf{z} + f_1(\mathbf{z}) \right) +
        \mathbf{U} \mathbf{W} f_2(\mathbf{z})

    where :math:`\mathbf{s}` is the standard deviation of :math:`\mathbf{c}`. The perceptrons
    :math:`g` and :math:`f = (f_1, f_2)` bend the linear space along the code, into more modes than
    the code has channels. These modes lie on the coarser level, where one takes a quarter of the
    numbers. Both perceptrons start at zero, and so the network as :class:`~pyg_attnpool.models.PCA`
    of :math:`L` components. The components are buffers, which :meth:`fit_modes` sets and training
    leaves alone.

    It computes on features that are centred and divided by one scale for all vertices: their least
    squares are those of millimetres.

    Args:
        hierarchy (MeshHierarchy): The levels of the template.
        config (ModalConfig, optional): All other arguments in one object. (default: :obj:`None`)
        **kwargs (optional): The arguments of :class:`ModalConfig`, in its place.

    Shapes:
        - **input:** vertex features :math:`(B, N, C)`
        - **output:** vertex features :math:`(B, N, C)`

    Raises:
        ValueError: If an argument is out of range, or there is no such level.

    Example:
        >>> from pyg_attnpool.models import ModalAutoencoder
        >>> network = ModalAutoencoder(hierarchy, latent_channels=4, modes=16)
        >>> network.fit_modes(lambda: [meshes - meshes.mean(dim=0)])
        >>> network.encode(meshes - meshes.mean(dim=0)).shape
        torch.Size([24, 4])
    """

    standardized = "uniform"  # one scale for all vertices, see `MorphableModel.fit`
    scale: Tensor

    def __init__(
        self, hierarchy: MeshHierarchy, config: ModalConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        if config is not None and kwargs:
            raise ValueError(f"Expected either 'config' or its arguments (got both, {set(kwargs)})")
        config = ModalConfig(**kwargs) if config is None else config
        if config.level > len(hierarchy.down):
            raise ValueError(
                f"Expected a 'level' from 0 to {len(hierarchy.down)} (got {config.level})"
            )
        latent, features = config.latent_channels, config.in_channels
        self.hierarchy = hierarchy
        self.config = config
        self.latent_channels = latent
        self.linear = PCA.empty(hierarchy.num_vertices[0], latent, features)
        self.modes = PCA.empty(hierarchy.num_vertices[config.level], config.modes, features)
        # The standard deviation of every coefficient, those of the code first.
        self.register_buffer("scale", torch.ones(latent + config.modes))
        self.to_code = _perceptron(len(self.scale), config.hidden_channels, latent)
        self.from_code = _perceptron(latent, config.hidden_channels, len(self.scale))
        levels = range(config.level)
        self.pools = ModuleList(
            pooling_resolver("qem", hierarchy, level, "down", features) for level in levels
        )
        # From coarse to fine, in the order of use.
        self.unpools = ModuleList(
            pooling_resolver(config.pool, hierarchy, level, "up", features, **config.pool_kwargs)
            for level in reversed(levels)
        )

    @torch.no_grad()
    def fit_modes(self, blocks: Blocks) -> None:
        r"""Sets the linear path to the principal components of training meshes, and the modes to
        those of what it leaves. Where there are fewer meshes than modes, the others are zero.

        Args:
            blocks (callable): Makes an iterator over blocks :obj:`[M, N, C]` of all training
                meshes, as the network takes them. It is called several times.

        Raises:
            ValueError: If there are not more meshes than latent channels.
        """
        self.linear.fit(blocks)

        def left() -> Iterator[Tensor]:
            for x in blocks():
                x = x.to(self.linear.mean)
                yield self._pooled(x - self.linear(x))

        if self.config.modes > 0:
            self.modes.fit(left, at_least=0)
        squares, count = torch.zeros(()), 0
        for x in blocks():
            c = self._coefficients(x.to(self.linear.mean)).double().cpu()
            squares, count = squares + c.square().sum(dim=0), count + len(c)
        std = (squares / count).sqrt()
        # A mode without variance would have to be divided by zero.
        self.scale.copy_(std.clamp(min=max(1e-4 * std.max().item(), 1e-12)))

    def _pooled(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for pool in self.pools:
            x = pool(x, rows=True)
        return x.transpose(0, 1)

    def _unpooled(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for unpool in self.unpools:
            x = unpool(x, rows=True)
        return x.transpose(0, 1)

    def _coefficients(self, x: Tensor) -> Tensor:
        c = self.linear.encode(x)
        left = self._pooled(x - self.linear.decode(c))
        return torch.cat([c, self.modes.encode(left)], dim=1)

    def _balance(self) -> Tensor:
        # Between a scale of its own for every mode, by which each counts as much as the first, and
        # one for all, by which the last ones vanish.
        return (self.scale * self.scale[0]).sqrt()

    def encode(self, x: Tensor) -> Tensor:
        r"""Vertex features :obj:`[B, N, C]` to latent codes :obj:`[B, latent_channels]`."""
        expected = tuple(self.linear.mean.shape)
        if x.dim() != 3 or x.shape[1:] != expected:
            raise ValueError(f"Expected vertices of shape {['B', *expected]} (got {list(x.shape)})")
        c, latent = self._coefficients(x), self.latent_channels
        return c[:, :latent] / self.scale[:latent] + self.to_code(c / self._balance())

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to vertex features :obj:`[B, N, C]`."""
        latent = self.latent_channels
        if z.dim() != 2 or z.size(1) != latent:
            raise ValueError(f"Expected latent codes of shape [B, {latent}] (got {list(z.shape)})")
        bent = self.from_code(z) * self._balance()
        x = self.linear.decode(self.scale[:latent] * z + bent[:, :latent])
        return x + self._unpooled(self.modes.decode(bent[:, latent:]))

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs vertex features :obj:`[B, N, C]`."""
        return self.decode(self.encode(x))

    def training_loss(self, out: Tensor, x: Tensor) -> Tensor:
        r"""The mean distance of a vertex to where it should be, and the L1 loss of further
        features: what :meth:`MorphableModel.fit` minimises where no other loss is given."""
        distance = (out[..., :3] - x[..., :3]).norm(dim=-1).mean()
        if x.size(-1) == 3:
            return distance
        return distance + torch.nn.functional.l1_loss(out[..., 3:], x[..., 3:])

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(num_vertices={self.linear.mean.size(0)}, "
            f"latent_channels={self.latent_channels}, modes={self.config.modes}, "
            f"level={self.config.level})"
        )


def _perceptron(in_channels: int, hidden_channels: int, out_channels: int) -> Sequential:
    layers = Sequential(
        Linear(in_channels, hidden_channels),
        SiLU(),
        Linear(hidden_channels, hidden_channels),
        SiLU(),
        Linear(hidden_channels, out_channels),
    )
    for parameter in layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    return layers


def modal(
    hierarchy: MeshHierarchy,
    pool: Query = "attention",
    latent_channels: int = 8,
    **kwargs: Any,
) -> ModalAutoencoder:
    r"""Principal components, bent by perceptrons into further modes, which learned aggregation
    carries from a coarser level up to the template. See :class:`ModalAutoencoder` for the
    equations.

    Args:
        hierarchy (MeshHierarchy): The levels of the template.
        pool (str, optional): The aggregation, such as :obj:`"qem"` or :obj:`"attention"`, see
            :func:`~pyg_attnpool.nn.resolver.pooling_resolver`. (default: :obj:`"attention"`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        **kwargs (optional): Additional arguments of
            :class:`~pyg_attnpool.models.modal.ModalConfig`.

    Example:
        >>> import numpy as np
        >>> grid = np.stack(np.meshgrid(range(6), range(6), [0.0]), axis=-1).reshape(-1, 3)
        >>> corner = np.arange(30).reshape(5, 6)[:, :5].ravel()
        >>> faces = np.concatenate([np.stack([corner, corner + 1, corner + 6], axis=1),
        ...                         np.stack([corner + 1, corner + 7, corner + 6], axis=1)])
        >>> hierarchy = MeshHierarchy.from_template((grid, faces), factors=[4])
        >>> modal(hierarchy, latent_channels=2, modes=6)
        ModalAutoencoder(num_vertices=36, latent_channels=2, modes=6, level=1)
    """
    return ModalAutoencoder(hierarchy, pool=pool, latent_channels=latent_channels, **kwargs)
