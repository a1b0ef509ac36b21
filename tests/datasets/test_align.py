import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close

from pyg_attnpool.datasets import align, looks_unaligned


def shape(num=60, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3)))


def moved(x, num, seed=0):
    r"""Copies of a shape under known motions, and these."""
    rng = np.random.default_rng(seed)
    rotation = torch.from_numpy(Rotation.random(num, random_state=seed).as_matrix())
    shift = torch.from_numpy(rng.normal(size=(num, 1, 3)))
    return x @ rotation.mT + shift, rotation, shift


def test_known_motions_are_found_exactly():
    x = shape()
    meshes, rotation, _ = moved(x, 7)
    found = align(meshes, reference=x)
    assert_close(found.vertices, x.expand(7, -1, -1))
    assert_close(found.rotation, rotation.mT)
    assert_close(found.scale, torch.ones(7, dtype=torch.double))
    assert_close(found.mean, x)
    by_motion = meshes @ found.rotation.mT + found.translation.unsqueeze(1)
    assert_close(found.vertices, by_motion)
    assert_close(found.undo(found.vertices), meshes)


def test_sizes_are_made_equal_if_asked_for():
    x = shape()
    meshes, *_ = moved(x, 5)
    size = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.double)
    meshes = size.view(-1, 1, 1) * meshes
    found = align(meshes, scale=True, reference=x)
    assert_close(found.vertices, x.expand(5, -1, -1))
    assert_close(found.scale, 1 / size)
    assert_close(found.undo(found.vertices), meshes)
    assert_close(align(meshes).scale, torch.ones(5, dtype=torch.double))


def test_one_mesh_is_turned_as_scipy_turns_it():
    x, y = shape(), shape(seed=1)
    found = align(y.unsqueeze(0), reference=x).rotation[0]
    centred = [(v - v.mean(dim=0)).numpy() for v in (x, y)]
    expected, _ = Rotation.align_vectors(*centred)
    assert_close(found, torch.from_numpy(expected.as_matrix()), atol=1e-6, rtol=0)


def test_no_mesh_is_mirrored():
    x = shape()
    meshes = torch.stack([x, x * torch.tensor([-1.0, 1, 1])])
    assert_close(torch.det(align(meshes).rotation), torch.ones(2, dtype=torch.double))


def test_the_mean_of_noisy_shapes_is_where_the_distance_is_least():
    x = shape()
    meshes, *_ = moved(x, 20)
    meshes = meshes + 0.05 * torch.randn_like(meshes)
    found = align(meshes)
    assert_close(found.vertices.mean(dim=0), found.mean)
    again = align(found.vertices, reference=found.mean)
    assert_close(again.vertices, found.vertices, atol=1e-6, rtol=0)
    assert_close(found.vertices[0], meshes[0], atol=0.3, rtol=0)  # in the pose of the first


def test_further_features_and_the_type_stay():
    meshes = torch.randn(4, 30, 5)
    found = align(meshes)
    assert found.vertices.dtype == torch.float32
    assert torch.equal(found.vertices[..., 3:], meshes[..., 3:])
    assert_close(found.undo(found.vertices), meshes, atol=1e-5, rtol=1e-5)


def test_what_looks_unaligned():
    x = shape()
    shapes = x + 0.1 * torch.randn(30, 60, 3)
    assert not looks_unaligned(shapes) and looks_unaligned(moved(x, 30)[0])
    assert not looks_unaligned(shapes[:1])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"shape \[M, N, C\] .got \[5, 3\]"):
        align(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"'reference' of shape \[5, 3\]"):
        align(torch.zeros(2, 5, 3), reference=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        align(torch.full((2, 5, 3), torch.nan))
