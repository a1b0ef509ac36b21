r"""Other autoencoders of registered meshes, written from what their papers say. They take and give
standardised features :obj:`[B, N, C]`, as :class:`~pyg_attnpool.MorphableModel` wants them."""

import torch
from torch import Tensor
from torch.nn import ELU, GELU, LayerNorm, Linear, Module, Parameter, Sequential

from pyg_attnpool import MeshHierarchy


class MLP(Module):
    r"""A layer of 512 and one of the latent size, and back: all vertices at once.

    Args:
        hierarchy (MeshHierarchy): Its finest level tells the number of vertices.
        latent_channels (int): Size of the latent code.
        hidden_channels (int, optional): Size of the hidden layers. (default: :obj:`512`)
    """

    def __init__(
        self, hierarchy: MeshHierarchy, latent_channels: int, hidden_channels: int = 512
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.num_vertices = hierarchy.num_vertices[0]
        size = 3 * self.num_vertices
        self.encoder = Sequential(
            Linear(size, hidden_channels), ELU(), Linear(hidden_channels, latent_channels)
        )
        self.decoder = Sequential(
            Linear(latent_channels, hidden_channels), ELU(), Linear(hidden_channels, size)
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).view(-1, self.num_vertices, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class TokenMixer(Module):
    r"""Regions of the template as tokens of an MLP-mixer, after the `"Locally Adaptive Neural 3D
    Morphable Models" <https://arxiv.org/abs/2401.02937>`_ paper (LAMM): a linear map of its own
    takes every region's vertices to a token, mixers exchange between tokens, and a further token,
    which is learned, gathers the latent code. The decoder goes the same way back.

    Args:
        hierarchy (MeshHierarchy): Its finest level is what the regions are of.
        latent_channels (int): Size of the latent code.
        regions (int, optional): The number of regions. (default: :obj:`11`)
        channels (int, optional): Size of a token. (default: :obj:`512`)
        depth (tuple, optional): The mixers of encoder and decoder. (default: :obj:`(5, 3)`)
    """

    def __init__(
        self,
        hierarchy: MeshHierarchy,
        latent_channels: int,
        regions: int = 11,
        channels: int = 512,
        depth: tuple[int, int] = (5, 3),
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        region = _regions(torch.from_numpy(hierarchy.vertices[0]), regions)
        order = region.argsort(stable=True)
        self.sizes = region.bincount(minlength=regions).tolist()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)
        self.embed = torch.nn.ModuleList(Linear(3 * size, channels) for size in self.sizes)
        self.token = Parameter(0.02 * torch.randn(channels))
        self.encoder = Sequential(*(_Mixer(regions + 1, channels) for _ in range(depth[0])))
        self.to_latent = Sequential(LayerNorm(channels), Linear(channels, latent_channels))
        self.from_latent = Linear(latent_channels, channels)
        self.position = Parameter(0.02 * torch.randn(regions, channels))
        self.decoder = Sequential(*(_Mixer(regions, channels) for _ in range(depth[1])))
        self.norm = LayerNorm(channels)
        self.unembed = torch.nn.ModuleList(Linear(channels, 3 * size) for size in self.sizes)

    def encode(self, x: Tensor) -> Tensor:
        parts = x[:, self.order].split(self.sizes, dim=1)
        tokens = [embed(p.flatten(1)) for embed, p in zip(self.embed, parts, strict=True)]
        tokens = torch.stack([self.token.expand_as(tokens[0]), *tokens], dim=1)
        return self.to_latent(self.encoder(tokens)[:, 0])

    def decode(self, z: Tensor) -> Tensor:
        tokens = self.norm(self.decoder(self.from_latent(z).unsqueeze(1) + self.position))
        parts = [
            unembed(t).unflatten(1, (-1, 3))
            for unembed, t in zip(self.unembed, tokens.unbind(dim=1), strict=True)
        ]
        return torch.cat(parts, dim=1)[:, self.inverse]

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class _Mixer(Module):
    def __init__(self, tokens: int, channels: int, token_hidden: int = 64) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList([LayerNorm(channels), LayerNorm(channels)])
        self.across = Sequential(Linear(tokens, token_hidden), GELU(), Linear(token_hidden, tokens))
        self.within = Sequential(
            Linear(channels, channels // 2), GELU(), Linear(channels // 2, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norms[1](x))


def _regions(pos: Tensor, num: int, steps: int = 20) -> Tensor:
    # k-means from farthest points, the first of which is the one farthest from the centre.
    distance = (pos - pos.mean(dim=0)).norm(dim=1)
    seeds = [int(distance.argmax())]
    distance = torch.full_like(distance, float("inf"))
    while len(seeds) < num:
        distance = torch.minimum(distance, (pos - pos[seeds[-1]]).norm(dim=1))
        seeds.append(int(distance.argmax()))
    centres = pos[seeds]
    for _ in range(steps):
        region = torch.cdist(pos, centres).argmin(dim=1)
        centres = torch.stack([pos[region == i].mean(dim=0) for i in range(num)])
    return torch.cdist(pos, centres).argmin(dim=1)
