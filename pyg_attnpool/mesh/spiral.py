r"""Spirals: the neighbours of every vertex in one order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from pyg_attnpool.mesh.graph import graph_of
from pyg_attnpool.mesh.io import check_mesh, edges

if TYPE_CHECKING:
    from scipy.sparse import csr_array

GAP = -1  # where a spiral passes a boundary, and where it has ended


def spiral_sequences(
    vertices: ndarray,
    faces: ndarray,
    hops: int = 1,
    reference: Sequence[int] | None = None,
    dilation: int = 1,
    length: int | None = None,
    truncate: bool = False,
    fill: str | int | None = None,
) -> ndarray:
    r"""The spiral of every vertex: itself, then its neighbours ring by ring, counter-clockwise as
    seen from outside, the side that the faces' orientation names.

    The first ring starts at the neighbour on the shortest path to the reference vertex, by
    Euclidean edge lengths, so that spirals are alike across the mesh. (The ring of the reference
    vertex itself starts at its nearest neighbour.) Every further ring starts outside of the first
    step of the ring before.

    By default, spirals are those of the `"Neural 3D Morphable Models"
    <https://arxiv.org/abs/1905.02876>`_ paper: all vertices up to :obj:`hops` edges away, and -1
    where a ring passes a boundary. With :obj:`length`, they are those of the `"SpiralNet++"
    <https://arxiv.org/abs/1911.05856>`_ paper: :obj:`length` vertices from as many rings as
    needed, without marks at boundaries.

    >>> from pyg_attnpool.mesh import spiral_sequences
    >>> vertices = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    >>> spiral_sequences(vertices, np.array([[0, 1, 2], [0, 2, 3]]), length=3).tolist()
    [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 2]]

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]` of an orientable manifold.
        hops (int, optional): The number of rings. (default: :obj:`1`)
        reference (list, optional): Reference vertices. In a component without one, the vertex
            farthest from the component's mean is the reference. (default: :obj:`None`)
        dilation (int, optional): Keeps every :obj:`dilation`-th entry. (default: :obj:`1`)
        length (int, optional): The length of every spiral after dilation, in place of
            :obj:`hops`. (default: :obj:`None`)
        truncate (bool, optional): If :obj:`True`, cuts spirals at the mean plus two standard
            deviations of all their lengths. (default: :obj:`False`)
        fill (str or int, optional): With :obj:`length`, what becomes of a spiral in a component
            of too few vertices. :obj:`"nearest"`: the :obj:`length * dilation` vertices of the
            whole mesh that are nearest to its centre take its place before dilation, as in the
            program of the SpiralNet++ paper. :obj:`-1`: it ends in -1, the only choice without
            :obj:`length`. (default: :obj:`"nearest"` with :obj:`length`, else :obj:`-1`)

    Returns:
        Spirals :obj:`[N, L]` (int64), filled up with -1 unless :obj:`fill="nearest"`.

    Raises:
        ValueError: If the mesh is not valid, a reference is no vertex, a number is not positive,
            arguments exclude each other, or the mesh has fewer than :obj:`length * dilation`
            vertices to fill from.
    """
    vertices, faces = check_mesh(vertices, faces)
    if not all(isinstance(n, int | np.integer) for n in (hops, dilation, length or 1)):
        raise TypeError(
            f"Expected 'hops', 'dilation' and 'length' to be integers (got {hops}, {dilation} and "
            f"{length})"
        )
    if min(hops, dilation, 1 if length is None else length) < 1:
        raise ValueError(
            f"Expected positive 'hops', 'dilation' and 'length' (got {hops}, {dilation} and "
            f"{length})"
        )
    if length is not None and (hops != 1 or truncate):
        raise ValueError("Expected either 'length' or 'hops' and 'truncate' (got both)")
    if fill is None:
        fill = GAP if length is None else "nearest"
    if fill not in ("nearest", GAP) or (length is None and fill != GAP):
        raise ValueError(
            f"Expected 'fill' to be -1 or, with 'length', 'nearest' (got {fill!r} and length "
            f"{length})"
        )
    enough = None if length is None else length * dilation
    if enough is not None and fill == "nearest" and len(vertices) < enough:
        raise ValueError(
            f"Expected a mesh of at least 'length' * 'dilation' = {enough} vertices to fill "
            f"spirals from (got {len(vertices)}): fill=-1 needs no more"
        )

    rings = _Rings(faces, len(vertices))
    graph = _edge_lengths(vertices, faces)
    start = _starts(graph, _references(vertices, graph, reference))
    spirals = []
    for vertex in range(len(vertices)):
        spiral = [vertex]
        for hop, ring in enumerate(rings.around(vertex, int(start[vertex])), start=1):
            if enough is not None:
                ring = [v for v in ring if v != GAP]
            spiral += ring
            if hop == hops if enough is None else len(spiral) >= enough:
                break
        spirals.append(spiral)
    if enough is not None and fill == "nearest":
        short = [vertex for vertex, spiral in enumerate(spirals) if len(spiral) < enough]
        for vertex, nearest in zip(short, _nearest(vertices, short, enough), strict=True):
            spirals[vertex] = nearest
    spirals = [spiral[::dilation] for spiral in spirals]

    lengths = np.array([len(spiral) for spiral in spirals])
    if length is None:
        length = int(lengths.max())
        if truncate:
            length = min(length, int(lengths.mean() + 2 * lengths.std()))
    out = np.full((len(spirals), length), GAP)
    for row, spiral in zip(out, spirals, strict=True):
        row[: len(spiral)] = spiral[:length]
    return out


def _nearest(vertices: ndarray, centres: list[int], count: int) -> list[list[int]]:
    # The vertices nearest to each centre, itself first, where others coincide with it too.
    from scipy.spatial import cKDTree

    if not centres:
        return []
    _, found = cKDTree(vertices).query(vertices[centres], k=np.arange(1, count + 1))
    rows = zip(centres, found.tolist(), strict=True)
    return [[centre, *[v for v in row if v != centre]][:count] for centre, row in rows]


class _Rings:
    # after[i][b] = c for every face (i, b, c): around vertex i, neighbour c follows neighbour b.
    # At a boundary, the last neighbour has none after it, and the order starts at first[i].
    def __init__(self, faces: ndarray, num_vertices: int):
        self.after: list[dict[int, int]] = [{} for _ in range(num_vertices)]
        for a, b, c in faces.tolist():
            self.after[a][b], self.after[b][c], self.after[c][a] = c, a, b
        self.first = [next(iter(after.keys() - set(after.values())), None) for after in self.after]

    def turn(self, vertex: int, start: int) -> Iterator[int]:
        # The neighbours of a vertex once around from one of them, with the gap of a boundary.
        after, current = self.after[vertex], start
        while True:
            yield current
            following = after.get(current)
            if following is None:
                yield GAP
                following = self.first[vertex]
                assert following is not None  # only a boundary has a last neighbour
            current = following
            if current == start:
                return

    def around(self, vertex: int, start: int) -> Iterator[list[int]]:
        # The rings of a vertex from the inside out.
        ring = list(self.turn(vertex, start))
        parent = {vertex: vertex} | dict.fromkeys(ring, vertex)
        while any(v != GAP for v in ring):
            yield ring
            ring = self._next(ring, parent)

    def _next(self, ring: list[int], parent: dict[int, int]) -> list[int]:
        # The vertices outside of a ring, along it: around each of its vertices, those that lie
        # between the vertices before and after it on the ring. Every vertex seen so far has a
        # parent, the vertex of the ring before around which it was found.
        outside, start = [], 0
        for i, vertex in enumerate(ring):
            before, behind = ring[i - 1], ring[(i + 1) % len(ring)]
            if vertex != GAP:
                entry = self._entry(vertex, before, parent[vertex])
                for neighbour in self.turn(vertex, entry):
                    if neighbour == behind and neighbour != entry:
                        break
                    if neighbour == GAP or neighbour not in parent:
                        outside.append(neighbour)
                        if neighbour != GAP:
                            parent[neighbour] = vertex
            elif outside[-1:] != [GAP]:
                outside.append(GAP)
            if i == 0 and GAP in (before, *outside[:1]):
                # No face outside of the ring's last step: start outside of its first one.
                start = max(len(outside) - 1, 0)
        outside = outside[start:] + outside[:start]
        return [v for i, v in enumerate(outside) if v != GAP or outside[i - 1 : i] != [GAP]]

    def _entry(self, vertex: int, before: int, parent: int) -> int:
        # Where the turn around a vertex of a ring starts: at the vertex before it on the ring.
        # Where rings close up or meet a boundary, that one may be no neighbour; its parent is.
        first, after = self.first[vertex], self.after[vertex]
        if before == GAP:
            return parent if first is None else first
        return before if before in after or before in after.values() else parent


def reference_vertices(
    vertices: ndarray, faces: ndarray, reference: Sequence[int] | None = None
) -> ndarray:
    r"""The reference vertices given and, for every component without one, the vertex farthest from
    the component's mean."""
    return _references(vertices, _edge_lengths(vertices, faces), reference)


def _references(vertices: ndarray, graph: csr_array, reference: Sequence[int] | None) -> ndarray:
    from scipy.sparse.csgraph import connected_components

    given = np.asarray([] if reference is None else reference).ravel()
    if len(given) > 0 and (
        not np.issubdtype(given.dtype, np.integer)
        or not 0 <= given.min() <= given.max() < len(vertices)
    ):
        raise ValueError(
            f"Expected 'reference' vertices from 0 to {len(vertices) - 1} (got {given.tolist()})"
        )
    given = given.astype(np.int64)
    _, component = connected_components(graph, directed=False)
    for label in np.setdiff1d(component, component[given]):
        members = np.flatnonzero(component == label)
        offset = vertices[members] - vertices[members].mean(axis=0)
        given = np.append(given, members[np.linalg.norm(offset, axis=1).argmax()])
    return given


def _edge_lengths(vertices: ndarray, faces: ndarray) -> csr_array:
    edge = edges(faces)
    length = np.linalg.norm(vertices[edge[:, 0]] - vertices[edge[:, 1]], axis=1)
    # An edge of no length would be no edge to the graph.
    length = np.maximum(length, np.finfo(float).tiny)
    return graph_of(edge, len(vertices), length)


def _starts(graph: csr_array, reference: ndarray) -> ndarray:
    # The neighbour of every vertex at which its spiral starts.
    from scipy.sparse.csgraph import dijkstra

    _, start, _ = dijkstra(
        graph, directed=False, indices=reference, return_predecessors=True, min_only=True
    )
    for vertex in reference:
        row = slice(graph.indptr[vertex], graph.indptr[vertex + 1])
        start[vertex] = graph.indices[row][graph.data[row].argmin()]
    return start
