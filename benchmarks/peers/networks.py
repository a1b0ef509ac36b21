r"""Other autoencoders of registered meshes, written from what their papers say. They take and give
standardised features :obj:`[B, N, C]`, as :class:`~pyg_attnpool.MorphableModel` wants them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import ELU, GELU, LayerNorm, Linear, Module, Parameter, Sequential
from torch.nn.functional import elu, pad

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import PCA

LENGTH = 9  # the vertices of a neighbourhood, the centre among them


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


class LSAConv(Module):
    r"""The convolution of the `"Learning Local Neighboring Structure for Robust 3D Shape
    Representation" <https://arxiv.org/abs/2004.09995>`_ paper: every vertex has a matrix
    :math:`\mathbf{V}_i`, which starts as the identity and brings its neighbours into an order that
    one weight for all vertices fits,

    .. math::
        \mathbf{x}^{\prime}_i = \mathbf{W} \, \mathrm{vec}(\sigma(\mathbf{V}_i \mathbf{X}_i)) +
        \mathbf{b}

    Neighbours are the first of a spiral, in place of the paper's random order.

    Args:
        in_channels (int): Size of the input features.
        out_channels (int): Size of the output features.
        hierarchy (MeshHierarchy): The levels of the template.
        level (int): The level of the vertices.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hierarchy: MeshHierarchy, level: int
    ) -> None:
        super().__init__()
        self.register_buffer("neighbors", _neighbors(hierarchy, level), persistent=False)
        num, length = self.neighbors.shape
        self.order = Parameter(torch.eye(length).expand(num, -1, -1).clone())
        self.lin = Linear(length * in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # The vertex after the last one is none.
        around = pad(x, (0, 0, 0, 1))[:, self.neighbors]
        return self.lin(elu(torch.einsum("nkl,bnlf->bnkf", self.order, around)).flatten(2))


class VCConv(Module):
    r"""The convolution with spatially varying kernels of the `"Fully Convolutional Mesh
    Autoencoder using Efficient Spatially Varying Kernels" <https://arxiv.org/abs/2006.04325>`_
    paper (VCMeshConv): the weight between two vertices is a combination, learned for each pair, of
    a few matrices that all share,

    .. math::
        \mathbf{x}^{\prime}_i = \sum_j \sum_m \alpha_{ijm} \mathbf{B}_m \mathbf{x}_j + \mathbf{b}

    Neighbours are the first of a spiral.

    Args:
        in_channels (int): Size of the input features.
        out_channels (int): Size of the output features.
        hierarchy (MeshHierarchy): The levels of the template.
        level (int): The level of the vertices.
        bases (int, optional): The number of matrices. (default: :obj:`9`)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hierarchy: MeshHierarchy,
        level: int,
        bases: int = 9,
    ) -> None:
        super().__init__()
        self.register_buffer("neighbors", _neighbors(hierarchy, level), persistent=False)
        num, length = self.neighbors.shape
        self.coefficients = Parameter(torch.randn(num, bases, length) / length**0.5)
        self.lin = Linear(bases * in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        around = pad(x, (0, 0, 0, 1))[:, self.neighbors]
        return self.lin(torch.einsum("nml,bnlf->bnmf", self.coefficients, around).flatten(2))


def _neighbors(hierarchy: MeshHierarchy, level: int) -> Tensor:
    num = hierarchy.num_vertices[level]
    spirals = hierarchy.spirals(level, length=min(LENGTH, num), fill=-1)
    return torch.where(spirals < 0, num, spirals)


def identity_expression_pca(
    train: Tensor, subjects: Sequence[str], val: Tensor, latent_channels: int
) -> PCA:
    r"""Principal components of the mean meshes of subjects, and those of how far meshes are from
    the mean of their subject, as models of faces have them since FLAME. A code is the least squares
    of both together, and their numbers add up to the latent size: the ones with the least error on
    validation meshes.

    Args:
        train (torch.Tensor): Training meshes :obj:`[M, N, 3]`.
        subjects (list): The subject of each.
        val (torch.Tensor): Validation meshes.
        latent_channels (int): Size of the latent code.
    """
    names = sorted(set(subjects))
    of_mesh = torch.tensor([names.index(name) for name in subjects])
    means = torch.stack([train[of_mesh == i].mean(dim=0) for i in range(len(names))])
    identity = _directions(means - means.mean(dim=0))
    expression = _directions(train - means[of_mesh])
    best, least = PCA.empty(train.size(1), latent_channels), float("inf")
    for num in range(max(0, latent_channels - len(expression)), latent_channels + 1):
        if num >= len(names):
            break
        basis = torch.cat([identity[:num], expression[: latent_channels - num]])
        found = PCA.empty(train.size(1), latent_channels)
        found.mean.copy_(means.mean(dim=0))
        found.components.copy_(torch.linalg.qr(basis.t()).Q.t().view(-1, *train.shape[1:]))
        error = (found(val) - val).norm(dim=-1).mean().item()
        if error < least:
            best, least = found, error
    return best


def _directions(x: Tensor) -> Tensor:
    rows = x.flatten(1).double()
    values, vectors = torch.linalg.eigh(rows @ rows.t())
    kept = values > 1e-9 * values[-1]
    return ((vectors[:, kept].t() @ rows) / values[kept].sqrt()[:, None]).flip(0).to(x)


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
