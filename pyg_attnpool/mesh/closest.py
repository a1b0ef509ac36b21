r"""Closest points on a triangle mesh, exactly."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy import ndarray

from pyg_attnpool.ops.closest import available, near_faces

CHUNK = 1 << 14  # points searched at a time
PAIRS = 1 << 17  # of a point and a face, measured at a time


def barycentric_mapping(
    points: ndarray, vertices: ndarray, faces: ndarray
) -> tuple[ndarray, ndarray]:
    r"""The closest point on a mesh to every given point, in barycentric coordinates.

    Args:
        points (numpy.ndarray): Points :obj:`[M, 3]`.
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.

    Returns:
        The vertices of the triangle that holds the closest point :obj:`[M, 3]`, and their weights
        :obj:`[M, 3]`: non-negative and summing to one.

    Raises:
        TypeError: If points or vertices are not floating point, or faces no integers.
        ValueError: If a shape is wrong, a coordinate is not finite, or there is no face.

    Example:
        >>> import numpy as np
        >>> from pyg_attnpool.mesh import barycentric_mapping
        >>> vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        >>> points = np.array([[0.25, 0.25, 3]])
        >>> index, weight = barycentric_mapping(points, vertices, np.array([[0, 1, 2]]))
        >>> index.tolist(), weight.tolist()
        ([[0, 1, 2]], [[0.5, 0.25, 0.25]])
    """
    points, vertices, faces = np.asarray(points), np.asarray(vertices), np.asarray(faces)
    for name, array in (("points", points), ("vertices", vertices), ("faces", faces)):
        kind = np.integer if name == "faces" else np.floating
        if not np.issubdtype(array.dtype, kind):
            raise TypeError(f"Expected '{name}' of {kind.__name__} numbers (got {array.dtype})")
        if array.ndim != 2 or array.shape[1] != 3 or not np.isfinite(array).all():
            raise ValueError(
                f"Expected '{name}' of shape [*, 3] and finite (got {list(array.shape)})"
            )
    if len(faces) == 0 or faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"Expected faces of vertices 0 to {len(vertices) - 1} (got {len(faces)} faces, "
            f"{faces.min(initial=0)} to {faces.max(initial=0)})"
        )
    points, vertices = points.astype(np.float64), vertices.astype(np.float64)
    face, weight, _ = closest_points(points, vertices, faces)
    return faces[face], weight


def closest_points(
    points: ndarray, vertices: ndarray, faces: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    r"""The face :obj:`[M]` that is closest to every point :obj:`[M, 3]`, the barycentric weights
    :obj:`[M, 3]` of the closest point on it, and the distance :obj:`[M]`. Of equally close faces
    the first is taken. Memory is that of a fixed number of pairs, or of all faces for one point.
    """
    if not (np.isfinite(points).all() and np.isfinite(vertices).all()):
        raise ValueError("Expected finite points and vertices (got NaN or infinity)")
    # Of a size whose fourth powers are numbers, by a power of two, which rounds nothing.
    _, exponent = np.frexp(max(np.abs(points).max(initial=0), np.abs(vertices).max()))
    scale = 2.0 ** np.clip(-256 * np.round(exponent / 256), -1000, 1000)
    points, vertices = scale * points, scale * vertices
    corners = vertices[faces]
    face = np.empty(len(points), dtype=np.int64)
    weight, distance = np.empty((len(points), 3)), np.empty(len(points))
    for rows, at, hit in (_by_tree if available() else _by_centres)(points, vertices, faces):
        found, square = closest_on_triangles(points[at], *corners[hit].swapaxes(0, 1))
        order = np.lexsort((hit, square, at))
        best = order[np.searchsorted(at[order], rows)]
        face[rows], weight[rows], distance[rows] = hit[best], found[best], np.sqrt(square[best])
    return face, weight, distance / scale


Candidates = Iterator[tuple[ndarray, ndarray, ndarray]]


def _by_tree(points: ndarray, vertices: ndarray, faces: ndarray) -> Candidates:
    # Points, and pairs of these with the faces that may be closest. A compiled tree of boxes finds
    # those which are, up to rounding.
    every, x, triangles = (
        torch.from_numpy(np.ascontiguousarray(array))
        for array in (points, vertices, faces.astype(np.int64))
    )
    start = 0
    while start < len(points):
        done, at, hit = near_faces(every[start:], x, triangles, max(len(faces), PAIRS))
        yield np.arange(start, start + done), start + at.numpy(), hit.numpy()
        start += done


def _by_centres(points: ndarray, vertices: ndarray, faces: ndarray) -> Candidates:
    # The same without the compiled library. A face is worth measuring if its box reaches into the
    # sphere around the point that touches the closest vertex. Faces of like size share a k-d tree
    # of their centres.
    from scipy.spatial import cKDTree

    corners = vertices[faces]
    low, high = corners.min(axis=1), corners.max(axis=1)
    centre = corners.mean(axis=1)
    radius = np.linalg.norm(corners - centre[:, None], axis=2).max(axis=1)
    _, octave = np.frexp(radius)
    groups = [np.flatnonzero(octave == o) for o in np.unique(octave)]
    trees = [(group, cKDTree(centre[group]), radius[group].max()) for group in groups]
    used = cKDTree(vertices[np.unique(faces)])
    for start in range(0, len(points), CHUNK):
        chunk = points[start : start + CHUNK]
        # A little more, so that rounding leaves no face out.
        reach = used.query(chunk)[0] * (1 + 1e-9) + 1e-12 * radius.max()
        count = np.zeros(len(chunk), dtype=np.int64)
        for _, tree, largest in trees:
            count += tree.query_ball_point(chunk, reach + largest, return_length=True)
        piece = (count.cumsum() - count) // PAIRS
        for rows in np.split(np.arange(len(chunk)), np.flatnonzero(np.diff(piece)) + 1):
            pairs = [
                (np.repeat(rows, [len(h) for h in hits]), group[np.concatenate(hits).astype(int)])
                for group, tree, largest in trees
                for hits in [tree.query_ball_point(chunk[rows], reach[rows] + largest)]
            ]
            at, hit = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
            gap = np.maximum(np.maximum(low[hit] - chunk[at], chunk[at] - high[hit]), 0)
            near = _dot(gap, gap) <= reach[at] ** 2
            yield start + rows, start + at[near], hit[near]


def closest_on_triangles(p: ndarray, a: ndarray, b: ndarray, c: ndarray) -> tuple[ndarray, ndarray]:
    r"""Barycentric weights :obj:`[M, 3]` of the point of triangle :math:`abc` that is closest to
    :math:`p`, all :obj:`[M, 3]`, and its squared distance :obj:`[M]`. A degenerate triangle is
    its edges."""
    ab, ac, ap = b - a, c - a, p - a
    bb, bc, cc, pb, pc = (_dot(u, v) for u, v in ((ab, ab), (ab, ac), (ac, ac), (ap, ab), (ap, ac)))
    det = bb * cc - bc * bc
    with np.errstate(divide="ignore", invalid="ignore"):
        v, w = (cc * pb - bc * pc) / det, (bb * pc - bc * pb) / det
        inside = (det > 0) & (v >= 0) & (w >= 0) & (v + w <= 1)
    v, w = np.where(inside, v, 0), np.where(inside, w, 0)
    weight = np.stack([np.maximum(1 - v - w, 0), v, w], axis=1)  # rounded below zero otherwise
    offset = ap - v[:, None] * ab - w[:, None] * ac
    square = np.where(inside, _dot(offset, offset), np.inf)
    for i, j, start, end in ((0, 1, a, b), (1, 2, b, c), (2, 0, c, a)):
        edge = end - start
        t = _dot(p - start, edge) / np.maximum(_dot(edge, edge), np.finfo(float).tiny)
        t = np.clip(t, 0, 1)
        offset = p - start - t[:, None] * edge
        edge_square = _dot(offset, offset)
        closer = edge_square < square
        square[closer] = edge_square[closer]
        weight[closer] = 0
        weight[closer, i], weight[closer, j] = 1 - t[closer], t[closer]
    return weight, square


def _dot(a: ndarray, b: ndarray) -> ndarray:
    return np.einsum("ij,ij->i", a, b)
