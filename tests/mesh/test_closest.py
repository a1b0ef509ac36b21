import numpy as np
import pytest

from pyg_attnpool.mesh import barycentric_mapping, closest
from tests.mesh.meshes import blob, closest_distance, join, torus


def surface_points(index, weight, vertices):
    return (vertices[index] * weight[..., None]).sum(axis=1)


# The last has faces of very different size.
MESHES = {
    "closed": blob(2, seed=2),
    "open": blob(2, seed=3, hole=True),
    "sizes": join(blob(3, seed=4), tuple(a * s for a, s in zip(torus(5, 4), (7, 1), strict=True))),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("chunk", [1 << 14, 37])
def test_closest_points_are_those_of_brute_force(monkeypatch, name, chunk):
    monkeypatch.setattr(closest, "CHUNK", chunk)
    vertices, faces = MESHES[name]
    points = np.random.default_rng(0).normal(size=(211, 3)) * np.ptp(vertices, axis=0) / 2
    index, weight = barycentric_mapping(points, vertices, faces)
    assert (weight >= 0).all()
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-15)
    rows = set(map(tuple, faces.tolist()))
    assert all(tuple(row) in rows for row in index.tolist())
    distance = np.linalg.norm(surface_points(index, weight, vertices) - points, axis=1)
    np.testing.assert_allclose(distance, closest_distance(points, vertices, faces), atol=1e-13)


def test_points_of_the_surface_map_to_themselves():
    vertices, faces = blob(2, seed=5)
    weight = np.random.default_rng(1).dirichlet([1, 1, 1], size=len(faces))
    points = np.concatenate([surface_points(faces, weight, vertices), vertices])
    index, got = barycentric_mapping(points, vertices, faces)
    np.testing.assert_allclose(surface_points(index, got, vertices), points, atol=1e-14)
    np.testing.assert_array_equal(index[: len(faces)], faces)
    np.testing.assert_allclose(got[: len(faces)], weight, atol=1e-12)


def test_degenerate_triangle_is_its_edges():
    a, b = np.array([[0.0, 0, 0]]), np.array([[2.0, 0, 0]])
    weight, square = closest.closest_on_triangles(np.array([[0.5, 1, 0]]), a, b, (a + b) / 2)
    np.testing.assert_allclose(weight @ np.array([0, 2, 1]), 0.5)
    np.testing.assert_allclose(square, 1)
