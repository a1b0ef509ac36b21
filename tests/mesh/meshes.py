r"""Meshes for the tests, made from nothing."""

import numpy as np

PHI = (1 + 5**0.5) / 2
ICOSAHEDRON = (
    np.array(
        [
            *[(-1, PHI, 0), (1, PHI, 0), (-1, -PHI, 0), (1, -PHI, 0)],
            *[(0, -1, PHI), (0, 1, PHI), (0, -1, -PHI), (0, 1, -PHI)],
            *[(PHI, 0, -1), (PHI, 0, 1), (-PHI, 0, -1), (-PHI, 0, 1)],
        ]
    ),
    np.array(
        [
            *[(0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11)],
            *[(1, 5, 9), (5, 11, 4), (11, 10, 2), (10, 7, 6), (7, 1, 8)],
            *[(3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9)],
            *[(4, 9, 5), (2, 4, 11), (6, 2, 10), (8, 6, 7), (9, 8, 1)],
        ]
    ),
)


def icosphere(subdivisions):
    vertices, faces = ICOSAHEDRON
    for _ in range(subdivisions):
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
        unique, middle = np.unique(edges, axis=0, return_inverse=True)
        x, y, z = middle.reshape(3, -1) + len(vertices)
        a, b, c = faces.T
        vertices = np.concatenate([vertices, vertices[unique].mean(axis=1)])
        faces = np.concatenate(
            [np.stack(t, axis=1) for t in ((a, x, z), (b, y, x), (c, z, y), (x, y, z))]
        )
        vertices = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    return vertices / np.linalg.norm(vertices, axis=1, keepdims=True), faces


def blob(subdivisions, seed, hole=False):
    r"""A sphere bent out of shape, without symmetry; with a hole if asked for."""
    rng = np.random.default_rng(seed)
    vertices, faces = icosphere(subdivisions)
    directions = rng.normal(size=(5, 3))
    radius = 1 + 0.1 * np.sin(vertices @ directions.T * rng.uniform(1, 4, 5)).sum(axis=1)
    vertices = vertices * radius[:, None] * rng.uniform(0.7, 1.3, 3)
    if hole:
        height = vertices[faces].mean(axis=1) @ directions[0]
        faces = faces[height < np.quantile(height, 0.88)]
        used = np.unique(faces)
        vertices, faces = vertices[used], np.searchsorted(used, faces)
    return vertices, faces


def torus(n, m):
    i, j = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
    u, v = 2 * np.pi * i / n, 2 * np.pi * j / m
    vertices = np.stack(
        [(2 + np.cos(v)) * np.cos(u), (2 + np.cos(v)) * np.sin(u), np.sin(v)], axis=1
    )
    right, up = (i + 1) % n, (j + 1) % m
    a, b, c, d = i * m + j, right * m + j, right * m + up, i * m + up
    faces = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    return vertices, faces


def join(*meshes):
    sizes = np.cumsum([0] + [len(v) for v, _ in meshes])
    return (
        np.concatenate([v for v, _ in meshes]),
        np.concatenate([f + n for (_, f), n in zip(meshes, sizes, strict=False)]),
    )


def closest_distance(points, vertices, faces):
    r"""The distance of every point to a mesh, from a formula of its own: the plane where the foot
    of the perpendicular lies inside, the edges elsewhere; face by face."""
    best = np.full(len(points), np.inf)
    for a, b, c in vertices[faces]:
        for start, end in ((a, b), (b, c), (c, a)):
            edge = end - start
            t = np.clip((points - start) @ edge / (edge @ edge), 0, 1)
            best = np.minimum(best, np.linalg.norm(points - start - t[:, None] * edge, axis=1))
        normal = np.cross(b - a, c - a)
        height = (points - a) @ normal / (normal @ normal)
        foot = points - height[:, None] * normal
        sides = [np.cross(y - x, foot - x) @ normal for x, y in ((a, b), (b, c), (c, a))]
        inside = np.min(sides, axis=0) >= 0
        best[inside] = np.minimum(best, np.abs(height) * np.linalg.norm(normal))[inside]
    return best


def topology(faces):
    r"""Components, Euler characteristic and boundary loops of a manifold."""
    parent = {}

    def find(parent, x):
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    halfedges = {(a, b) for t in faces.tolist() for a, b in zip(t, t[1:] + t[:1], strict=True)}
    open_edges = [(a, b) for a, b in halfedges if (b, a) not in halfedges]
    loops = {}
    for edges, forest in ((halfedges, parent), (open_edges, loops)):
        for a, b in edges:
            forest[find(forest, a)] = find(forest, b)
    num_edges = (len(halfedges) + len(open_edges)) // 2
    components = len({find(parent, v) for v in parent})
    holes = len({find(loops, v) for v in loops})
    return components, len(parent) - num_edges + len(faces), holes
