import torch
from torch import Tensor


class PCA(torch.nn.Module):
    r"""Principal component analysis of registered meshes, the linear model of a latent size: the
    mean mesh and the directions of largest variance, by a truncated singular value decomposition.
    It computes on features as they are, not standardised, so that for coordinates its squared
    error is the smallest of all linear models.

    Args:
        x (torch.Tensor): Training meshes :obj:`[M, N, C]`.
        latent_channels (int, optional): The number of components. (default: :obj:`8`)

    Raises:
        ValueError: If there is no component, or fewer meshes or features than components.

    Example:
        >>> x = torch.randn(10, 5, 3)
        >>> PCA(x, latent_channels=9)(x).sub(x).abs().max() < 1e-4
        tensor(True)
    """

    standardized = False  # `MorphableModel.fit` leaves mean and scale to the model
    mean: Tensor
    components: Tensor

    def __init__(self, x: Tensor, latent_channels: int = 8):
        super().__init__()
        self._allocate(x.shape[1:], latent_channels)
        self.to(x.dtype).fit(x)

    @classmethod
    def empty(cls, num_vertices: int, latent_channels: int = 8, in_channels: int = 3) -> "PCA":
        r"""A model of zeros, to be fitted or loaded."""
        model = cls.__new__(cls)
        torch.nn.Module.__init__(model)
        model._allocate(torch.Size([num_vertices, in_channels]), latent_channels)
        return model

    def _allocate(self, shape: torch.Size, latent_channels: int) -> None:
        if not isinstance(latent_channels, int) or latent_channels < 1:
            raise ValueError(f"Expected positive 'latent_channels' (got {latent_channels!r})")
        self.latent_channels = latent_channels
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("components", torch.zeros(latent_channels, *shape))

    def fit(self, x: Tensor) -> "PCA":
        r"""Sets mean and components to those of meshes :obj:`[M, N, C]`.

        Raises:
            ValueError: As the constructor does.
        """
        from scipy.sparse.linalg import svds

        if (
            x.dim() != 3
            or x.shape[1:] != self.mean.shape
            or self.latent_channels >= min(len(x), self.mean.numel())
        ):
            raise ValueError(
                f"Expected meshes of shape [M, N, C] with more meshes and features than the "
                f"{self.latent_channels} components (got {list(x.shape)})"
            )
        mean = x.mean(dim=0)
        centred = (x - mean).flatten(1)
        # A fixed start makes the Lanczos iteration repeatable. Random, since centred meshes are
        # orthogonal to a constant one.
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(min(centred.shape), dtype=x.dtype, generator=generator)
        k = self.latent_channels
        _, _, components = svds(centred.numpy(force=True), k=k, v0=start.numpy())
        self.mean.copy_(mean)
        self.components.copy_(torch.from_numpy(components[::-1].copy()).view(-1, *mean.shape))
        return self

    def encode(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, C]` to coefficients :obj:`[B, latent_channels]`, the component of
        largest variance first."""
        return torch.einsum("bnc,lnc->bl", x - self.mean, self.components)

    def decode(self, z: Tensor) -> Tensor:
        r"""Coefficients :obj:`[B, latent_channels]` to meshes :obj:`[B, N, C]`."""
        return self.mean + torch.einsum("bl,lnc->bnc", z, self.components)

    def forward(self, x: Tensor) -> Tensor:
        r"""Projects meshes :obj:`[B, N, C]` to the span of the components."""
        return self.decode(self.encode(x))
