r"""The decoder of a model as a list of plain steps on arrays, which runs without torch: in a web
page, say. :func:`run_plan` is its readable truth in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.special import expit
from torch.nn import Module

from pyg_attnpool.models.autoencoder import MeshAutoencoder
from pyg_attnpool.models.modal import ModalAutoencoder
from pyg_attnpool.models.pca import PCA
from pyg_attnpool.nn.base import PoolingLayer
from pyg_attnpool.nn.cheb_conv import StaticChebConv
from pyg_attnpool.nn.spiral_conv import SpiralConv

if TYPE_CHECKING:
    from pyg_attnpool.models.morphable import MorphableModel


@dataclass(frozen=True)
class Linear:
    r"""The latent code :obj:`[B, D]` to features :obj:`[B, N, F]` of vertices, by a weight
    :obj:`[N, F, D]` and a bias :obj:`[N, F]`."""

    weight: ndarray
    bias: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        return np.einsum("nfd,bd->bnf", self.weight, x) + self.bias


@dataclass(frozen=True)
class Dense:
    r"""A code :obj:`[B, D]` to another one :obj:`[B, E]`, by a weight :obj:`[D, E]` and a bias
    :obj:`[E]`."""

    weight: ndarray
    bias: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        return x @ self.weight + self.bias


@dataclass(frozen=True)
class Slice:
    r"""Some channels of a code, from one on up to another."""

    start: int
    stop: int

    def __call__(self, x: ndarray) -> ndarray:
        return x[:, self.start : self.stop]


@dataclass(frozen=True)
class Gather:
    r"""A mapping between levels, as a matrix :obj:`[num_target, num_source]`."""

    matrix: csr_array

    def __call__(self, x: ndarray) -> ndarray:
        return _product(self.matrix, x)


@dataclass(frozen=True)
class Chebyshev:
    r"""The convolution of :class:`~pyg_attnpool.nn.StaticChebConv`, with weights
    :obj:`[K, F, F']`."""

    laplacian: csr_array
    weight: ndarray
    bias: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        terms = [x]
        for k in range(1, len(self.weight)):
            term = _product(self.laplacian, terms[-1])
            terms.append(term if k == 1 else 2 * term - terms[-2])
        return sum(t @ w for t, w in zip(terms, self.weight, strict=True)) + self.bias


@dataclass(frozen=True)
class Spiral:
    r"""The convolution of :class:`~pyg_attnpool.nn.SpiralConv`, with vertices :obj:`[N, L]` (-1
    for none) and weights :obj:`[L, F, F']`."""

    index: ndarray
    weight: ndarray
    bias: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        x = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)  # which -1 finds
        return np.einsum("bnlf,lfg->bng", x[:, self.index], self.weight, optimize=True) + self.bias


@dataclass(frozen=True)
class Activation:
    r"""ReLU, ELU or SiLU, by name."""

    function: str

    def __call__(self, x: ndarray) -> ndarray:
        if self.function == "silu":
            return x * expit(x)
        return np.maximum(x, 0) + (np.expm1(np.minimum(x, 0)) if self.function == "elu" else 0)


@dataclass(frozen=True)
class Affine:
    r"""A scale and a shift :obj:`[N, F]` of every feature of every vertex."""

    scale: ndarray
    shift: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        return self.scale * x + self.shift


@dataclass(frozen=True)
class Sum:
    r"""The sum of several plans, each from the code that comes in."""

    paths: list[list[Step]]

    def __call__(self, x: ndarray) -> ndarray:
        return sum((run_plan(path, x) for path in self.paths[1:]), run_plan(self.paths[0], x))


Step: TypeAlias = Linear | Dense | Slice | Gather | Chebyshev | Spiral | Activation | Affine | Sum


def decoder_plan(model: MorphableModel) -> list[Step]:
    r"""The steps from latent codes to meshes in metres.

    Args:
        model (MorphableModel): A model around a :class:`~pyg_attnpool.models.MeshAutoencoder` with
            Chebyshev or spiral convolutions, a :class:`~pyg_attnpool.models.ModalAutoencoder` or a
            :class:`~pyg_attnpool.models.PCA`. Learned aggregation is taken as it is now.

    Raises:
        ValueError: If the decoder holds a layer that has no step; the message names it.

    Example:
        >>> import torch
        >>> from pyg_attnpool.models import MorphableModel
        >>> mesh = torch.rand(4, 3).numpy(), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        >>> model = MorphableModel.pca(mesh, latent_channels=2).fit(torch.randn(20, 4, 3))
        >>> [type(step).__name__ for step in decoder_plan(model)]
        ['Linear', 'Affine']
    """
    scale, shift = (_array(t) for t in (model.std, model.mean))
    return [*_network(model.autoencoder), Affine(scale, shift)]


def run_plan(plan: list[Step], z: ndarray) -> ndarray:
    r"""Runs a plan on latent codes :obj:`[B, latent_channels]`, in double precision.

    Returns:
        Vertex features :obj:`[B, N, C]`.
    """
    x = np.asarray(z, dtype=np.float64)
    for step in plan:
        x = step(x)
    return x


def _network(network: Module) -> list[Step]:
    # The exact classes: a subclass may decode in another way.
    if type(network) is PCA:
        return [_linear(network)]
    if type(network) is ModalAutoencoder:
        return _modal(network)
    if type(network) is not MeshAutoencoder:
        raise ValueError(
            f"Expected a MeshAutoencoder, ModalAutoencoder or PCA to take the decoder of (got "
            f"{type(network).__name__})"
        )
    config = network.config
    coarsest = network.num_vertices[-1]
    weight, bias = network.from_latent.weight, network.from_latent.bias
    plan: list[Step] = [
        Linear(_array(weight.view(coarsest, -1, weight.size(1))), _array(bias.view(coarsest, -1))),
        *_activation(config.expand_activation),
    ]
    layers = zip(network.unpools, network.up_convs, strict=True)
    for level, (unpool, conv) in enumerate(layers):
        plan += [
            _step(f"unpools.{level}", unpool),
            _step(f"up_convs.{level}", conv),
            *_activation(config.activation),
        ]
    return [*plan, _step("out_conv", network.out_conv)]


def _linear(network: PCA) -> Linear:
    return Linear(_array(network.components.permute(1, 2, 0)), _array(network.mean))


def _modal(network: ModalAutoencoder) -> list[Step]:
    # The coefficients of the linear path and of the modes, one code; then the surface of each.
    latent, scale, balance = network.latent_channels, network.scale, network._balance()
    layers = [layer for layer in network.from_code if isinstance(layer, torch.nn.Linear)]
    bent: list[Step] = []
    for layer in layers:
        last = layer is layers[-1]
        factor = balance if last else torch.ones_like(layer.bias)
        bent.append(Dense(_array(layer.weight.t() * factor), _array(layer.bias * factor)))
        bent += _activation(None if last else "silu")
    straight = np.zeros((latent, len(scale)))
    np.fill_diagonal(straight, _array(scale))
    surfaces: list[list[Step]] = [[Slice(0, latent), _linear(network.linear)]]
    if len(scale) > latent:
        unpools = [_step(f"unpools.{i}", layer) for i, layer in enumerate(network.unpools)]
        surfaces.append([Slice(latent, len(scale)), _linear(network.modes), *unpools])
    return [Sum([[Dense(straight, np.zeros(len(scale)))], bent]), Sum(surfaces)]


def _step(name: str, layer: Module) -> Step:
    if isinstance(layer, PoolingLayer):
        return Gather(layer.mapping().to_scipy().astype(np.float64))
    if type(layer) is StaticChebConv:
        shape = layer.num_nodes, layer.num_nodes
        csr = tuple(_array(t) for t in (layer.laplacian, layer.col, layer.rowptr))
        weight = np.stack([_array(lin.weight).T for lin in layer.lins])
        return Chebyshev(csr_array(csr, shape=shape), weight, _bias(layer))
    if type(layer) is SpiralConv:
        weight = _array(layer.lin.weight.view(layer.out_channels, layer.length, -1))
        return Spiral(_array(layer.spirals), weight.transpose(1, 2, 0), _bias(layer.lin))
    raise ValueError(
        f"Expected a decoder of mappings and of Chebyshev or spiral convolutions (got "
        f"{type(layer).__name__} as '{name}')"
    )


def _activation(name: str | None) -> list[Step]:
    return [] if name is None else [Activation(name)]


def _bias(layer: Any) -> ndarray:
    return np.zeros(layer.out_channels) if layer.bias is None else _array(layer.bias)


def _array(tensor: Any) -> ndarray:
    array = tensor.detach().cpu()
    return (array.double() if array.is_floating_point() else array).numpy()


def _product(matrix: csr_array, x: ndarray) -> ndarray:
    # One product with the samples side by side.
    columns = x.transpose(1, 0, 2).reshape(x.shape[1], -1)
    out = (matrix @ columns).reshape(matrix.shape[0], len(x), -1)
    return out.transpose(1, 0, 2)
