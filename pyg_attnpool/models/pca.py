from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pyg_attnpool.arguments import as_integer

RESIDENT = 2 << 30  # bytes of meshes beyond which they are read block by block

Rows = Callable[[], Iterator[Tensor]]


class PCA(torch.nn.Module):
    r"""Principal component analysis of registered meshes, the linear model of a latent size: the
    mean mesh and the directions of largest variance, by a truncated singular value decomposition.
    It computes on features as they are, not standardised, so that for coordinates its squared
    error is the smallest of all linear models.

    Args:
        x (torch.Tensor): Training meshes :obj:`[M, N, C]`.
        latent_channels (int, optional): The number of components. (default: :obj:`8`)

    Raises:
        TypeError: If the number of components is no integer.
        ValueError: If there is no component, or fewer meshes or features than components.

    Example:
        >>> x = torch.randn(10, 5, 3)
        >>> PCA(x, latent_channels=9)(x).sub(x).abs().max() < 1e-4
        tensor(True)
    """

    standardized = False  # `MorphableModel.fit` leaves the mean, and coordinates their unit
    mean: Tensor
    components: Tensor

    def __init__(self, x: Tensor, latent_channels: int = 8):
        super().__init__()
        self._allocate(x.shape[1:], latent_channels)
        self.to(x.dtype).fit(x)

    @classmethod
    def empty(cls, num_vertices: int, latent_channels: int = 8, in_channels: int = 3) -> "PCA":
        r"""A model of zeros, to be fitted or loaded.

        Raises:
            TypeError: If a number is no integer.
            ValueError: If the number of components is negative, or there is no feature.
        """
        in_channels = as_integer("in_channels", in_channels, least=1)
        model = cls.__new__(cls)
        torch.nn.Module.__init__(model)
        model._allocate(torch.Size([num_vertices, in_channels]), latent_channels)
        return model

    def _allocate(self, shape: torch.Size, latent_channels: int) -> None:
        self.latent_channels = as_integer("latent_channels", latent_channels, least=0)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("components", torch.zeros(self.latent_channels, *shape))

    @torch.no_grad()
    def fit(self, x: Tensor | Callable[[], Iterable[Tensor]], at_least: int | None = None) -> "PCA":
        r"""Sets mean and components to those of meshes.

        Args:
            x (torch.Tensor or callable): The meshes :obj:`[M, N, C]`, or what makes an iterator
                over blocks of them. Blocks of more than two gigabytes are read in several passes,
                and their components found by randomised subspace iteration (`Halko et al.
                <https://arxiv.org/abs/0909.4061>`_).
            at_least (int, optional): The number of components that there must be. Where there are
                fewer meshes than components, the further ones are zero. If :obj:`None`, all must
                be. (default: :obj:`None`)

        Raises:
            ValueError: As the constructor does, or if the meshes have another shape.

        Example:
            >>> x = torch.randn(10, 5, 3)
            >>> PCA.empty(5, latent_channels=2).fit(x).encode(x).shape
            torch.Size([10, 2])
        """
        if at_least is None and self.latent_channels == 0:
            raise ValueError("Expected positive 'latent_channels' (got 0)")
        blocks = x if callable(x) else lambda: [x]
        needed, shape = self.latent_channels if at_least is None else at_least, self.mean.shape
        count, total, fits = 0, torch.zeros((), dtype=torch.double), True
        for block in blocks():
            fits = block.dim() == 3 and block.shape[1:] == shape
            if not fits:
                break
            count, total = count + len(block), total.to(block.device) + block.double().sum(dim=0)
        most = min(count, shape.numel()) - 1
        if not fits or needed > most:
            raise ValueError(
                f"Expected meshes of shape [M, N, C] with more meshes and features than the "
                f"{needed} components (got {[count, *shape] if fits else list(block.shape)}): "
                f"few meshes need fewer latent channels"
            )
        mean, k = (total / count).to(self.mean), min(self.latent_channels, most)
        size = count * self.mean.numel() * self.mean.element_size()
        find = _exact if size <= RESIDENT else _streamed
        components = find(lambda: ((b.to(mean) - mean).flatten(1) for b in blocks()), k)
        self.mean.copy_(mean)
        self.components.zero_()
        self.components[:k] = components.to(mean).view(k, *shape)
        return self

    def encode(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, C]` to coefficients :obj:`[B, latent_channels]`, the component of
        largest variance first."""
        return torch.einsum("bnc,lnc->bl", x - self.mean, self.components)

    def decode(self, z: Tensor) -> Tensor:
        r"""Coefficients :obj:`[B, latent_channels]` to meshes :obj:`[B, N, C]`."""
        return self.mean + torch.einsum("bl,lnc->bnc", z, self.components)

    def decode_at(self, vertices: Tensor) -> Callable[[Tensor], Tensor]:
        r"""A :meth:`decode` of some vertices :obj:`[V]` alone, to :obj:`[B, V, C]`."""
        mean, components = self.mean[vertices], self.components[:, vertices]
        return lambda z: mean + torch.einsum("bl,lvc->bvc", z, components)

    def forward(self, x: Tensor) -> Tensor:
        r"""Projects meshes :obj:`[B, N, C]` to the span of the components."""
        return self.decode(self.encode(x))


def _generator() -> torch.Generator:
    # A fixed start makes components repeatable. Random, since centred meshes are orthogonal to a
    # constant one.
    return torch.Generator().manual_seed(0)


def _exact(rows: Rows, k: int) -> Tensor:
    from scipy.sparse.linalg import svds

    centred = torch.cat(list(rows()))
    if not centred.any():
        return centred.new_zeros(k, centred.size(1))
    start = torch.randn(min(centred.shape), dtype=centred.dtype, generator=_generator())
    _, _, components = svds(centred.numpy(force=True), k=k, v0=start.numpy())
    return torch.from_numpy(components[::-1].copy())


def _streamed(rows: Rows, k: int, passes: int = 8) -> Tensor:
    # Twice the subspace: its error falls in every pass with the square of the ratio of the first
    # variance outside to that of a component.
    first = next(rows())
    width = min(2 * k + 10, first.size(1))
    basis = torch.randn(first.size(1), width, generator=_generator()).to(first)
    for step in range(passes):
        basis = torch.linalg.qr(basis).Q
        product = torch.zeros_like(basis)
        within = torch.zeros(width, width, dtype=torch.double, device=basis.device)
        for block in rows():
            c = block @ basis
            within += (c.t() @ c).double()
            if step < passes - 1:
                product += block.t() @ c
        if step < passes - 1:
            basis = product
    _, turn = torch.linalg.eigh(within)
    return (basis @ turn.flip(1)[:, :k].to(basis)).t()
