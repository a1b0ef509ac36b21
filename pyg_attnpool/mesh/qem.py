r"""Mesh simplification that keeps original vertices, and the way back up."""

import warnings
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import ndarray

from pyg_attnpool.mesh.closest import closest_on_triangles, closest_points
from pyg_attnpool.mesh.graph import components
from pyg_attnpool.mesh.io import check_mesh, edges

BOUNDARY = 1.0  # weight of the planes that hold the boundary
FLAT = 1e-3  # weight of the distance moved, which decides where the surface is flat
MIN_COSINE = 0.2  # between the normals of a face before and after it changes
COSINES = (MIN_COSINE, 0.0, None)  # one after another, where the one before leads to no such count
FEW = 32  # vertices of a level for which several rules are tried
SWEEPS = 3  # of moving kept vertices to where the surface comes closer
SMALL = 4  # vertices of the smallest closed surface
CHUNK = 1 << 19  # pairs of a point and a face measured at a time


class FewestVertices(ValueError):
    r"""A vertex count is lower than that which collapses of edges lead to.

    Args:
        least (int): The latter.
        count (int): The vertices asked for.
        components (int): The components that share them.
    """

    def __init__(self, least: int, count: int, components: int):
        self.least = least
        super().__init__(
            f"Expected a level of at least {least} vertices for "
            f"{components} component{'s' * (components > 1)}, the fewest that collapses of edges "
            f"lead to (got {count})"
        )


def decimate(
    vertices: ndarray, faces: ndarray, num_vertices: Sequence[int], drop: bool = True
) -> list[tuple[ndarray, ndarray]]:
    r"""Simplifies a mesh by edge collapse in the order of the quadric error metric from the
    `"Surface Simplification Using Quadric Error Metrics"
    <https://www.cs.cmu.edu/~garland/Papers/quadrics.pdf>`_ paper.

    A collapse moves a vertex :math:`i` onto a neighbour :math:`j`, at the cost

    .. math::
        \mathbf{p}_j^{\top} (\mathbf{Q}_i + \mathbf{Q}_j) \mathbf{p}_j

    of the area-weighted squared distances to the planes of all faces gathered so far (and, at a
    boundary, to planes that stand on it), so that every coarse vertex is an original one. A
    collapse is refused where it would break the manifold (link condition), pull a boundary inwards
    or turn a face by more than 78° or away from the normals gathered at its corners. The last is
    given up only where nothing else leads to the count asked for; after that, whole components go,
    that first whose vertices are closest to what stays. A component of at most four vertices goes
    as well where it is closer to the others than it is wide, as an eyeball is to a head, and these,
    with its vertices, come closer to the original ones on average than with it. A warning tells
    which components end. Finally, kept vertices change places with
    neighbours of theirs where that brings the original vertices closer to the coarse surface.

    The result does not depend on the order of vertices and faces unless vertices coincide.

    Args:
        vertices (numpy.ndarray): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]` of an orientable manifold with or without
            boundary.
        num_vertices (list): The vertex count of every level wanted, from fine to coarse.
        drop (bool, optional): If :obj:`False`, a count too low for all components is an error.
            (default: :obj:`True`)

    Returns:
        For every level the kept vertices :obj:`[num_vertices]` as ascending indices into the level
        before it (the first: into the mesh), and its faces :obj:`[F', 3]`.

    Raises:
        ValueError: If the mesh is not valid, the counts do not descend, or there is no manifold of
            so few vertices (:class:`FewestVertices`).

    Example:
        >>> from pyg_attnpool.mesh import decimate
        >>> [len(vertices) for vertices, faces in decimate(*template, [161, 41])]
        [161, 41]
    """
    vertices, faces = check_mesh(vertices, faces)
    counts = [len(vertices), *num_vertices]
    if any(fine <= coarse for fine, coarse in pairwise(counts)):
        raise ValueError(
            f"Expected descending vertex counts below {len(vertices)} (got {list(num_vertices)})"
        )
    # In geometric order, so that neither ties nor rounding depend on the order of the input.
    order = np.lexsort(vertices.T[::-1])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    # Centred, at unit size: costs are fourth powers of lengths.
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    if not 0 < (high - low).max() < np.inf:
        raise ValueError(
            f"Expected vertices that are not all in one place, nor infinitely far apart "
            f"(got all from {low.tolist()} to {high.tolist()})"
        )
    points = (vertices[order] - (low + high) / 2) / (high - low).max()
    faces = _sorted_faces(rank[faces])
    quadrics = _quadrics(points, faces)

    levels = []
    kept = np.arange(len(vertices))
    for count in num_vertices:
        fine = faces
        # Rules that keep many faces from folding may cost several components of few vertices
        # more than they are worth: the rules are tried, and the closest surface is taken.
        several = count <= FEW and _components(fine).max() > 0
        found = [
            _simplified(points, fine, quadrics, count, drop, start)
            for start in range(len(COSINES) if several else 1)
        ]
        if several:
            found.sort(key=lambda way: closest_points(points, points, way[0])[2].mean())
        faces, quadrics = found[0]
        _tell_ends(fine, faces, order)
        survivors = np.sort(order[np.unique(faces)])
        index = np.searchsorted(kept, survivors)
        levels.append((index, _sorted_faces(np.searchsorted(survivors, order[faces]))))
        kept = survivors
    return levels


def _simplified(
    points: ndarray, fine: ndarray, quadrics: ndarray, count: int, drop: bool, start: int
) -> tuple[ndarray, ndarray]:
    # The faces and quadrics of a level, from a rule of COSINES on.
    faces, quadrics = _collapse(points, fine, quadrics, count, drop, start)
    for _ in range(SWEEPS):
        moved = _better_vertices(points, quadrics[:, 10:], fine, faces)
        faces, quadrics = moved[faces], quadrics[moved]
    return faces, quadrics


def _collapse(
    points: ndarray, faces: ndarray, quadrics: ndarray, count: int, drop: bool, start: int
) -> tuple[ndarray, ndarray]:
    # The faces and quadrics of a mesh of `count` vertices; vertices keep their numbers.
    remaining = faces
    left, found, sums = _collapse_edges(points, remaining, quadrics, count, start)
    while left > count:
        components = _components(remaining)
        remaining = remaining[components != _cheapest(points, remaining, found)[0]]
        if not drop or len(np.unique(remaining)) < count:
            raise FewestVertices(left, count, int(components.max()) + 1)
        left, found, sums = _collapse_edges(points, remaining, quadrics, count, start)

    # A component at its last vertices may be worth less than they are to the others.
    distance = None
    while (components := _components(found)).max() > 0:
        smallest = np.bincount(components).argmin()
        if len(np.unique(found[components == smallest])) > SMALL:
            break
        component, away = _cheapest(points, remaining, found)
        ends = _components(remaining) == component
        fewer = remaining[~ends]
        width = np.ptp(points[remaining[ends]].reshape(-1, 3), axis=0).max()
        if away > width or len(np.unique(fewer)) < count:
            break
        left, other, other_sums = _collapse_edges(points, fewer, quadrics, count, start)
        if distance is None:
            distance = closest_points(points, points, found)[2].mean()
        other_distance = closest_points(points, points, other)[2].mean()
        if left > count or other_distance >= distance:
            break
        remaining, found, sums, distance = fewer, other, other_sums, other_distance
    return found, sums


def _cheapest(points: ndarray, fine: ndarray, coarse: ndarray) -> tuple[int, float]:
    # The component of the fine mesh whose vertices are closest, by the sum of their distances, to
    # the coarse surface of the others, and their mean distance.
    components = _components(fine)
    label = np.full(len(points), -1)
    label[fine] = components[:, None]
    cost = np.full(components.max() + 1, np.inf)
    for component in range(len(cost)):
        others = coarse[label[coarse[:, 0]] != component]
        if len(others) > 0:
            cost[component] = closest_points(points[label == component], points, others)[2].sum()
    cheapest = int(cost.argmin())
    return cheapest, float(cost[cheapest] / (label == cheapest).sum())


def _tell_ends(fine: ndarray, coarse: ndarray, order: ndarray) -> None:
    # Which components of a level do not reach the next, each by one of its vertices.
    components = _components(fine)
    reached = np.isin(fine, coarse).any(axis=1)
    ended = np.setdiff1d(components, components[reached])
    if len(ended) > 0:
        named = [int(order[fine[components == c]].min()) for c in ended]
        shown = ", ".join(map(str, sorted(named)[:8])) + ", ..." * (len(named) > 8)
        warnings.warn(
            f"{len(ended)} of {components.max() + 1} components end before the level of "
            f"{len(np.unique(coarse))} vertices, those of vertices {shown}: it is too "
            f"small for all, or serves the others better",
            stacklevel=3,
        )


def _collapse_edges(
    points: ndarray, faces: ndarray, quadrics: ndarray, count: int, start: int
) -> tuple[int, ndarray, ndarray]:
    # The ring of vertex i says for each of its faces (i, b, c): after neighbour b comes c.
    ring: list[dict[int, int]] = [{} for _ in points]
    for a, b, c in faces.tolist():
        ring[a][b], ring[b][c], ring[c][a] = c, a, b
    boundary = [r.keys() != set(r.values()) for r in ring]
    p, q = list(map(tuple, points.tolist())), list(map(tuple, quadrics.tolist()))
    version = [0] * len(points)  # of the quadric of a vertex; the collapses of an older one expired
    left = sum(map(bool, ring))

    heap = _candidates(points, faces, quadrics)
    for min_cosine in COSINES[start:]:
        blocked: dict[tuple[int, int], tuple[float, int, int, int]] = {}
        heapify(heap)
        while heap and left > count:
            entry = heappop(heap)
            _, i, j, stamp = entry
            if not ring[i] or not ring[j] or stamp != version[i] + version[j]:
                continue
            if not _keeps_manifold(ring, boundary, i, j) or (
                min_cosine is not None and not _keeps_turn(ring, p, q, i, j, min_cosine)
            ):
                blocked[i, j] = entry
                continue
            _move(ring, i, j)
            left -= 1
            q[j] = tuple(map(float.__add__, q[i], q[j]))
            version[j] += 1
            around = ring[j].keys() | ring[j].values()
            for k in around:
                stamp = version[j] + version[k]
                heappush(heap, (_cost(q[k], q[j], p[j]), k, j, stamp))
                heappush(heap, (_cost(q[j], q[k], p[k]), j, k, stamp))
                # What was refused at a neighbour may be allowed now.
                for other in ring[k].keys() | ring[k].values():
                    for pair in ((k, other), (other, k)):
                        if pair in blocked:
                            heappush(heap, blocked.pop(pair))
        if left == count:
            break
        heap = list(blocked.values())

    corners = [(a, b, c) for a, r in enumerate(ring) for b, c in r.items() if a < b and a < c]
    return left, np.array(corners, dtype=np.int64), np.array(q)


def _candidates(points: ndarray, faces: ndarray, quadrics: ndarray) -> list:
    i, j = edges(faces).T
    cost = _cost(quadrics[i].T, quadrics[j].T, points[j].T)
    return list(zip(cost.tolist(), i.tolist(), j.tolist(), [0] * len(i), strict=True))


def _cost(q: Any, r: Any, p: Any) -> Any:
    # p'(Q + R)p of two symmetric 4 x 4 matrices, given by their upper triangles.
    x, y, z = p
    return (
        (q[0] + r[0]) * x * x
        + (q[4] + r[4]) * y * y
        + (q[7] + r[7]) * z * z
        + (q[9] + r[9])
        + 2
        * (
            ((q[1] + r[1]) * y + (q[2] + r[2]) * z + (q[3] + r[3])) * x
            + ((q[5] + r[5]) * z + (q[6] + r[6])) * y
            + (q[8] + r[8]) * z
        )
    )


def _keeps_manifold(ring: list, boundary: list, i: int, j: int) -> bool:
    # The link condition of Dey, Edelsbrunner, Guha and Nekhayev, with a boundary closed by a
    # vertex of its own.
    opposite = {ring[i].get(j), ring[j].get(i)} - {None}
    if boundary[i] and not (boundary[j] and len(opposite) == 1):
        return False  # a boundary would be pulled inwards or pinched
    around_i = ring[i].keys() | ring[i].values()
    around_j = ring[j].keys() | ring[j].values()
    if around_i & around_j != opposite:
        return False
    # A tetrahedron or a triangle alone would leave no surface.
    to_boundary = boundary[j] and not boundary[i]
    return to_boundary or len(around_i | around_j) > 2 + len(opposite)


def _keeps_turn(ring: list, p: list, q: list, i: int, j: int, min_cosine: float) -> bool:
    # Whether no face of i vanishes, turns too far or turns away from the normals gathered at its
    # corners when i moves to j.
    xi, yi, zi = p[i]
    xj, yj, zj = p[j]
    gathered = [q[i][k] + q[j][k] for k in (10, 11, 12)]
    for b, c in ring[i].items():
        if b == j or c == j:
            continue
        xb, yb, zb = p[b]
        ux, uy, uz = p[c]
        ux, uy, uz = ux - xb, uy - yb, uz - zb
        vx, vy, vz = xi - xb, yi - yb, zi - zb
        wx, wy, wz = xj - xb, yj - yb, zj - zb
        ax, ay, az = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        bx, by, bz = uy * wz - uz * wy, uz * wx - ux * wz, ux * wy - uy * wx
        before, after = ax * ax + ay * ay + az * az, bx * bx + by * by + bz * bz
        if before > 0 and ax * bx + ay * by + az * bz <= min_cosine * (before * after) ** 0.5:
            return False
        for nx, ny, nz in (gathered, q[b][10:], q[c][10:]):
            if nx * bx + ny * by + nz * bz <= 0:
                return False
    return True


def _move(ring: list, i: int, j: int) -> None:
    around = ring[i]
    ring[i] = {}
    after, before = around.pop(j, None), ring[j].pop(i, None)
    if after is not None:  # the face (i, j, after) vanishes
        del ring[j][after], ring[after][i]
    if before is not None:  # the face (i, before, j) vanishes
        del around[before], ring[before][j]
    for b, c in around.items():
        del ring[c][i]
        ring[j][b], ring[b][c], ring[c][j] = c, j, b


def _better_vertices(points: ndarray, normals: ndarray, fine: ndarray, coarse: ndarray) -> ndarray:
    # Where a kept vertex should change places with a neighbour on the fine mesh, so that the
    # original vertices come closer to the coarse surface: a permutation of the vertices.
    num_vertices = len(points)
    face, _, distance = closest_points(points, points, coarse)
    moves = _moves(fine, coarse, num_vertices)
    if len(moves) == 0:
        return np.arange(num_vertices)

    # Every face of the vertex that moves, before and after.
    at_vertex = _Groups(coarse.ravel(), num_vertices)
    corner, move = at_vertex.members(moves[:, 0])
    before = coarse[corner // 3]
    after = before.copy()
    after[np.arange(len(after)), corner % 3] = moves[move, 1]
    old_normal, new_normal = _normals(points, before), _normals(points, after)
    length = np.linalg.norm(old_normal, axis=1) * np.linalg.norm(new_normal, axis=1)
    turned = (old_normal * new_normal).sum(axis=1) <= MIN_COSINE * length
    for at_corner in normals[before].swapaxes(0, 1):
        length = np.linalg.norm(at_corner, axis=1) * np.linalg.norm(new_normal, axis=1)
        turned |= (at_corner * new_normal).sum(axis=1) <= MIN_COSINE * length
    allowed = np.bincount(move[turned], minlength=len(moves)) == 0

    # The points closest to these faces, and how much closer the faces come to them.
    on_face, of_move = _Groups(face, len(coarse)), _Groups(move, len(moves))
    gain = np.full(len(moves), -np.inf)
    candidates = np.flatnonzero(allowed)
    pairs = (on_face.count[corner // 3] * of_move.count[move]).cumsum()
    ends = move[np.searchsorted(pairs, np.arange(CHUNK, pairs[-1], CHUNK))]
    for chunk in np.split(candidates, np.searchsorted(candidates, ends)):
        row, owner = of_move.members(chunk)
        point, at = on_face.members(corner[row] // 3)
        owner = owner[at]
        if len(point) == 0:
            continue
        row, pair = of_move.members(chunk[owner])
        _, square = closest_on_triangles(points[point[pair]], *points[after[row]].swapaxes(0, 1))
        starts = np.searchsorted(pair, np.arange(len(point)))
        closer = distance[point] - np.sqrt(np.minimum.reduceat(square, starts))
        gain[chunk] = np.bincount(owner, closer, minlength=len(chunk))

    # The best moves of vertices that share no face.
    moved, fixed = np.arange(num_vertices), np.zeros(num_vertices, dtype=bool)
    for m in np.argsort(-gain, kind="stable"):
        source, target = moves[m]
        if gain[m] <= 1e-12:
            break
        if not fixed[source] and not fixed[target]:
            moved[source], moved[target] = target, source
            fixed[coarse[at_vertex.members(moves[m, :1])[0] // 3]] = True
            fixed[target] = True
    return moved


def _moves(fine: ndarray, coarse: ndarray, num_vertices: int) -> ndarray:
    # Edges of the fine mesh from a kept vertex to one that is not; from and along boundaries only
    # to and along boundaries.
    source, target = fine.ravel(), np.roll(fine, -1, axis=1).ravel()
    inner = np.isin(source * num_vertices + target, target * num_vertices + source)
    on_boundary = np.zeros(num_vertices, dtype=bool)
    on_boundary[source[~inner]] = on_boundary[target[~inner]] = True
    kept = np.zeros(num_vertices, dtype=bool)
    kept[coarse] = True
    edge = np.stack([source, target], axis=1)
    edge = edge[~inner | ~(on_boundary[source] | on_boundary[target])]
    edge = np.unique(np.concatenate([edge, edge[:, ::-1]]), axis=0)
    return edge[kept[edge[:, 0]] & ~kept[edge[:, 1]]]


class _Groups:
    # The members of every group, for an array that says which group each element is in.
    def __init__(self, group: ndarray, num_groups: int):
        self.order = np.argsort(group, kind="stable")
        self.count = np.bincount(group, minlength=num_groups)
        self.start = self.count.cumsum() - self.count

    def members(self, groups: ndarray) -> tuple[ndarray, ndarray]:
        # The members of the groups asked for, one after another, and the place of each one's group
        # among those asked for.
        count = self.count[groups]
        place = np.repeat(np.arange(len(groups)), count)
        offset = np.arange(len(place)) - np.repeat(count.cumsum() - count, count)
        return self.order[self.start[groups][place] + offset], place


def _components(faces: ndarray) -> ndarray:
    # The component of every face, from 0 without gaps.
    used, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    return components(np.concatenate([faces[:, :2], faces[:, 1:]]), len(used))[faces[:, 0]]


def _normals(points: ndarray, faces: ndarray) -> ndarray:
    # Of twice the area of the face in length.
    a, b, c = (points[faces[:, i]] for i in range(3))
    return np.cross(b - a, c - a)


def _quadrics(points: ndarray, faces: ndarray) -> ndarray:
    # The upper triangle of every vertex's quadric, and its normal of area in length [N, 13].
    normal = _normals(points, faces)
    area = np.linalg.norm(normal, axis=1) / 2
    normal = normal / np.maximum(2 * area, np.finfo(float).tiny)[:, None]
    quadrics = np.zeros((len(points), 10))
    for corner in range(3):
        np.add.at(quadrics, faces[:, corner], _planes(normal, points[faces[:, 0]], area / 3))

    # A boundary edge gets the plane that stands on it, with the square of its length.
    source, target = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    once = ~np.isin(source * len(points) + target, target * len(points) + source)
    edge = points[target[once]] - points[source[once]]
    length = np.linalg.norm(edge, axis=1)
    outward = np.cross(edge, np.repeat(normal, 3, axis=0)[once])
    outward /= np.maximum(np.linalg.norm(outward, axis=1), np.finfo(float).tiny)[:, None]
    planes = _planes(outward, points[source[once]], BOUNDARY * length**2)
    for end in (source[once], target[once]):
        np.add.at(quadrics, end, planes)

    # In the plane no plane quadric decides; the squared distance to the vertex itself does.
    weight = FLAT * np.bincount(faces.ravel(), np.repeat(area / 3, 3), minlength=len(points))
    for axis in np.eye(3):
        quadrics += _planes(np.broadcast_to(axis, points.shape), points, weight)
    normals = np.zeros_like(points)
    np.add.at(normals, faces.ravel(), np.repeat(normal * area[:, None], 3, axis=0))
    return np.column_stack([quadrics, normals])


def _planes(normal: ndarray, point: ndarray, weight: ndarray) -> ndarray:
    plane = np.column_stack([normal, -(normal * point).sum(axis=1)])
    row, col = np.triu_indices(4)
    return weight[:, None] * plane[:, row] * plane[:, col]


def _sorted_faces(faces: ndarray) -> ndarray:
    # Faces that start at their smallest vertex, in ascending order.
    start = faces.argmin(axis=1)[:, None]
    faces = np.take_along_axis(faces, (start + np.arange(3)) % 3, axis=1)
    return faces[np.lexsort(faces.T[::-1])]
