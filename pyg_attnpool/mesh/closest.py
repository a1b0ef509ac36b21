r"""Closest points on a triangle mesh, exactly."""

import numpy as np
from numpy import ndarray

CHUNK = 1 << 14  # points searched at a time


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
    """
    face, weight, _ = closest_points(points, vertices, faces)
    return faces[face], weight


def closest_points(
    points: ndarray, vertices: ndarray, faces: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    r"""The face :obj:`[M]` that is closest to every point :obj:`[M, 3]`, the barycentric weights
    :obj:`[M, 3]` of the closest point on it, and the distance :obj:`[M]`. Of equally close faces
    the first is taken.

    A face is worth looking at if the sphere around it reaches into the sphere around the point
    that touches the closest vertex. Faces of like size share a k-d tree of their centres.
    """
    from scipy.spatial import cKDTree

    corners = vertices[faces]
    centre = corners.mean(axis=1)
    radius = np.linalg.norm(corners - centre[:, None], axis=2).max(axis=1)
    _, octave = np.frexp(radius)
    groups = [np.flatnonzero(octave == o) for o in np.unique(octave)]
    trees = [(group, cKDTree(centre[group]), radius[group].max()) for group in groups]
    used = cKDTree(vertices[np.unique(faces)])

    results = []
    for start in range(0, len(points), CHUNK):
        chunk = points[start : start + CHUNK]
        # A little more, so that rounding leaves no face out.
        reach = used.query(chunk)[0] * (1 + 1e-9) + 1e-12 * radius.max()
        points_hit, faces_hit = [], []
        for group, tree, largest in trees:
            hits = tree.query_ball_point(chunk, reach + largest)
            count = np.fromiter(map(len, hits), dtype=np.int64, count=len(chunk))
            points_hit.append(np.repeat(np.arange(len(chunk)), count))
            faces_hit.append(group[np.concatenate(hits).astype(np.int64)])
        point, face = np.concatenate(points_hit), np.concatenate(faces_hit)
        weight, square = closest_on_triangles(chunk[point], *corners[face].swapaxes(0, 1))
        order = np.lexsort((face, square, point))
        best = order[np.searchsorted(point[order], np.arange(len(chunk)))]
        results.append((face[best], weight[best], np.sqrt(square[best])))
    found, weights, distances = zip(*results, strict=True)
    return np.concatenate(found), np.concatenate(weights), np.concatenate(distances)


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
    weight = np.stack([1 - v - w, v, w], axis=1)
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
