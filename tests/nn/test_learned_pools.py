import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch_geometric.nn import dense_diff_pool

from pyg_attnpool import Mapping, MappingPool, MeshHierarchy, freeze
from pyg_attnpool.nn import DiffPool, FullPool, WeightedPool
from pyg_attnpool.nn.learned_pools import average_mapping, ring_mapping
from pyg_attnpool.ops import reference
from tests.mesh.meshes import blob

N, M = 7, 4
FIELD = Mapping(
    torch.tensor([[0, 1, 6], [2, 0, 0], [3, 4, 5], [6, 5, 0]]),
    torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.4, 0.3, 0.3], [0.5, 0.5, 0.0]]),
    N,
)
RING = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N])
RING = torch.cat([RING, RING.flip(0)], dim=1)


def layers():
    torch.manual_seed(0)
    return {
        "full": FullPool(N, M),
        "weighted": WeightedPool(FIELD),
        "diffpool": DiffPool(3, M, RING, N),
    }


def dense(name, layer, x):
    if name == "full":
        return reference.apply(layer.weight, x)
    if name == "weighted":
        matrix = x.new_zeros(M, N)
        for i in range(M):
            for j in range(3):
                if FIELD.weight[i, j] != 0:
                    matrix[i, FIELD.index[i, j]] = layer.weight[i, j]
        return reference.apply(matrix, x)
    laplacian = x.new_zeros(N, N)
    laplacian[RING[0], RING[1]] = -0.5
    weight = torch.stack([lin.weight.t() for lin in layer.conv.lins])
    score = reference.chebyshev(laplacian, weight, x) + layer.conv.bias
    return dense_diff_pool(x, x.new_zeros(len(x), N, N), score)[0]


@pytest.mark.parametrize("name", layers())
def test_outputs_and_gradients(device, name):
    layer = layers()[name].double().to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, N, 3, dtype=torch.double, device=device, requires_grad=True)
    out, expected = layer(x), dense(name, layer, x)
    assert_close(out, expected)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        assert_close(a, b)
    assert_close(layer(x.flatten(0, 1)), out.flatten(0, 1))
    assert_close(layer(x[0]), out[0])


@pytest.mark.parametrize("name", layers())
def test_state(name):
    layer, other = layers()[name], layers()[name]
    x = torch.randn(2, N, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 1
    other.load_state_dict(layer.state_dict())
    assert_close(other(x), layer(x))
    assert_close(copy.deepcopy(layer)(x), layer(x))
    trained = layer(x)
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        layer.reset_parameters()
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], trained)


@pytest.mark.parametrize("name", ["full", "weighted"])
def test_freeze(name):
    layer = layers()[name]
    x = torch.randn(2, N, 3)
    frozen = layer.freeze()
    assert not list(frozen.parameters())
    assert_close(frozen(x), layer(x))
    assert_close(layer.mapping().to_dense() @ x, layer(x))
    assert type(freeze(layer)) is MappingPool
    network = torch.nn.Sequential(layer, torch.nn.ReLU())
    assert not list(freeze(network).parameters())
    assert_close(network(x), layer(x).relu())


def test_an_assignment_from_features_cannot_be_frozen():
    network = torch.nn.Sequential(layers()["diffpool"])
    assert type(freeze(network)[0]) is DiffPool and list(network.parameters())


def test_weighted_pool_starts_as_its_mapping():
    x = torch.randn(2, N, 3)
    assert_close(WeightedPool(FIELD)(x), FIELD @ x)


@pytest.mark.parametrize("name", layers())
def test_compiles_without_graph_breaks(compiled, name):
    layer = layers()[name]
    x = torch.randn(2, N, 3)
    assert_close(compiled(layer)(x), layer(x))


def test_errors():
    with pytest.raises(ValueError, match=r"positive .got 0 and 4"):
        FullPool(0, 4)
    for layer in layers().values():
        with pytest.raises(ValueError, match=r"\[7, F\], .* .got \[2, 8, 3\]"):
            layer(torch.randn(2, 8, 3))


@pytest.fixture(scope="module")
def coarse():
    return MeshHierarchy.from_template(blob(3, seed=0, hole=True), factors=[4, 4, 3])


def test_average_mapping(coarse):
    for level in range(3):
        up = coarse.up[level].to_dense().numpy()
        owner = up.argmax(axis=1)
        down = average_mapping(coarse, level, up=False).to_dense().numpy()
        expected = (owner == np.arange(up.shape[1])[:, None]).astype(float)
        np.testing.assert_allclose(down, expected / expected.sum(axis=1, keepdims=True))
        expected = (up > 0).astype(float)
        got = average_mapping(coarse, level, up=True).to_dense().numpy()
        np.testing.assert_allclose(got, expected / expected.sum(axis=1, keepdims=True))


def test_ring_mapping(coarse):
    def rings(level):
        adjacency = np.eye(coarse.num_vertices[level])
        for shift in (1, 2):
            adjacency[coarse.faces[level], np.roll(coarse.faces[level], shift, axis=1)] = 1
        return adjacency / adjacency.sum(axis=1, keepdims=True)

    for level in range(3):
        down = ring_mapping(coarse, level, up=False).to_dense().numpy()
        kept = coarse.down[level].to_dense().numpy().argmax(axis=1)
        np.testing.assert_allclose(down, rings(level)[kept])
        up = ring_mapping(coarse, level, up=True).to_dense().numpy()
        owner = coarse.up[level].to_dense().numpy().argmax(axis=1)
        np.testing.assert_allclose(up, rings(level + 1)[owner])
