from pathlib import Path

import numpy as np
import pytest

from pyg_attnpool.mesh import MeshHierarchy, check_mesh, spiral_sequences
from tests.mesh.meshes import blob, icosphere, join, torus

GOLDEN = np.load(Path(__file__).parents[1] / "golden/spirals.npz", allow_pickle=False)


@pytest.mark.parametrize("kind", ["closed", "open"])
@pytest.mark.parametrize("hops", [1, 2])
def test_spirals_of_the_authors(kind, hops):
    vertices, faces = GOLDEN[f"{kind}_vertices"], GOLDEN[f"{kind}_faces"]
    expected = GOLDEN[f"{kind}_spiral_hop{hops}"]
    got = spiral_sequences(vertices, faces, hops, GOLDEN[f"{kind}_reference"])
    assert got.shape[1] == GOLDEN[f"{kind}_length_hop{hops}"].max() <= expected.shape[1]
    expected, rest = expected[:, : got.shape[1]], expected[:, got.shape[1] :]
    assert (rest == -1).all()
    same_set = np.sort(got, axis=1) == np.sort(expected, axis=1)
    assert same_set.all()
    share = {("closed", 2): 0.98, ("open", 2): 0.95}.get((kind, hops), 1)
    assert (got == expected).all(axis=1).mean() >= share


def distances(faces, num_vertices):
    r"""Edges between any two vertices, by repeated products of the dense adjacency."""
    adjacency = np.eye(num_vertices, dtype=bool)
    for shift in (1, 2):
        adjacency[faces, np.roll(faces, shift, axis=1)] = True
    distance, reach = np.full((num_vertices, num_vertices), 99), np.eye(num_vertices, dtype=bool)
    for hop in range(10):
        distance[reach & (distance == 99)] = hop
        reach = reach @ adjacency
    return distance


MESHES = {
    "closed": blob(2, seed=0),
    "open": blob(2, seed=1, hole=True),
    "torus": torus(9, 7),
    "parts": join(icosphere(1), blob(1, seed=2)),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_rings_hold_every_vertex_once_in_order_of_distance(name, hops):
    vertices, faces = MESHES[name]
    distance = distances(faces, len(vertices))
    for vertex, row in enumerate(spiral_sequences(vertices, faces, hops)):
        row = row[row >= 0]
        assert row[0] == vertex
        assert sorted(row) == np.flatnonzero(distance[vertex] <= hops).tolist()
        assert (np.diff(distance[vertex][row]) >= 0).all()


@pytest.mark.parametrize("name", MESHES)
def test_first_ring_turns_with_the_faces(name):
    vertices, faces = MESHES[name]
    halfedges = {(a, b) for t in faces.tolist() for a, b in zip(t, t[1:] + t[:1], strict=True)}
    triangles = {tuple(np.roll(t, k).tolist()) for t in faces for k in range(3)}
    for vertex, *ring in spiral_sequences(vertices, faces, 1).tolist():
        length = max(i for i, v in enumerate(ring) if v >= 0) + 1
        is_open = any((vertex, v) in halfedges and (v, vertex) not in halfedges for v in ring)
        cycle = ring[: length + (is_open and -1 not in ring[:length])]
        assert cycle.count(-1) == is_open
        for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            assert -1 in (a, b) or (vertex, a, b) in triangles
    # Turned inside out, spirals turn the other way.
    turned = spiral_sequences(vertices, faces[:, ::-1], 1)
    for (_, *ring), (_, *other) in zip(
        spiral_sequences(vertices, faces, 1).tolist(), turned.tolist(), strict=True
    ):
        inside = [v for v in ring if v >= 0]
        other = [v for v in other if v >= 0]
        assert inside[:1] + inside[:0:-1] == other


def test_starts_lead_to_the_reference():
    vertices, faces = MESHES["open"]
    start = spiral_sequences(vertices, faces, 1, reference=[17])[:, 1]
    for vertex in range(len(vertices)):
        if vertex == 17:
            continue
        steps = 0
        while vertex != 17:  # would go in circles otherwise
            vertex, steps = start[vertex], steps + 1
            assert steps < len(vertices)
    neighbours = np.flatnonzero(distances(faces, len(vertices))[17] == 1)
    lengths = np.linalg.norm(vertices[neighbours] - vertices[17], axis=1)
    assert start[17] == neighbours[lengths.argmin()]


def test_every_component_has_a_reference():
    vertices, faces = MESHES["parts"]
    offset = np.linalg.norm(vertices[42:] - vertices[42:].mean(axis=0), axis=1)
    rule = 42 + offset.argmax()
    np.testing.assert_array_equal(
        spiral_sequences(vertices, faces, 2, reference=[5]),
        spiral_sequences(vertices, faces, 2, reference=[5, rule]),
    )


def test_fixed_length_dilation_and_truncation():
    vertices, faces = MESHES["open"]
    two_rings = spiral_sequences(vertices, faces, 2)
    np.testing.assert_array_equal(
        spiral_sequences(vertices, faces, 2, dilation=2), two_rings[:, ::2]
    )
    fixed = spiral_sequences(vertices, faces, length=9)
    for row, whole in zip(fixed, spiral_sequences(vertices, faces, 4), strict=True):
        np.testing.assert_array_equal(row, whole[whole >= 0][:9])
    dilated = spiral_sequences(vertices, faces, length=5, dilation=3)
    for row, whole in zip(dilated, spiral_sequences(vertices, faces, 5), strict=True):
        np.testing.assert_array_equal(row, whole[whole >= 0][:13:3])
    lengths = np.array([len(np.trim_zeros(row + 1, "b")) for row in two_rings])
    cut = spiral_sequences(vertices, faces, 2, truncate=True)
    assert cut.shape[1] <= two_rings.shape[1]
    assert abs(cut.shape[1] - (lengths.mean() + 2 * lengths.std())) < 1.5
    np.testing.assert_array_equal(cut, two_rings[:, : cut.shape[1]])


def test_too_small_a_component_is_filled_up():
    vertices, faces = join(icosphere(1), (np.eye(4)[:, :3], np.array([[0, 1, 2], [0, 2, 3]])))
    spirals = spiral_sequences(vertices, faces, length=9, fill=-1)
    assert (spirals[:42] >= 0).all()
    np.testing.assert_array_equal(spiral_sequences(vertices, faces, length=9)[:42], spirals[:42])
    for vertex, row in enumerate(spirals[42:], start=42):
        assert row[0] == vertex and sorted(row[:4]) == [42, 43, 44, 45]
        assert (row[4:] == -1).all()
    # By default from the nearest vertices of the whole mesh, as SpiralNet++ does.
    for dilation in (1, 2):
        filled = spiral_sequences(vertices, faces, length=9, dilation=dilation)
        distance = np.linalg.norm(vertices[:, None] - vertices, axis=2)
        for vertex in range(42, 46):
            nearest = distance[vertex].argsort(kind="stable")[: 9 * dilation : dilation]
            got = distance[vertex, filled[vertex]]
            assert filled[vertex, 0] == vertex
            np.testing.assert_allclose(got, distance[vertex, nearest])


RING = [[0, 2], [2, 1], [1, 3], [3, 0]]
SMALL = {
    "tetrahedron": (np.eye(4)[:, :3], np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])),
    "octahedron": (
        np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1.0]]),
        np.array(
            [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
        ),
    ),
    "triangle": (np.eye(3), np.array([[0, 1, 2]])),
    "strip": (
        np.array([[i / 2, i % 2, 0] for i in range(9)]),
        np.array([[i, i + 1 + i % 2, i + 2 - i % 2] for i in range(7)]),
    ),
    "icosphere 0": icosphere(0),
    "icosphere 1": icosphere(1),
    "icosphere 2": icosphere(2),
    "open": blob(1, seed=0, hole=True),
}


def torn(seed):
    r"""A closed surface without a random third of its faces, where a manifold is left."""
    vertices, faces = [icosphere(0), icosphere(1), torus(4, 3), torus(5, 4)][seed % 4]
    rng = np.random.default_rng(seed)
    kept = np.zeros((0, 3), dtype=int)
    for face in faces[rng.permutation(len(faces))[: 2 * len(faces) // 3]]:
        more = np.concatenate([kept, face[None]])
        used = np.unique(more)
        try:
            check_mesh(vertices[used], np.searchsorted(used, more))
            kept = more
        except ValueError:
            pass
    used = np.unique(kept)
    return vertices[used], np.searchsorted(used, kept)


@pytest.mark.parametrize("name", [*SMALL, *range(12)])
def test_rings_end_where_the_mesh_ends(name):
    vertices, faces = SMALL[name] if name in SMALL else torn(name)
    n = len(vertices)
    adjacency = np.eye(n, dtype=bool)
    adjacency[faces, np.roll(faces, 1, axis=1)] = adjacency[np.roll(faces, 1, axis=1), faces] = True
    reach = np.eye(n, dtype=bool)
    for hops in range(1, 13):
        reach = reach @ adjacency
        spirals = spiral_sequences(vertices, faces, hops=hops)
        for vertex, row in enumerate(spirals):
            members = row[row >= 0]
            assert len(set(members)) == len(members) and row[0] == vertex
            assert set(members) == set(np.flatnonzero(reach[vertex]))
    for fill in (-1, "nearest"):
        spirals = spiral_sequences(vertices, faces, length=n, fill=fill)
        for vertex, row in enumerate(spirals):
            whole = fill == "nearest" or reach[vertex].all()
            members = np.arange(n) if whole else np.flatnonzero(reach[vertex])
            np.testing.assert_array_equal(np.sort(row[row >= 0]), members)
    beyond = spiral_sequences(vertices, faces, length=n + 3, fill=-1)
    assert (beyond[:, n:] == -1).all()
    with pytest.raises(ValueError, match="at least 'length'"):
        spiral_sequences(vertices, faces, length=n + 1)


def test_hierarchy_carries_the_reference_to_the_nearest_vertex():
    vertices, faces = blob(3, seed=3)
    hierarchy = MeshHierarchy.from_template((vertices, faces), factors=[4, 4])
    farthest = np.linalg.norm(vertices - vertices.mean(axis=0), axis=1).argmax()
    for level in range(3):
        coarse = hierarchy.vertices[level]
        for kwargs, reference in (
            (dict(hops=2, dilation=2, reference=[100]), 100),
            (dict(length=7), farthest),
        ):
            nearest = np.linalg.norm(coarse - vertices[reference], axis=1).argmin()
            got = hierarchy.spirals(level, **kwargs)
            expected = spiral_sequences(
                coarse, hierarchy.faces[level], **kwargs | dict(reference=[nearest])
            )
            np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(hops=0), "positive"),
        (dict(length=0), "positive"),
        (dict(dilation=0), "positive"),
        (dict(length=9, hops=2), "either 'length' or"),
        (dict(reference=[162]), r"from 0 to 161 .got \[162\]"),
        (dict(reference=[-1]), r"from 0 to 161 .got \[-1\]"),
        (dict(reference=[1.5]), r"from 0 to 161 .got \[1.5\]"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        spiral_sequences(*MESHES["closed"], **kwargs)
