import torch
from torch import Tensor


class PCA(torch.nn.Module):
    r"""Principal component analysis of registered meshes, with the interface of
    :class:`MeshAutoencoder`: the linear model of the same latent size.

    Args:
        x (torch.Tensor): Training meshes :obj:`[M, N, 3]`.
        latent_channels (int, optional): The number of components. (default: :obj:`8`)

    Raises:
        ValueError: If there are fewer meshes or coordinates than components.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, x: Tensor, latent_channels: int = 8):
        super().__init__()
        from scipy.sparse.linalg import svds

        if x.dim() != 3 or not 0 < latent_channels < min(x.size(0), x[0].numel()):
            raise ValueError(
                f"Expected meshes of shape [M, N, 3] with more meshes and coordinates than the "
                f"{latent_channels} components (got {list(x.shape)})"
            )
        mean = x.mean(dim=0)
        centred = (x - mean).flatten(1)
        # A fixed start makes the Lanczos iteration repeatable. Random, since centred meshes are
        # orthogonal to a constant one.
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(min(centred.shape), dtype=x.dtype, generator=generator)
        _, _, components = svds(centred.numpy(force=True), k=latent_channels, v0=start.numpy())
        components = torch.from_numpy(components[::-1].copy())
        self.register_buffer("mean", mean)
        self.register_buffer("components", components.view(-1, *mean.shape).to(x))

    def encode(self, x: Tensor) -> Tensor:
        r"""Meshes :obj:`[B, N, 3]` to coefficients :obj:`[B, latent_channels]`, the component of
        largest variance first."""
        return torch.einsum("bnc,lnc->bl", x - self.mean, self.components)

    def decode(self, z: Tensor) -> Tensor:
        r"""Coefficients :obj:`[B, latent_channels]` to meshes :obj:`[B, N, 3]`."""
        return self.mean + torch.einsum("bl,lnc->bnc", z, self.components)

    def forward(self, x: Tensor) -> Tensor:
        r"""Projects meshes :obj:`[B, N, 3]` to the span of the components."""
        return self.decode(self.encode(x))
