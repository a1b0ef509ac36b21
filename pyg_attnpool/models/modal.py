from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Sequential, SiLU

from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.autoencoder import AutoencoderConfig, MeshAutoencoder
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.resolver import Query


@dataclass(frozen=True)
class ModalConfig:
    r"""The arguments of a :class:`ModalAutoencoder`, which are also its JSON on disk.

    Args:
        pool (str, type or callable, optional): The aggregation of the mesh path, as in
            :func:`~pyg_attnpool.nn.resolver.pooling_resolver`. If :obj:`None`, there is no mesh
            path. (default: :obj:`"attention"`)
        latent_channels (int, optional): Size of the latent code :math:`L`. (default: :obj:`8`)
        modes (int, optional): The number of modes beyond the :math:`L` of the code itself, as far
            as there are training meshes for them. (default: :obj:`32`)
        hidden_channels (int, optional): Size of the hidden layers between code and modes.
            (default: :obj:`512`)
        in_channels (int, optional): The features of a vertex, of which the first three are its
            coordinates. (default: :obj:`3`)
        mesh_kwargs (dict, optional): Further arguments of the mesh path, those of
            :class:`~pyg_attnpool.models.AutoencoderConfig`. (default: :obj:`{}`)
    """

    pool: Query | None = "attention"
    latent_channels: int = 8
    modes: int = 32
    hidden_channels: int = 512
    in_channels: int = 3
    mesh_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (
            ("latent_channels", 1),
            ("modes", 0),
            ("hidden_channels", 1),
            ("in_channels", 3),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"Expected '{name}' to be an integer from {low} (got {value!r})")
        # One form of everything, so that a config from JSON equals the one that was written.
        given = dict(self.mesh_kwargs or {})
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        object.__setattr__(self, "mesh_kwargs", given)
        own = {"down", "latent_channels", "in_channels"}.intersection(self.mesh_kwargs)
        if own:
            raise ValueError(f"Expected other arguments of the mesh path (got {sorted(own)})")

    def mesh_config(self) -> AutoencoderConfig | None:
        r"""The arguments of the mesh path, a spiral autoencoder."""
        if self.pool is None:
            return None
        spiral: dict[str, Any] = {
            "conv": "spiral",
            "activation": "elu",
            "expand_activation": None,
            "out_bias": True,
            **self.mesh_kwargs,
        }
        return AutoencoderConfig(
            down=self.pool,
            latent_channels=self.latent_channels,
            in_channels=self.in_channels,
            **spiral,
        )


class ModalAutoencoder(Module):
    r"""An autoencoder that starts as principal component analysis and never leaves it as one of its
    paths. With the modes :math:`\mathbf{V}` of largest variance of the training meshes, their
    coefficients :math:`\mathbf{c}` and standard deviations :math:`\mathbf{s}`,

    .. math::
        \mathbf{c} &= \mathbf{V}^{\top} \mathbf{x}, \qquad
        \mathbf{z} = \frac{\mathbf{c}_{1 \ldots L}}{\mathbf{s}_{1 \ldots L}} + g(\mathbf{c}) +
        \mathrm{enc}(\mathbf{x})

        \hat{\mathbf{x}} &= \mathbf{V} \left( (\mathbf{s}_{1 \ldots L} \, \mathbf{z}, \mathbf{0}) +
        f(\mathbf{z}) \right) + \mathrm{dec}(\mathbf{z})

    where the perceptrons :math:`g` and :math:`f` bend the linear space along the code, into more
    modes than the code has channels, and enc and dec are a spiral autoencoder as
    :func:`~pyg_attnpool.models.neural3dmm` with learned aggregation, for what the modes leave. The
    last layers of :math:`g, f`, enc and dec start at zero, so that the network starts as
    :class:`~pyg_attnpool.models.PCA` of :math:`L` components. The modes are buffers, which
    :meth:`fit_modes` sets and training leaves alone.

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
        ValueError: If an argument is out of range, or one of the mesh path does not fit.
    """

    standardized = "uniform"  # one scale for all vertices, see `MorphableModel.fit`
    mode_std: Tensor

    def __init__(
        self, hierarchy: MeshHierarchy, config: ModalConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        if config is not None and kwargs:
            raise ValueError(f"Expected either 'config' or its arguments (got both, {set(kwargs)})")
        config = ModalConfig(**kwargs) if config is None else config
        latent, hidden = config.latent_channels, config.hidden_channels
        num_modes = latent + config.modes
        self.hierarchy = hierarchy
        self.config = config
        self.latent_channels = latent
        self.linear = PCA.empty(hierarchy.num_vertices[0], num_modes, config.in_channels)
        self.register_buffer("mode_std", torch.ones(num_modes))
        self.to_code = _perceptron(num_modes, hidden, latent)
        self.from_code = _perceptron(latent, hidden, num_modes)
        self.mesh: MeshAutoencoder | None = None
        mesh_config = config.mesh_config()
        if mesh_config is not None:
            self.mesh = MeshAutoencoder(hierarchy, mesh_config)
        self.reset_last_layers()

    @torch.no_grad()
    def reset_last_layers(self) -> None:
        r"""Sets the last layer of every path but the linear one to zero."""
        last = [self.to_code[-1], self.from_code[-1]]
        if self.mesh is not None:
            last += [self.mesh.to_latent, self.mesh.out_conv]
        for layer in last:
            for parameter in layer.parameters():
                parameter.zero_()

    @property
    def num_modes(self) -> int:
        r"""The number of modes, those of the code among them."""
        return self.mode_std.numel()

    @torch.no_grad()
    def fit_modes(self, blocks: Callable[[], Iterable[Tensor]]) -> None:
        r"""Sets the modes to the principal components of training meshes. Where there are fewer
        meshes than modes, the others are zero.

        Args:
            blocks (callable): Makes an iterator over blocks :obj:`[M, N, C]` of all training
                meshes, as the network takes them. It is called several times where the meshes do
                not fit into memory.

        Raises:
            ValueError: If there are not more meshes than latent channels.
        """
        self.linear.fit(blocks, at_least=self.latent_channels)
        squares, count = torch.zeros(()), 0
        for x in blocks():
            c = self.linear.encode(x.to(self.linear.mean)).double().cpu()
            squares, count = squares + c.square().sum(dim=0), count + len(c)
        std = (squares / count).sqrt()
        # A mode without variance would have to be divided by zero.
        self.mode_std.copy_(std.clamp(min=max(1e-4 * std.max().item(), 1e-12)))

    def _balance(self) -> Tensor:
        # Between the modes' own scale, in which each counts as much as the first, and one scale for
        # all, in which the last ones vanish.
        return (self.mode_std * self.mode_std[0]).sqrt()

    def encode(self, x: Tensor) -> Tensor:
        r"""Vertex features :obj:`[B, N, C]` to latent codes :obj:`[B, latent_channels]`."""
        expected = tuple(self.linear.mean.shape)
        if x.dim() != 3 or x.shape[1:] != expected:
            raise ValueError(f"Expected vertices of shape {['B', *expected]} (got {list(x.shape)})")
        c, latent = self.linear.encode(x), self.latent_channels
        z = c[:, :latent] / self.mode_std[:latent] + self.to_code(c / self._balance())
        return z if self.mesh is None else z + self.mesh.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to vertex features :obj:`[B, N, C]`."""
        latent = self.latent_channels
        if z.dim() != 2 or z.size(1) != latent:
            raise ValueError(f"Expected latent codes of shape [B, {latent}] (got {list(z.shape)})")
        own = torch.nn.functional.pad(z * self.mode_std[:latent], (0, self.num_modes - latent))
        x = self.linear.decode(own + self.from_code(z) * self._balance())
        return x if self.mesh is None else x + self.mesh.decode(z)

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs vertex features :obj:`[B, N, C]`."""
        return self.decode(self.encode(x))

    def training_loss(self, out: Tensor, x: Tensor) -> Tensor:
        r"""The mean distance of a vertex to where it should be, and the L1 loss of further
        features; what :meth:`MorphableModel.fit` minimises where no other loss is given."""
        distance = (out[..., :3] - x[..., :3]).norm(dim=-1).mean()
        if x.size(-1) == 3:
            return distance
        return distance + torch.nn.functional.l1_loss(out[..., 3:], x[..., 3:])

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(num_vertices={self.linear.mean.size(0)}, "
            f"latent_channels={self.latent_channels}, modes={self.num_modes})"
        )


def _perceptron(in_channels: int, hidden_channels: int, out_channels: int) -> Sequential:
    return Sequential(
        Linear(in_channels, hidden_channels),
        SiLU(),
        Linear(hidden_channels, hidden_channels),
        SiLU(),
        Linear(hidden_channels, out_channels),
    )


def modal(
    hierarchy: MeshHierarchy,
    pool: Query | None = "attention",
    latent_channels: int = 8,
    modes: int = 32,
    hidden_channels: int = 512,
    in_channels: int = 3,
    **kwargs: Any,
) -> ModalAutoencoder:
    r"""The autoencoder of this package with the smallest errors: principal components, bent by a
    perceptron, and a spiral autoencoder with learned aggregation for what they leave. See
    :class:`ModalAutoencoder` for the equations.

    Args:
        hierarchy (MeshHierarchy): The levels of the template, five unless channels are given.
        pool (str, optional): The aggregation of the mesh path, such as :obj:`"qem"` or
            :obj:`"attention"`, see :func:`~pyg_attnpool.nn.resolver.pooling_resolver`. If
            :obj:`None`, there is no mesh path. (default: :obj:`"attention"`)
        latent_channels (int, optional): Size of the latent code. (default: :obj:`8`)
        modes (int, optional): The number of modes beyond those of the code. (default: :obj:`32`)
        hidden_channels (int, optional): Size of the perceptrons' hidden layers.
            (default: :obj:`512`)
        in_channels (int, optional): The features of a vertex. (default: :obj:`3`)
        **kwargs (optional): Additional arguments of the mesh path, those of
            :class:`~pyg_attnpool.models.AutoencoderConfig`.
    """
    config = ModalConfig(pool, latent_channels, modes, hidden_channels, in_channels, kwargs)
    return ModalAutoencoder(hierarchy, config)
