r"""Repairs that a mesh needs to be a template, without moving a vertex."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import numpy as np
from numpy import ndarray
from torch import Tensor

from pyg_attnpool.mesh.graph import components, graph_of
from pyg_attnpool.mesh.io import check_arrays, check_mesh

Array = TypeVar("Array", ndarray, Tensor)


@dataclass(frozen=True, eq=False)
class RepairedMesh:
    r"""A mesh that :meth:`check_mesh` accepts, and where its vertices come from.

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N', 3]` (float64).
        faces (numpy.ndarray): Faces :obj:`[F', 3]` (int64).
        index (numpy.ndarray): The vertex of the mesh before that each vertex is :obj:`[N']`.
        num_source (int): The number of vertices before, :obj:`N`.
        changes (dict): The repairs by name, and the number of faces or vertices of each.

    Example:
        >>> from pyg_attnpool.mesh import repair
        >>> mesh = repair(np.eye(4, 3), np.array([[0, 1, 2]]))  # vertex 3 has no face
        >>> mesh.apply(np.zeros((100, 4, 3))).shape
        (100, 3, 3)
    """

    vertices: ndarray
    faces: ndarray
    index: ndarray
    num_source: int
    changes: dict[str, int]

    def apply(self, x: Array) -> Array:
        r"""Takes values of the vertices before, such as a whole set of registered meshes, to the
        vertices of the repaired mesh.

        Args:
            x (numpy.ndarray or torch.Tensor): Values :obj:`[*, N, C]`.

        Returns:
            Values :obj:`[*, N', C]`.

        Raises:
            ValueError: If they are of another number of vertices.
        """
        if x.ndim < 2 or x.shape[-2] != self.num_source:
            raise ValueError(
                f"Expected values [*, {self.num_source}, C] of the vertices before the repair "
                f"(got {list(x.shape)})"
            )
        return x[..., self.index, :]

    def __repr__(self) -> str:
        changes = ", ".join(f"{count} {what}" for what, count in self.changes.items() if count)
        return (
            f"{self.__class__.__name__}({self.num_source} -> {len(self.vertices)} vertices: "
            f"{changes or 'as it was'})"
        )


def repair(vertices: ndarray, faces: ndarray, merge: float | None = 0.0) -> RepairedMesh:
    r"""Makes an orientable manifold of any triangles, as :meth:`check_mesh` and
    :class:`MeshHierarchy` need it. No vertex moves, and no part of the surface is lost: the mesh is
    stitched and cut, as in the `"Cutting and Stitching: Converting Sets of Polygons to Manifold
    Surfaces" <https://doi.org/10.1109/2945.928166>`_ paper. In this order,

    1. boundaries that run along each other, as at the seams of a texture, are stitched where two
       edges meet, and no third;
    2. faces of fewer than three different vertices go, and of faces with the same vertices all but
       the first;
    3. faces are turned to agree with most of those they are connected to, closed components
       outwards;
    4. the surface is cut along edges of more than two faces, and along edges where no orientation
       fits both; the fans of faces that meet in nothing but a vertex get a copy of it each;
    5. vertices without a face go.

    Right parts stay as they are and in their order; copies of vertices come last. A second repair
    changes nothing.

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
        merge (float, optional): The distance up to which the ends of two edges are one vertex, in
            the unit of the vertices; :obj:`None` stitches nothing, where boundaries that touch, as
            lips may, are no seam. (default: :obj:`0.0`)

    Returns:
        The mesh, and the map of vertices that takes registered meshes along
        (:meth:`RepairedMesh.apply`).

    Raises:
        TypeError: If the arrays are not of numbers, or faces not of integers.
        ValueError: If shapes are wrong, a vertex of a face does not exist or is not finite, or no
            face is left.

    Example:
        >>> import numpy as np
        >>> from pyg_attnpool.mesh import repair
        >>> vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [9, 9, 9], [1, 1, 0]])
        >>> mesh = repair(vertices, np.array([[0, 1, 2], [2, 2, 1], [1, 2, 4]]))
        >>> mesh
        RepairedMesh(5 -> 4 vertices: 1 degenerate faces, 1 turned faces, 1 vertices without a face)
        >>> mesh.faces.tolist(), mesh.index.tolist()
        ([[0, 1, 2], [1, 3, 2]], [0, 1, 2, 4])
        >>> mesh.apply(np.zeros((100, 5, 3))).shape
        (100, 4, 3)
    """
    vertices, faces = check_arrays(vertices, faces)
    if merge is not None and not (isinstance(merge, Real) and 0 <= merge < np.inf):
        raise ValueError(f"Expected 'merge' to be a distance or None (got {merge!r})")
    used = np.unique(faces)
    broken = used[~np.isfinite(vertices[used]).all(axis=1)]
    if len(broken) > 0:
        raise ValueError(
            f"Expected finite vertices (got {vertices[broken[0]].tolist()} at vertex {broken[0]})"
        )
    origin = faces  # with the vertices that stitched ones were
    changes = {"degenerate faces": 0, "repeated faces": 0}
    while True:
        whole = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
        _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
        kept = np.sort(first[whole[first]])
        changes["degenerate faces"] += int((~whole).sum())
        changes["repeated faces"] += int(whole.sum()) - len(kept)
        faces, origin = faces[kept], origin[kept]
        stitched = faces if merge is None else _stitched(vertices, faces, merge)
        if np.array_equal(faces, stitched):
            break
        faces = stitched
    if len(faces) == 0:
        raise ValueError("Expected a mesh of at least one face of three vertices (got none)")

    turn, pairs = _orientation(faces)
    faces, origin = (np.where(turn[:, None], f[:, [0, 2, 1]], f) for f in (faces, origin))
    # Turned, the half-edges 0, 1 and 2 of a face are 2, 1 and 0.
    pairs = np.where(turn[pairs // 3], pairs + 2 - 2 * (pairs % 3), pairs)
    index, faces = _cut(origin, pairs)
    inwards = _inwards(vertices[index], faces)
    faces = np.where(inwards[:, None], faces[:, [0, 2, 1]], faces)
    left = np.unique(index)
    changes["turned faces"] = int((turn ^ inwards).sum())
    changes["stitched vertices"] = len(np.unique(origin)) - len(left)
    changes["copied vertices"] = len(index) - len(left)
    changes["vertices without a face"] = len(vertices) - len(used)
    return RepairedMesh(*check_mesh(vertices[index], faces), index, len(vertices), changes)


def _stitched(vertices: ndarray, faces: ndarray, merge: float) -> ndarray:
    # The faces, whose vertices are one where they are one at a seam.
    from scipy.spatial import cKDTree

    # What is at one place exactly comes first: its pairs would be as many as their square. What is
    # nowhere is at a place of its own.
    finite = np.isfinite(vertices).all(axis=1)
    places, found = np.unique(vertices[finite] + 0.0, axis=0, return_inverse=True)
    found = found.reshape(-1)
    if merge > 0:
        near = cKDTree(places).query_pairs(merge, output_type="ndarray")
        found = components(near, len(places))[found]
    place = len(places) + np.cumsum(~finite) - 1
    place[finite] = found
    # Half-edges by the places that they connect: at a seam there are two, of other vertices.
    edge = np.stack([faces.ravel(), np.roll(faces, -1, axis=1).ravel()], axis=1)
    edge = edge[place[edge[:, 0]] != place[edge[:, 1]]]
    turned = place[edge[:, 0]] > place[edge[:, 1]]
    edge = np.where(turned[:, None], edge[:, ::-1], edge)
    first, second = _in_twos(place[edge] @ [len(vertices), 1])
    seam = np.concatenate(
        [np.stack([edge[first, end], edge[second, end]], axis=1) for end in (0, 1)]
    )
    group = components(seam, len(vertices))
    _, lowest = np.unique(group, return_index=True)
    return lowest[group][faces]


def _orientation(faces: ndarray) -> tuple[ndarray, ndarray]:
    # Which faces turn, and the pairs of half-edges [P, 2] across which faces agree then. A tree
    # through every component says how its faces turn, along edges that agree as far as possible.
    from scipy.sparse.csgraph import minimum_spanning_tree

    source, target = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    size = int(faces.max()) + 1
    pairs = np.stack(
        _in_twos(np.minimum(source, target) * size + np.maximum(source, target)), axis=1
    )
    a, b = pairs.T // 3
    differ = source[pairs[:, 0]] == source[pairs[:, 1]]
    n = len(faces)
    # Faces may share two edges; the one that agrees counts.
    order = np.lexsort((differ, np.minimum(a, b) * n + np.maximum(a, b)))
    _, first = np.unique((np.minimum(a, b) * n + np.maximum(a, b))[order], return_index=True)
    one = order[first]
    edges = graph_of(np.stack([a[one], b[one]], axis=1), n, 1.0 + differ[one])
    tree = minimum_spanning_tree(edges).tocoo()
    # A face and its back are two nodes: what the tree connects to the front of a face faces as it.
    i, j, back = tree.row.astype(np.int64), tree.col.astype(np.int64), tree.data > 1.5
    sides = np.concatenate(
        [np.stack([i, j + n * back], axis=1), np.stack([i + n, j + n * ~back], axis=1)]
    )
    side = components(sides, 2 * n)
    component = components(np.stack([i, j], axis=1), n)
    _, root = np.unique(component, return_index=True)
    turn = side[:n] != side[root[component]]
    mostly = 2 * np.bincount(component, turn) > np.bincount(component)
    turn ^= mostly[component]
    return turn, pairs[turn[a] ^ turn[b] == differ]


def _cut(faces: ndarray, pairs: ndarray) -> tuple[ndarray, ndarray]:
    # Corners are one vertex where faces that agree share an edge there. The old vertex of each new
    # one, the lowest of those stitched, and the new faces: old vertices in order, then copies.
    behind = pairs - pairs % 3 + (pairs + 1) % 3
    corner = np.concatenate(
        [
            np.stack([pairs[:, 0], behind[:, 1]], axis=1),
            np.stack([behind[:, 0], pairs[:, 1]], axis=1),
        ]
    )
    label = components(corner, faces.size)
    _, first = np.unique(label, return_index=True)
    vertex = np.full(len(first), faces.max())
    np.minimum.at(vertex, label, faces.ravel())
    order = np.lexsort((first, vertex))
    copy = np.zeros(len(first), dtype=bool)
    copy[order[1:]] = vertex[order[1:]] == vertex[order[:-1]]
    order = np.lexsort((first, vertex, copy))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return vertex[order], rank[label].reshape(-1, 3)


def _inwards(vertices: ndarray, faces: ndarray) -> ndarray:
    # Which faces are of closed components that are inside out.
    source, target = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    n = len(vertices)
    component = components(np.stack([source, target], axis=1), n)[faces[:, 0]]
    count = component.max() + 1
    once = ~np.isin(source * n + target, target * n + source)
    is_open = np.bincount(np.repeat(component, 3), once, minlength=count) > 0
    corners = vertices[faces] - vertices.mean(axis=0)
    volume = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    total = np.bincount(component, volume, minlength=count)
    rounding = 1e-12 * np.bincount(component, np.abs(volume), minlength=count)
    return (~is_open & (total < -rounding))[component]


def _in_twos(key: ndarray) -> tuple[ndarray, ndarray]:
    # The places of keys that are there exactly twice, first and second.
    order = np.argsort(key, kind="stable")
    _, start, count = np.unique(key[order], return_index=True, return_counts=True)
    start = start[count == 2]
    return order[start], order[start + 1]
