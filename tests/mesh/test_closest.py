import tracemalloc

import numpy as np
import pytest

from pyg_attnpool.mesh import barycentric_mapping, closest
from tests.mesh.meshes import blob, closest_distance, icosphere, join, torus


def surface_points(index, weight, vertices):
    return (vertices[index] * weight[..., None]).sum(axis=1)


# The last has faces of very different size.
MESHES = {
    "closed": blob(2, seed=2),
    "open": blob(2, seed=3, hole=True),
    "sizes": join(blob(3, seed=4), tuple(a * s for a, s in zip(torus(5, 4), (7, 1), strict=True))),
}


@pytest.fixture(params=[True, False], ids=["compiled", "numpy"])
def way(request, monkeypatch):
    if request.param and not closest.available():
        pytest.skip("no compiled library")
    monkeypatch.setattr(closest, "available", lambda: request.param)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(
    "chunk, pairs", [(1 << 14, 1 << 17), (37, 1 << 17), (1 << 14, 50), (37, 1)]
)
def test_closest_points_are_those_of_brute_force(way, monkeypatch, name, chunk, pairs):
    monkeypatch.setattr(closest, "CHUNK", chunk)
    monkeypatch.setattr(closest, "PAIRS", pairs)
    vertices, faces = MESHES[name]
    points = np.random.default_rng(0).normal(size=(211, 3)) * np.ptp(vertices, axis=0) / 2
    index, weight = barycentric_mapping(points, vertices, faces)
    assert (weight >= 0).all()
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-15)
    rows = set(map(tuple, faces.tolist()))
    assert all(tuple(row) in rows for row in index.tolist())
    distance = np.linalg.norm(surface_points(index, weight, vertices) - points, axis=1)
    np.testing.assert_allclose(distance, closest_distance(points, vertices, faces), atol=1e-13)


def test_points_of_the_surface_map_to_themselves(way):
    vertices, faces = blob(2, seed=5)
    weight = np.random.default_rng(1).dirichlet([1, 1, 1], size=len(faces))
    points = np.concatenate([surface_points(faces, weight, vertices), vertices])
    index, got = barycentric_mapping(points, vertices, faces)
    np.testing.assert_allclose(surface_points(index, got, vertices), points, atol=1e-14)
    np.testing.assert_array_equal(index[: len(faces)], faces)
    np.testing.assert_allclose(got[: len(faces)], weight, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0])
def test_both_ways_choose_the_same_faces(monkeypatch, spread):
    # Corners and edges are as close as any to several faces, of which some are degenerate or twice
    # there.
    vertices, faces = MESHES["sizes"]
    flat = np.stack([faces[:40, 0], faces[:40, 1], faces[:40, 1]], axis=1)
    faces = np.concatenate([faces, flat, faces[100:120]])
    rng = np.random.default_rng(0)
    points = np.concatenate([vertices, vertices[faces[:, :2]].mean(axis=1)])
    points += spread * rng.normal(size=points.shape)
    found = []
    for compiled in (closest.available(), False):
        monkeypatch.setattr(closest, "available", lambda compiled=compiled: compiled)
        found.append(closest.closest_points(points, vertices, faces))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_degenerate_triangle_is_its_edges():
    a, b = np.array([[0.0, 0, 0]]), np.array([[2.0, 0, 0]])
    weight, square = closest.closest_on_triangles(np.array([[0.5, 1, 0]]), a, b, (a + b) / 2)
    np.testing.assert_allclose(weight @ np.array([0, 2, 1]), 0.5)
    np.testing.assert_allclose(square, 1)


@pytest.mark.slow
def test_fan_takes_little_memory(way):
    # Every face of a fan is near every point.
    n = 4000
    angle = np.arange(n) * 2 * np.pi / n
    vertices = np.stack([np.cos(angle), np.sin(angle), 0.1 * np.sin(5 * angle)], axis=1)
    vertices = np.concatenate([vertices, np.zeros((1, 3))])
    faces = np.stack([np.full(n, n), np.arange(n), np.roll(np.arange(n), -1)], axis=1)
    points = vertices + np.random.default_rng(0).normal(size=vertices.shape) * 0.01
    tracemalloc.start()
    _, _, distance = closest.closest_points(points, vertices, faces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6  # all pairs at once would take 4,000 times 4,000 times some 300 bytes
    some = slice(None, None, 500)
    expected = closest_distance(points[some], vertices, faces)
    np.testing.assert_allclose(distance[some], expected, atol=1e-13)


def test_bad_arguments_are_named():
    vertices, faces = blob(1, seed=0)
    with pytest.raises(ValueError, match="'points' of shape"):
        barycentric_mapping(np.full((2, 3), np.nan), vertices, faces)
    with pytest.raises(ValueError, match="'points' of shape"):
        barycentric_mapping(vertices[0], vertices, faces)
    with pytest.raises(ValueError, match=r"0 to 41 .got 1 faces, 0 to 99"):
        barycentric_mapping(vertices, vertices, np.array([[0, 1, 99]]))
    with pytest.raises(ValueError, match="got 0 faces"):
        barycentric_mapping(vertices, vertices, faces[:0])
    assert barycentric_mapping(vertices[:0], vertices, faces)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="finite points and vertices"):
        closest.closest_points(np.full((2, 3), np.nan), vertices, faces)


@pytest.mark.parametrize("size", [1e-300, 1e-120, 1e120, 1e300])
def test_sizes_whose_squares_are_no_numbers(way, size):
    vertices, faces = icosphere(1)
    points = np.random.default_rng(0).normal(size=(20, 3))
    wanted = barycentric_mapping(points, vertices, faces)
    found = barycentric_mapping(size * points, size * vertices, faces)
    # Of faces that are equally close, rounding chooses.
    a, b = (surface_points(*result, vertices) for result in (found, wanted))
    np.testing.assert_allclose(a, b, atol=1e-9)


def test_types_that_are_no_coordinates():
    vertices, faces = icosphere(0)
    for points in (vertices.astype(complex), vertices.astype(int), vertices.astype(str)):
        with pytest.raises(TypeError, match="'points' of floating numbers"):
            barycentric_mapping(points, vertices, faces)
    with pytest.raises(TypeError, match="'faces' of integer numbers"):
        barycentric_mapping(vertices, vertices, faces.astype(float))
