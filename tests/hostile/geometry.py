r"""Meshes of every shape, size and place: repair, hierarchies, spirals and closest points end, and
their results are what their docstrings say, or the mesh is refused."""

import warnings
from pathlib import Path

import numpy as np
import torch

from pyg_attnpool.mesh import MeshHierarchy, barycentric_mapping, check_mesh, spiral_sequences
from tests.mesh.meshes import blob, closest_distance, icosphere, join, topology, torus


def name(number: int) -> str:
    return FAMILIES[number % len(FAMILIES)].__name__


def case(number: int, folder: Path) -> None:
    FAMILIES[number % len(FAMILIES)](np.random.default_rng(number))


def shape(rng):
    r"""One to several components, closed or with a hole, somewhere, of some size, in any order."""
    parts = []
    for _ in range(int(rng.choice([1, 1, 2, 3, 9]))):
        kind, seed = rng.integers(5), int(rng.integers(100))
        if kind == 0:
            vertices, faces = torus(int(rng.integers(3, 6)), int(rng.integers(3, 6)))
        elif kind == 1:
            vertices, faces = np.eye(4, 3), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        elif kind == 2:
            vertices, faces = fan(int(rng.integers(3, 40)))
        else:
            vertices, faces = blob(int(rng.integers(3)), seed, hole=bool(rng.integers(2)))
        move = rng.normal(0, 3, 3) if rng.random() < 0.9 else 0
        parts.append((vertices * rng.uniform(0.1, 2) + move, faces))
    vertices, faces = join(*parts)
    order = rng.permutation(len(vertices))
    faces = np.argsort(order)[faces][rng.permutation(len(faces))]
    if rng.random() < 0.3:  # as the coordinates of maps
        return vertices[order] + [500_000, 5_400_000, 100], faces
    return vertices[order] * 10.0 ** rng.choice([0, 0, -9, 9, -120, 120]), faces


def fan(n):
    angle = 2 * np.pi * np.arange(n) / n
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    faces = np.stack([0 * np.arange(n), 1 + np.arange(n), 1 + (np.arange(n) + 1) % n], axis=1)
    return np.concatenate([[[0, 0, 0.3]], ring]), faces


def broken(rng):
    r"""A shape that somebody has damaged: any triangles."""
    vertices, faces = shape(rng)
    for _ in range(int(rng.integers(1, 4))):
        way = rng.integers(6)
        some = rng.integers(len(faces), size=int(rng.integers(1, 4)))
        if way == 0:
            faces[some] = faces[some][:, [0, 2, 1]]
        elif way == 1:
            faces = np.concatenate([faces, faces[some][:, [1, 2, 0]]])
        elif way == 2:
            faces[some, 0] = faces[some, 1]
        elif way == 3:
            faces = np.concatenate([faces, rng.integers(len(vertices), size=(3, 3))])
        elif way == 4:  # a soup of triangles
            vertices, faces = vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)
        else:
            vertices = np.concatenate([vertices, vertices[:2] + 1])
    return vertices, faces


def refused(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as e:
        assert str(e).startswith("Expected"), f"refused without a reason ({e})"
        return None


# Families of cases ###################################################################


def repairs(rng):
    from pyg_attnpool.mesh import repair

    vertices, faces = broken(rng)
    merge = [0.0, None, 1e-6 * np.ptp(vertices)][rng.integers(3)]
    mesh = refused(repair, vertices, faces, merge)
    if mesh is None:
        return
    check_mesh(mesh.vertices, mesh.faces)
    assert np.array_equal(mesh.vertices, vertices[mesh.index]), "a vertex moved"
    again = repair(mesh.vertices, mesh.faces, merge)
    assert np.array_equal(again.faces, mesh.faces), "a second repair changes something"
    # The triangles are those of before, but for degenerate and repeated ones.
    whole = faces[[len(set(f)) == 3 for f in faces.tolist()]]
    found, wanted = (
        {tuple(sorted(map(tuple, corners))) for corners in (v + 0.0)[f].tolist()}
        for v, f in ((mesh.vertices, mesh.faces), (vertices, whole))
    )
    assert found <= wanted, "a triangle that was not there"
    if merge is None:
        assert found == wanted, "a triangle is gone"


def hierarchies(rng):
    vertices, faces = shape(rng)
    n = len(vertices)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if rng.random() < 0.5:
            kwargs = {"factors": [float(f) for f in rng.uniform(1.2, 6, int(rng.integers(1, 5)))]}
        else:
            counts = np.unique(rng.integers(-2, n + 2, int(rng.integers(1, 4))))[::-1]
            kwargs = {"num_vertices": counts.tolist()}
        hierarchy = refused(MeshHierarchy.from_template, (vertices, faces), **kwargs)
    for warning in told:
        assert issubclass(warning.category, UserWarning), warning.message
    if hierarchy is None:
        return
    assert np.array_equal(hierarchy.vertices[0], vertices)
    if "num_vertices" in kwargs:
        wanted = [c for c in kwargs["num_vertices"] if c != n]
        assert hierarchy.num_vertices[1:] == wanted, "other counts"
    before = topology(faces)[0]
    for level in range(1, len(hierarchy.vertices)):
        coarse, coarse_faces = hierarchy.vertices[level], hierarchy.faces[level]
        check_mesh(coarse, coarse_faces)
        down, up = hierarchy.down[level - 1], hierarchy.up[level - 1]
        assert np.array_equal(hierarchy.vertices[level - 1][down.index[:, 0].numpy()], coarse)
        assert torch.allclose(up.weight.sum(dim=1), torch.ones(up.num_target).double())
        assert (up.weight >= 0).all()
        components = topology(coarse_faces)[0]
        assert components == before or told, "components vanish without a word"
        before = components


def spirals(rng):
    vertices, faces = shape(rng)
    kwargs: dict = {}
    if rng.random() < 0.5:
        kwargs["length"] = int(rng.choice([1, 3, 9, len(vertices), len(vertices) + 1, 200]))
        kwargs["fill"] = [None, -1, "nearest"][rng.integers(3)]
    else:
        kwargs["hops"] = int(rng.choice([1, 2, 3, 5, 12, 1000]))
        kwargs["truncate"] = bool(rng.integers(2))
    kwargs["dilation"] = int(rng.choice([1, 1, 2, 3, 100]))
    found = refused(spiral_sequences, vertices, faces, **kwargs)
    if found is None:
        return
    assert (found[:, 0] == np.arange(len(vertices))).all(), "a row does not start at its vertex"
    assert found.min() >= -1 and found.max() < len(vertices)
    if "length" in kwargs:
        assert found.shape[1] == kwargs["length"]
    for row in found:
        real = row[row >= 0]
        assert len(np.unique(real)) == len(real), "a vertex twice"


def closest(rng):
    vertices, faces = shape(rng)
    size = np.ptp(vertices, axis=0).max()
    points = vertices.mean(axis=0) + size * rng.normal(0, rng.choice([0.1, 1, 100]), (12, 3))
    index, weight = barycentric_mapping(points, vertices, faces)
    assert (weight >= 0).all() and np.allclose(weight.sum(axis=1), 1)
    found = np.einsum("mk,mki->mi", weight, vertices[index])
    unit = 1 / size  # the formula below squares
    centre = vertices.mean(axis=0)
    points, vertices, found = (unit * (a - centre) for a in (points, vertices, found))
    wanted = closest_distance(points, vertices, faces)
    distance = np.linalg.norm(points - found, axis=1)
    assert np.allclose(distance, wanted, rtol=1e-6, atol=1e-7), "another point is closer"


def spheres(rng):
    # Where many vertices are as close as each other.
    vertices, faces = icosphere(int(rng.integers(3)))
    points = np.zeros((4, 3)) + rng.choice([0, 1e-300])
    index, weight = barycentric_mapping(points, vertices, faces)
    found = np.linalg.norm(np.einsum("mk,mki->mi", weight, vertices[index]), axis=1)
    assert np.allclose(found, closest_distance(points, vertices, faces))


FAMILIES = [repairs, hierarchies, spirals, closest, spirals, spheres]
