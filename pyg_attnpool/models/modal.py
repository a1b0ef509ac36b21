from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList, Sequential, SiLU

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.resolver import Query, pooling_resolver

Blocks = Callable[[], Iterable[Tensor]]

# How the aggregation is fitted to the modes: rounds of alternating least squares, steps of each,
# and their rate.
ROUNDS, STEPS, RATE = 3, 50, 1e-2

DAMPING = 1e-3  # of the steps that look for a code


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
        refinements (int, optional): The steps that look for the code of a mesh, from a guess
            on. (default: :obj:`3`)
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
    refinements: int = 3
    in_channels: int = 3
    pool_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {
            "latent_channels": 1,
            "modes": 0,
            "level": 0,
            "hidden_channels": 1,
            "refinements": 0,
            "in_channels": 3,
        }
        for name, low in lowest.items():
            object.__setattr__(self, name, as_integer(name, getattr(self, name), least=low))
        object.__setattr__(self, "pool_kwargs", dict(self.pool_kwargs or {}))


class ModalAutoencoder(Module):
    r"""An autoencoder that starts as principal component analysis and bends it.

    A mesh is a sum of the :math:`L` principal components :math:`\mathbf{V}` of the training meshes
    and of further ones, which are kept on a coarser level of the template as :math:`\mathbf{W}`,
    where one takes a quarter of the numbers, and carried up by learned aggregation
    :math:`\mathbf{U}`. A perceptron :math:`f = (f_1, f_2)` bends the linear space along the code
    into more components than the code has channels, and the code of a mesh is the one that it is
    closest to

    .. math::
        \hat{\mathbf{x}}(\mathbf{z}) &= \mathbf{V} \left( \mathbf{s} \, \mathbf{z} +
        f_1(\mathbf{z}) \right) + \mathbf{U} \mathbf{W} f_2(\mathbf{z})

        \mathbf{z} &= \mathop{\mathrm{argmin}}_{\mathbf{z}}
        \| \mathbf{x} - \hat{\mathbf{x}}(\mathbf{z}) \|^2

    where :math:`\mathbf{s}` is the standard deviation of the principal coefficients. A second
    perceptron guesses this code from the coefficients of the mesh, and a few steps of Levenberg and
    Marquardt go on from there. They are cheap: in a basis of few components a mesh is few numbers,
    and so is what the perceptron makes of a code. Both perceptrons start at zero, and so the
    network as :class:`~pyg_attnpool.models.PCA` of :math:`L` components.

    Basis and aggregation are found before training, by :meth:`fit_modes`: :math:`\mathbf{U}` and
    :math:`\mathbf{W}` in turn, such that :math:`\mathbf{U} \mathbf{W}` is as close to the principal
    components after the :math:`L`-th as it can be. Training the perceptrons leaves them alone.

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
    optimizer = "muon"  # where `MorphableModel.fit` gets no other
    scale: Tensor
    root: Tensor

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
        # Components on a coarser level are nearly orthogonal: the lower root of their products
        # makes distances of coefficients those of meshes.
        self.register_buffer("root", torch.eye(latent + config.modes))
        self.to_code = _perceptron(len(self.scale), config.hidden_channels, latent)
        self.from_code = _perceptron(latent, config.hidden_channels, len(self.scale))
        # From coarse to fine, in the order of use.
        self.unpools = ModuleList(
            pooling_resolver(config.pool, hierarchy, level, "up", features, **config.pool_kwargs)
            for level in reversed(range(config.level))
        ).requires_grad_(False)

    def fit_modes(self, blocks: Blocks) -> None:
        r"""Sets the linear path to the principal components of training meshes, and modes and
        aggregation to what comes closest to those of what it leaves. Where there are fewer meshes
        than modes, the others are zero.

        Args:
            blocks (callable): Makes an iterator over blocks :obj:`[M, N, C]` of all training
                meshes, as the network takes them. It is called several times.

        Raises:
            ValueError: If there are not more meshes than latent channels.
        """
        with torch.no_grad():
            self.linear.fit(blocks)
            self.root.copy_(torch.eye(len(self.root)))

            def left() -> Iterator[Tensor]:
                for x in blocks():
                    x = x.to(self.linear.mean)
                    yield x - self.linear(x)

            modes = PCA.empty(self.linear.mean.size(0), self.config.modes, self.linear.mean.size(1))
            if self.config.modes > 0:
                modes.to(self.linear.mean).fit(left, at_least=0)
        if self.config.level == 0:
            self.modes.load_state_dict(modes.state_dict())
            self.modes.mean.zero_()
        elif self.config.modes > 0:
            self._fit_aggregation(modes.components, self._deviation(modes.encode, left))
        with torch.no_grad():
            basis = self._basis().flatten(1).double()
            gram = basis @ basis.t()
            # Modes beyond the number of meshes are zero.
            gram.diagonal().add_((gram.diagonal() < 1e-6).double())
            self.root.copy_(torch.linalg.cholesky(gram))
            latent = self.latent_channels
            whole = self._basis()
            of_all = self._deviation(lambda x: self._coefficients(x, whole), blocks)
            self.scale[latent:] = of_all[latent:]
            self.scale[:latent] = self._deviation(self.linear.encode, blocks)

    @torch.no_grad()
    def _deviation(self, encode: Callable[[Tensor], Tensor], blocks: Blocks) -> Tensor:
        squares, count = torch.zeros(()), 0
        for x in blocks():
            c = encode(x.to(self.linear.mean)).double().cpu()
            squares, count = squares + c.square().sum(dim=0), count + len(c)
        std = (squares / count).sqrt()
        # A mode without variance would have to be divided by zero.
        return std.clamp(min=max(1e-4 * std.max().item(), 1e-12)).to(self.scale)

    def _fit_aggregation(self, modes: Tensor, std: Tensor) -> None:
        # Alternating least squares: the modes of the coarser level in closed form, then some steps
        # of the aggregation. Each mode counts as much as meshes differ along it.
        std = std.view(-1, 1, 1)
        target = (std * modes).permute(1, 0, 2).flatten(1)
        parameters = [p for p in self.unpools.parameters() if p.is_floating_point()]
        coarse = self._least_squares(target)
        with torch.enable_grad():
            self.unpools.requires_grad_(True)
            optimizer = torch.optim.Adam(parameters, lr=RATE) if parameters else None
            for _ in range(ROUNDS if optimizer else 0):
                for _ in range(STEPS):
                    assert optimizer is not None
                    x = coarse
                    for unpool in self.unpools:
                        x = unpool(x[None])[0]
                    optimizer.zero_grad()
                    ((x - target).square().sum() / target.square().sum()).backward()
                    optimizer.step()
                coarse = self._least_squares(target)
            self.unpools.requires_grad_(False)
            for parameter in parameters:
                parameter.grad = None
        with torch.no_grad():
            found = coarse.unflatten(1, (len(std), -1)).permute(1, 0, 2) / std
            self.modes.components.copy_(found)

    @torch.no_grad()
    def _least_squares(self, target: Tensor) -> Tensor:
        # What the aggregation carries closest to a target [N, F].
        from scipy.sparse import identity
        from scipy.sparse.linalg import splu

        up: Any = None
        layer: Any
        for layer in self.unpools:
            matrix = layer.mapping().to_scipy().astype("float64")
            up = matrix if up is None else matrix @ up
        normal = (up.T @ up + 1e-6 * identity(up.shape[1])).tocsc()
        found = splu(normal).solve(up.T @ target.double().numpy(force=True))
        return torch.from_numpy(found).to(target)

    def _basis(self) -> Tensor:
        # All components [L + K, N, C].
        modes = self._unpooled(self.modes.components)
        return torch.cat([self.linear.components, modes])

    def _unpooled(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for unpool in self.unpools:
            x = unpool(x, rows=True)
        return x.transpose(0, 1)

    def _coefficients(self, x: Tensor, basis: Tensor) -> Tensor:
        # Those of the closest sum of components.
        products = (x - self.linear.mean).flatten(1) @ basis.flatten(1).t()
        return torch.linalg.solve(self.root @ self.root.t(), products.t()).t()

    def _balance(self) -> Tensor:
        # Between a scale of its own for every mode, by which each counts as much as the first, and
        # one for all, by which the last ones vanish.
        return (self.scale * self.scale[0]).sqrt()

    def encode(self, x: Tensor) -> Tensor:
        r"""Vertex features :obj:`[B, N, C]` to latent codes :obj:`[B, latent_channels]`."""
        expected = tuple(self.linear.mean.shape)
        if x.dim() != 3 or x.shape[1:] != expected:
            raise ValueError(f"Expected vertices of shape {['B', *expected]} (got {list(x.shape)})")
        c = self._coefficients(x, self._basis())
        return self._code(self._guess(x, c), c)

    def _code(self, z: Tensor, c: Tensor) -> Tensor:
        # The one closest to coefficients, from a guess on.
        z = self._closest(z, c)
        if torch.is_grad_enabled() and c.requires_grad:
            # Of value zero: how the closest code changes with the mesh.
            _, slopes = self._away(z, c.detach())
            change = ((c - c.detach()) @ self.root)[..., None]
            slopes = slopes.detach()
            z = z + torch.linalg.solve(
                slopes.transpose(1, 2) @ slopes, slopes.transpose(1, 2) @ change
            ).squeeze(-1)
        return z

    def _guess(self, x: Tensor, c: Tensor) -> Tensor:
        straight = self.linear.encode(x) / self.scale[: self.latent_channels]
        return straight + self.to_code(c / self._balance())

    @torch.no_grad()
    def _closest(self, z: Tensor, c: Tensor) -> Tensor:
        # Steps that lead away are not taken, and the next one is shorter.
        away, slopes = self._away(z, c)
        damping = torch.full_like(z[:, :1], DAMPING)
        for _ in range(self.config.refinements):
            normal = slopes.transpose(1, 2) @ slopes
            diagonal = torch.diag_embed(normal.diagonal(dim1=1, dim2=2) * damping)
            towards = slopes.transpose(1, 2) @ away.unsqueeze(-1)
            ahead = z + torch.linalg.solve(normal + diagonal, towards).squeeze(-1)
            its_away, its_slopes = self._away(ahead, c)
            nearer = (its_away.square().sum(dim=1) < away.square().sum(dim=1)).unsqueeze(-1)
            z, away = torch.where(nearer, ahead, z), torch.where(nearer, its_away, away)
            slopes = torch.where(nearer.unsqueeze(-1), its_slopes, slopes)
            damping = torch.where(nearer, damping / 4, damping * 16)
        return z

    def _away(self, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        # How far the mesh of a code is from the one of coefficients, along orthonormal directions
        # [B, L + K], and how that shrinks with the code, [B, L + K, L].
        latent, slopes = self.latent_channels, torch.eye(self.latent_channels).to(z)
        x, slopes = z, slopes.expand(z.size(0), -1, -1)
        for layer in self.from_code:
            if isinstance(layer, Linear):
                x, slopes = layer(x), slopes @ layer.weight.t()
            else:  # x times its sigmoid
                gate = x.sigmoid()
                slopes = slopes * (gate * (1 + x * (1 - gate)))[:, None]
                x = x * gate
        balance = self._balance()
        x, slopes = x * balance, slopes * balance
        straight = torch.diag(self.scale[:latent])
        x = torch.cat([x[:, :latent] + self.scale[:latent] * z, x[:, latent:]], dim=1)
        slopes = torch.cat([slopes[..., :latent] + straight, slopes[..., latent:]], dim=-1)
        return (c - x) @ self.root, (slopes @ self.root).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        r"""Latent codes :obj:`[B, latent_channels]` to vertex features :obj:`[B, N, C]`."""
        latent = self.latent_channels
        if z.dim() != 2 or z.size(1) != latent:
            raise ValueError(f"Expected latent codes of shape [B, {latent}] (got {list(z.shape)})")
        c = self._bent(z)
        x = self.linear.decode(c[:, :latent])
        return x + self._unpooled(self.modes.decode(c[:, latent:]))

    def decode_at(self, vertices: Tensor) -> Callable[[Tensor], Tensor]:
        r"""A :meth:`decode` of some vertices :obj:`[V]` alone, to :obj:`[B, V, C]`, in a part of
        its time."""
        basis, mean = self._basis()[:, vertices], self.linear.mean[vertices]
        return lambda z: mean + torch.einsum("bl,lvc->bvc", self._bent(z), basis)

    def _bent(self, z: Tensor) -> Tensor:
        # Codes to coefficients of all components.
        latent, bent = self.latent_channels, self.from_code(z) * self._balance()
        return torch.cat([self.scale[:latent] * z + bent[:, :latent], bent[:, latent:]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        r"""Reconstructs vertex features :obj:`[B, N, C]`."""
        return self.decode(self.encode(x))

    def objective(
        self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], step: int | Tensor = 0
    ) -> Tensor:
        r"""What training minimises

        .. math::
            \ell(\hat{\mathbf{x}}(\mathbf{z}), \mathbf{x}) +
            \ell(\hat{\mathbf{x}}(\mathbf{z}_0), \mathbf{x})

        where :math:`\mathbf{z}_0` is the guess that the search for the code :math:`\mathbf{z}`
        starts from.

        Args:
            x (torch.Tensor): Vertex features :obj:`[B, N, C]`.
            loss (callable): Takes output and target to a scalar.
            step (int or torch.Tensor, optional): Not looked at. (default: :obj:`0`)

        A derived class that encodes or decodes in a way of its own is trained on its output alone.
        """
        own = type(self)
        known = ("forward", "encode", "decode")
        if any(getattr(own, name) is not getattr(ModalAutoencoder, name) for name in known):
            return loss(self(x), x)
        # One basis is for both: on all vertices it is most of the work.
        basis = self._basis()
        c = self._coefficients(x, basis)
        guess = self._guess(x, c)
        codes = torch.cat([self._code(guess, c), guess])
        out = self._bent(codes) @ basis.flatten(1) + self.linear.mean.flatten()
        closest, guessed = out.view(2, *x.shape)
        return loss(closest, x) + loss(guessed, x)

    def training_loss(self, out: Tensor, x: Tensor) -> Tensor:
        r"""The mean distance of a vertex to where it should be, and the L1 loss of further
        features: what is minimised where :meth:`MorphableModel.fit` gets no other loss."""
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

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is out of range, the pooling is unknown, or there is no such
            level.

    Example:
        >>> from pyg_attnpool.models import modal
        >>> modal(hierarchy, latent_channels=2, modes=6)
        ModalAutoencoder(num_vertices=642, latent_channels=2, modes=6, level=1)
    """
    return ModalAutoencoder(hierarchy, pool=pool, latent_channels=latent_channels, **kwargs)
