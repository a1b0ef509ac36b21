r"""The encoder and the decoder of a model as lists of plain steps on arrays, which run without
torch: in one compiled call, or in a web page. :func:`run_plan` is their readable truth in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array
from torch.nn import Module, Sequential, SiLU

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
    r"""A step on arrays with a weight for every vertex, not a layer as :class:`torch.nn.Linear`.

    It takes a latent code, or all features of all vertices side by side, :obj:`[B, D]`, to features
    :obj:`[B, N, F]`, by a weight :obj:`[N, F, D]` and a bias :obj:`[N, F]`. A code and a hidden
    layer are the features of one vertex."""

    weight: ndarray
    bias: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        return np.einsum("nfd,bd->bnf", self.weight, x.reshape(len(x), -1)) + self.bias


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
            from scipy.special import expit  # takes long to import

            return x * expit(x)
        return np.maximum(x, 0) + (np.expm1(np.minimum(x, 0)) if self.function == "elu" else 0)


@dataclass(frozen=True)
class Standardize:
    r"""Subtracts a mean :obj:`[N, F]` and then divides by a standard deviation :obj:`[N, F]`."""

    mean: ndarray
    std: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        return (x - self.mean) / self.std


@dataclass(frozen=True)
class Affine:
    r"""A scale and a shift :obj:`[N, F]` of every feature of every vertex."""

    scale: ndarray
    shift: ndarray

    def __call__(self, x: ndarray) -> ndarray:
        return self.scale * x + self.shift


@dataclass(frozen=True)
class Sum:
    r"""The sum of several plans, each from what comes in."""

    paths: list[list[Step]]

    def __call__(self, x: ndarray) -> ndarray:
        return sum((run_plan(path, x) for path in self.paths[1:]), run_plan(self.paths[0], x))


Step: TypeAlias = Linear | Gather | Chebyshev | Spiral | Activation | Standardize | Affine | Sum


def decoder_plan(model: MorphableModel) -> list[Step]:
    r"""The steps from latent codes to meshes in metres.

    Args:
        model (MorphableModel): A model around a :class:`~pyg_attnpool.models.MeshAutoencoder` with
            Chebyshev or spiral convolutions, a :class:`~pyg_attnpool.models.PCA` or a
            :class:`~pyg_attnpool.models.ModalAutoencoder`. Learned aggregation is taken as it is
            now.

    Raises:
        ValueError: If the decoder holds a layer that has no step; the message names it.

    Example:
        >>> [type(step).__name__ for step in decoder_plan(model)]
        ['Linear', 'Affine']
    """
    _, decode = _plans(model.autoencoder)
    return [*decode(model.autoencoder), Affine(_array(model.std), _array(model.mean))]


def encoder_plan(model: MorphableModel) -> list[Step]:
    r"""The steps from meshes in metres to latent codes, which are the features of one vertex.

    Args:
        model (MorphableModel): As in :func:`decoder_plan`, but for a
            :class:`~pyg_attnpool.models.ModalAutoencoder`, which searches for its codes.

    Raises:
        ValueError: If the encoder searches, or holds a layer that has no step; the message names
            it.

    Example:
        >>> [type(step).__name__ for step in encoder_plan(model)]
        ['Standardize', 'Linear']
    """
    encode, _ = _plans(model.autoencoder)
    mean, std = _array(model.mean), _array(model.std)
    first, *steps = encode(model.autoencoder)
    if isinstance(first, Standardize):  # one after the other: ((x - mean) / std - m) / s
        return [Standardize(mean + std * first.mean, std * first.std), *steps]
    return [Standardize(mean, std), first, *steps]


def run_plan(plan: list[Step], z: ndarray) -> ndarray:
    r"""Runs a plan in double precision, on latent codes :obj:`[B, latent_channels]` or meshes
    :obj:`[B, N, C]`.

    Returns:
        Vertex features :obj:`[B, N, C]`, or latent codes :obj:`[B, 1, latent_channels]`.
    """
    x = np.asarray(z, dtype=np.float64)
    for step in plan:
        x = step(x)
    return x


Plan: TypeAlias = Callable[[Any], list[Step]]


def _plans(network: Module) -> tuple[Plan, Plan]:
    # The exact classes: a subclass may compute in another way.
    known: dict[type, tuple[Plan, Plan]] = {
        MeshAutoencoder: (_encode_autoencoder, _decode_autoencoder),
        PCA: (_encode_pca, _decode_pca),
        ModalAutoencoder: (_encode_modal, _decode_modal),
    }
    if type(network) not in known:
        raise ValueError(
            f"Expected a MeshAutoencoder, PCA or ModalAutoencoder to take the steps of (got "
            f"{type(network).__name__})"
        )
    return known[type(network)]


def _encode_autoencoder(network: MeshAutoencoder) -> list[Step]:
    config, plan = network.config, list[Step]()
    layers = zip(network.down_convs, network.pools, strict=True)
    for level, (conv, pool) in enumerate(layers):
        plan += [
            _step(f"down_convs.{level}", conv),
            *_activation(config.activation),
            _step(f"pools.{level}", pool),
        ]
    return [*plan, _linear(network.to_latent), *_activation(config.latent_activation)]


def _decode_autoencoder(network: MeshAutoencoder) -> list[Step]:
    config = network.config
    plan: list[Step] = [
        _linear(network.from_latent, network.num_vertices[-1]),
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


def _encode_pca(network: PCA) -> list[Step]:
    mean, components = _array(network.mean), _array(network.components)
    return [
        Standardize(mean, np.ones_like(mean)),
        _matrix(components.reshape(len(components), mean.size)),
    ]


def _decode_pca(network: PCA) -> list[Step]:
    return [Linear(_array(network.components.permute(1, 2, 0)), _array(network.mean))]


def _encode_modal(network: ModalAutoencoder) -> list[Step]:
    raise ValueError("Expected an encoder of fixed steps (got a ModalAutoencoder, which searches)")


def _decode_modal(network: ModalAutoencoder) -> list[Step]:
    latent, modes = network.latent_channels, network.config.modes
    scale = _array(network.scale)
    straight = _matrix(np.eye(latent + modes, latent) * scale[:latent])
    bend = _perceptron(network.from_code, _array(network._balance()))
    pick = np.eye(latent + modes)
    paths: list[list[Step]] = [[_matrix(pick[:latent]), *_decode_pca(network.linear)]]
    if modes > 0:
        unpools = [_step(f"unpools.{i}", unpool) for i, unpool in enumerate(network.unpools)]
        paths.append([_matrix(pick[latent:]), *_decode_pca(network.modes), *unpools])
    return [Sum([[straight], bend]), Sum(paths)]


def _perceptron(layers: Sequential, scale: ndarray) -> list[Step]:
    # Its output is multiplied by the scale.
    plan: list[Step] = [
        Activation("silu") if isinstance(layer, SiLU) else _linear(layer) for layer in layers
    ]
    last = plan[-1]
    assert isinstance(last, Linear)
    plan[-1] = Linear(last.weight * scale[:, None], last.bias * scale)
    return plan


def _linear(layer: Module, num_vertices: int = 1) -> Linear:
    if type(layer) is not torch.nn.Linear or layer.bias is None:
        raise ValueError(f"Expected linear layers with a bias (got {layer})")
    weight, bias = _array(layer.weight), _array(layer.bias)
    return Linear(weight.reshape(num_vertices, -1, weight.shape[1]), bias.reshape(num_vertices, -1))


def _matrix(weight: ndarray) -> Linear:
    return Linear(weight[None], np.zeros((1, len(weight))))


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
        f"Expected mappings and Chebyshev or spiral convolutions (got "
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
