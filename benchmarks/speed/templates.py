r"""Templates of any size, made from nothing."""

import numpy as np
from scipy.spatial import ConvexHull


def blob(num_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    r"""A closed surface bent out of shape, of evenly spread vertices :obj:`[N, 3]`, and its faces
    :obj:`[F, 3]`."""
    i = np.arange(num_vertices)
    z = 1 - (2 * i + 1) / num_vertices
    angle = np.pi * (1 + 5**0.5) * i  # a Fibonacci lattice on the sphere
    ring = np.sqrt(1 - z**2)
    vertices = np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1)
    faces = ConvexHull(vertices).simplices.astype(np.int64)
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    inwards = (np.cross(b - a, c - a) * a).sum(axis=1) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    x, y, z = vertices.T
    radius = 1 + 0.2 * np.sin(3 * x) * np.cos(4 * y) + 0.05 * np.sin(9 * z)
    return 0.1 * radius[:, None] * vertices * [1.0, 1.3, 0.8], faces
