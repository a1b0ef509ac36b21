import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close
from torch_geometric.data import Data

from pyg_attnpool.datasets import MeshDataset, align, looks_unaligned


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


def test_a_further_mesh_comes_into_the_pose_of_the_others():
    x = shape()
    meshes, rotation, _ = moved(x, 9)
    for scale in (False, True):
        found = align(meshes[:5], scale=scale, reference=x)
        brought = found.bring(meshes[5:] * (3 if scale else 1))
        assert_close(brought.vertices, x.expand(4, -1, -1))
        assert_close(brought.rotation, rotation[5:].mT)
        assert_close(brought.undo(brought.vertices), meshes[5:] * (3 if scale else 1))
    with pytest.raises(ValueError, match=r"'reference' of shape \[50, 3\] .got \[60, 3\]"):
        found.bring(meshes[:, :50])


def test_many_meshes_go_where_one_scan_was():
    x = shape()
    meshes, rotation, shift = moved(x, 6)
    brought = align(meshes[:5], reference=x).bring(meshes[5:])
    made = x + 0.1 * torch.randn(70, 60, 3, dtype=torch.double)
    assert_close(brought.undo(made), made @ rotation[5].mT + shift[5])
    with pytest.raises(ValueError, match=r"shape \[5, N, C\] .got \[4, 60, 3\]"):
        align(meshes[:5]).undo(made[:4])


def test_some_of_the_meshes_with_their_motions():
    meshes, *_ = moved(shape(), 6)
    found = align(meshes, scale=True)
    part = found.select(torch.tensor([4, 1]))
    assert_close(part.undo(part.vertices), meshes[[4, 1]])
    assert torch.equal(part.mean, found.mean) and part.scaled


def test_blocks_of_meshes_are_aligned_as_all_at_once():
    x = shape()
    meshes, rotation, _ = moved(x, 150)  # more than two blocks
    found = align(meshes, reference=x)
    assert_close(found.vertices, x.expand(150, -1, -1))
    assert_close(found.rotation, rotation.mT)
    assert_close(found.undo(found.vertices), meshes)


def turned(x, degrees, seed=0):
    r"""Every mesh about an axis of its own through the origin, by an angle of this deviation."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(rng.normal(0, np.radians(degrees), (len(x), 3)))
    return x @ torch.from_numpy(turns.as_matrix()).mT


def ball(num=400, seed=0):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3)))
    return x / x.norm(dim=-1, keepdim=True)


def expressions(x, size, num=30, seed=1):
    r"""Smooth changes of a part of the surface, in front."""
    rng = np.random.default_rng(seed)
    front = (x[:, 2:] - 0.3).clamp(min=0)
    waves = torch.from_numpy(rng.normal(size=(num, 3, 3)))
    return x + size * front * torch.sin(3 * x @ waves)


@pytest.mark.parametrize("num_vertices", [4, 20, 400, 3000])
def test_rigid_motions_alone_look_unaligned(num_vertices):
    x = shape(num_vertices).expand(20, -1, -1)
    shift = torch.from_numpy(np.random.default_rng(3).normal(size=(20, 1, 3)))
    assert looks_unaligned(x + 0.2 * shift)  # pushed
    assert looks_unaligned(turned(x, 15)) and looks_unaligned(turned(x, 180))
    assert looks_unaligned(turned(x, 180) + 100 * shift)
    axis = torch.tensor([0.0, 0.4, 0.0], dtype=torch.double)
    turntable = torch.linspace(0, 2, 20, dtype=torch.double).view(-1, 1) * axis
    matrix = torch.from_numpy(Rotation.from_rotvec(turntable.numpy()).as_matrix())
    assert looks_unaligned(x @ matrix.mT)
    # All the same, or as good as: nothing to take away.
    assert not looks_unaligned(x) and not looks_unaligned(x + 0.01 * shift)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_part_that_turns_in_its_joint_does_not(share):
    # All meshes are in one pose, and the turning part may be most of what sets them apart.
    x = ball().expand(30, -1, -1)
    top = x[0, :, 1] > x[0, :, 1].quantile(1 - share)
    joint = x[0, top].mean(dim=0) * torch.tensor([1.0, 0, 1.0])
    bent = x.clone()
    bent[:, top] = turned(x[:, top] - joint, 40) + joint
    assert not looks_unaligned(bent)
    aligned = align(bent).vertices
    if share == 0.9:  # where the motion of the whole explains most of it, as the criterion was
        spread = [(v - v.mean(dim=0)).square().sum() for v in (bent, aligned)]
        assert spread[1] < 0.5 * spread[0]
    assert looks_unaligned(turned(bent, 60) + torch.arange(30).view(-1, 1, 1))


def test_faces_that_nod_a_little_do_not():
    x = expressions(ball(), 0.1)
    assert not looks_unaligned(x) and not looks_unaligned(turned(x, 1.5))
    assert looks_unaligned(turned(x, 20))
    assert looks_unaligned(x + torch.arange(30).view(-1, 1, 1) * 0.02)
    shapes = ball() + 0.1 * torch.from_numpy(np.random.default_rng(5).normal(size=(30, 400, 3)))
    assert not looks_unaligned(shapes) and not looks_unaligned(turned(shapes, 1.5))
    assert looks_unaligned(moved(ball(), 30)[0]) and not looks_unaligned(shapes[:1])


def test_meshes_come_in_every_form():
    x = shape()
    meshes, rotation, _ = moved(x, 7)
    faces = np.array([[0, 1, 2]])
    forms = {
        "array": meshes.numpy(),
        "data set": MeshDataset(meshes, (x.numpy(), faces)),
        "list": [Data(pos=mesh, face=torch.from_numpy(faces.T)) for mesh in meshes],
    }
    for form in forms.values():
        found = align(form, reference=x.numpy())
        assert found.vertices.dtype == torch.float64  # of their type
        assert torch.equal(found.vertices, align(meshes, reference=x).vertices)
        assert_close(found.rotation, rotation.mT)
        assert torch.equal(found.bring(form).vertices, found.bring(meshes).vertices)
        assert looks_unaligned(form)
    assert torch.equal(found.undo(meshes.numpy()), found.undo(meshes))
    assert align(meshes.float().numpy()).vertices.dtype == torch.float32
    still = x + 0.01 * torch.randn(200, *x.shape, dtype=torch.double)
    assert not looks_unaligned(still.numpy())
    assert not looks_unaligned(MeshDataset(still, (x.numpy(), faces)))


@pytest.mark.parametrize("function", [align, looks_unaligned])
def test_other_forms_are_refused(function):
    for bad, message in (
        (torch.zeros(4, 5, 3, dtype=torch.long), "floating point meshes .got torch.int64"),
        (np.zeros((4, 5, 3), dtype=np.int32), "meshes as a floating point .*got int32"),
        ("scans", "a MeshDataset or a list of Data .got str"),
        ([torch.zeros(5, 3)], "a MeshDataset or a list of Data .got list"),
        (None, "a MeshDataset or a list of Data .got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            function(bad)
    with pytest.raises(ValueError, match=r"shape \[M, N, C\] .got \[5, 3\]"):
        function(torch.zeros(5, 3))


def test_bad_arguments():
    with pytest.raises(TypeError, match="'reference' as a tensor or array .got list"):
        align(torch.zeros(2, 5, 3), reference=[[0.0, 0.0, 0.0]] * 5)
    with pytest.raises(ValueError, match=r"shape \[M, N, C\] .got \[5, 3\]"):
        align(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"'reference' of shape \[5, 3\]"):
        align(torch.zeros(2, 5, 3), reference=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        align(torch.full((2, 5, 3), torch.nan))
