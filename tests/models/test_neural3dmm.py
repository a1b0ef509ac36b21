import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import elu
from torch.testing import assert_close

from pyg_attnpool import MeshHierarchy, SpiralConv, freeze
from pyg_attnpool.mesh import spiral_sequences
from pyg_attnpool.models import neural3dmm
from tests.mesh.meshes import blob

SMALL = dict(channels=(4, 5), decoder_channels=(5, 4, 3), latent_channels=3)
ATTENTION = dict(down_kwargs=dict(channels=5), up_kwargs=dict(channels=5, k=4))
REFERENCE = 7


@pytest.fixture(scope="module")
def hierarchy():
    return MeshHierarchy.from_template(blob(2, seed=0, hole=True), factors=[4, 4])


def dense(model, hierarchy, x, **spirals):
    r"""The published way: a dummy vertex of zeros behind every level, and dense matrices."""

    def conv(layer, level, x):
        vertices = hierarchy.vertices[level]
        nearest = np.linalg.norm(vertices - hierarchy.vertices[0][REFERENCE], axis=1).argmin()
        rows = spiral_sequences(vertices, hierarchy.faces[level], reference=[nearest], **spirals)
        padded = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
        return layer.lin(padded[:, rows.ravel()].reshape(*x.shape[:2], -1))

    for level, (layer, down) in enumerate(zip(model.down_convs, model.pools, strict=True)):
        x = down.mapping().to_dense() @ elu(conv(layer, level, x))
    z = model.to_latent(x.flatten(1))
    x = model.from_latent(z).view(len(x), model.num_vertices[-1], -1)
    for level, layer, up in zip((1, 0), model.up_convs, model.unpools, strict=True):
        x = elu(conv(layer, level, up.mapping().to_dense() @ x))
    return z, conv(model.out_conv, 0, x)


@pytest.mark.parametrize("pool", ["qem", "attention"])
@pytest.mark.parametrize("spirals", [dict(hops=1), dict(hops=2, dilation=2)])
def test_equals_the_dense_computation(hierarchy, pool, spirals):
    kwargs = ATTENTION if pool == "attention" else {}
    model = neural3dmm(hierarchy, pool, reference=[REFERENCE], **spirals, **SMALL, **kwargs)
    model = model.double()
    x = torch.randn(2, hierarchy.num_vertices[0], 3, dtype=torch.double)
    z = model.encode(x)
    out = model.decode(z)
    expected_z, expected = dense(model, hierarchy, x, **spirals)
    assert_close(z, expected_z)
    assert_close(out, expected)
    parameters, cotangent = list(model.parameters()), torch.randn_like(out)
    for got, grad in zip(
        torch.autograd.grad(out, parameters, cotangent),
        torch.autograd.grad(expected, parameters, cotangent),
        strict=True,
    ):
        assert_close(got, grad)


@pytest.mark.parametrize("wider", [False, True])
def test_parameters_are_those_counted_by_hand(wider):
    hierarchy = MeshHierarchy.from_template(blob(4, seed=0))
    counts = {}
    for pool in ("qem", "attention"):
        model = neural3dmm(hierarchy, pool, wider=wider)
        lengths = [conv.length for conv in model.down_convs]
        counts[pool] = sum(p.numel() for p in model.parameters())
    down, up = (
        ((3, 16, 32, 64, 128), (128, 64, 32, 32, 16))
        if wider
        else ((3, 16, 16, 16, 32), (32, 32, 16, 16, 16))
    )
    n = hierarchy.num_vertices
    by_hand = sum(length * a * b + b for length, a, b in zip(lengths, down, down[1:], strict=False))
    by_hand += sum(
        length * a * b + b for length, a, b in zip(lengths[::-1], up, up[1:], strict=False)
    )
    by_hand += lengths[0] * up[-1] * 3 + 3  # the last convolution
    by_hand += n[-1] * down[-1] * 8 + 8 + 8 * n[-1] * up[0] + n[-1] * up[0]
    assert counts["qem"] == by_hand
    # A key and a query per vertex of both ends, down and up; w_a and temperature of every layer.
    keys = 2 * 21 * sum(a + b for a, b in itertools.pairwise(n))
    assert counts["attention"] == by_hand + keys + 4 * (len(n) - 1)
    assert sum(p.numel() for p in freeze(model).parameters()) == by_hand


def test_settings_of_the_first_paper(hierarchy):
    model = neural3dmm(hierarchy, hops=2, dilation=[2, 1], reference=[REFERENCE], **SMALL)
    for level, dilation in enumerate([2, 1]):
        expected = hierarchy.spirals(level, hops=2, dilation=dilation, reference=[REFERENCE])
        assert torch.equal(model.down_convs[level].spirals, expected)
    assert all(isinstance(conv, SpiralConv) for conv in [*model.up_convs, model.out_conv])


def test_a_list_too_short_is_an_error(hierarchy):
    with pytest.raises(ValueError, match=r"one 'dilation' per level .* 2 .got \[2\]"):
        neural3dmm(hierarchy, hops=2, dilation=[2], **SMALL)
