import tracemalloc

import numpy as np
import pytest
import torch

from pyg_attnpool.mesh import MeshHierarchy, check_mesh, repair
from tests.mesh.meshes import blob, icosphere, join, topology, torus

GOOD = {
    "closed": blob(2, seed=0),
    "open": blob(2, seed=1, hole=True),
    "torus": torus(9, 7),
    "parts": join(blob(1, seed=2), blob(1, seed=3, hole=True)),
}


def orient_outwards(vertices, faces):
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    inside_out = np.einsum("ij,ij->", a, np.cross(b, c)) < 0
    return faces[:, ::-1] if inside_out else faces


def surface(vertices, faces):
    r"""The triangles as sets of points, whatever their vertices and orientation are."""
    return sorted(tuple(sorted(map(tuple, t))) for t in vertices[faces].tolist())


def directed(vertices, faces):
    return {tuple(map(tuple, vertices[np.roll(f, k)].tolist())) for f in faces for k in range(3)}


# Every damage gives a mesh, and whether the surface has more triangles than before.


def unreferenced(rng, vertices, faces):
    more = rng.normal(size=(5, 3))
    more[0] = np.nan
    at = np.sort(rng.integers(len(vertices) + 1, size=5))
    order = np.argsort(np.concatenate([np.arange(len(vertices)), at - 0.5]), kind="stable")
    rank = np.argsort(order)
    return np.concatenate([vertices, more])[order], rank[faces]


def degenerate(rng, vertices, faces):
    more = faces[rng.integers(len(faces), size=4)].copy()
    more[:, 0] = more[:, rng.integers(1, 3)]
    return vertices, np.insert(faces, rng.integers(len(faces), size=4), more, axis=0)


def repeated(rng, vertices, faces):
    more = np.roll(faces[rng.integers(len(faces), size=6)], 1, axis=1)
    more[:3] = more[:3, ::-1]
    return vertices, np.concatenate([faces, more])


def flipped(rng, vertices, faces):
    turned = rng.permutation(len(faces))[: len(faces) // 4]
    faces = faces.copy()
    faces[turned] = faces[turned][:, ::-1]
    return vertices, faces


def seam(rng, vertices, faces):
    # All faces of one half get vertices of their own.
    half = vertices[faces].mean(axis=1) @ rng.normal(size=3) > 0
    faces = faces.copy()
    faces[half] += len(vertices)
    used, inverse = np.unique(faces, return_inverse=True)
    return np.concatenate([vertices, vertices])[used], inverse.reshape(-1, 3)


def soup(rng, vertices, faces):
    return vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)


DAMAGES = [unreferenced, degenerate, repeated, flipped, seam, soup]


@pytest.mark.parametrize("name", GOOD)
def test_valid_mesh_stays_as_it_is(name):
    vertices, faces = GOOD[name]
    mesh = repair(vertices, faces)
    np.testing.assert_array_equal(mesh.vertices, vertices)
    np.testing.assert_array_equal(mesh.faces, faces)
    np.testing.assert_array_equal(mesh.index, np.arange(len(vertices)))
    assert not any(mesh.changes.values()) and "as it was" in repr(mesh)


def assert_repaired(vertices, faces, mesh):
    check_mesh(mesh.vertices, mesh.faces)
    np.testing.assert_array_equal(mesh.vertices, vertices[mesh.index])
    again = repair(mesh.vertices, mesh.faces)
    np.testing.assert_array_equal(again.index, np.arange(len(mesh.vertices)))
    np.testing.assert_array_equal(again.faces, mesh.faces)
    x = np.random.default_rng(0).normal(size=(4, len(vertices), 5))
    np.testing.assert_array_equal(mesh.apply(x), x[:, mesh.index])
    torch.testing.assert_close(mesh.apply(torch.from_numpy(x)).numpy(), x[:, mesh.index])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("seed", range(3))
def test_damage_is_undone(name, damage, seed):
    vertices, faces = GOOD[name]
    rng = np.random.default_rng(seed)
    broken_vertices, broken_faces = damage(rng, vertices, faces)
    mesh = repair(broken_vertices, broken_faces)
    assert_repaired(broken_vertices, broken_faces, mesh)
    assert topology(mesh.faces) == topology(faces)
    assert directed(mesh.vertices, mesh.faces) == directed(vertices, faces)
    assert any(mesh.changes.values())
    levels = MeshHierarchy.from_template((mesh.vertices, mesh.faces), factors=[2])
    assert len(levels.vertices[0]) == len(vertices)


@pytest.mark.parametrize("seed", range(40))
def test_any_triangles_become_a_manifold_of_the_same_surface(seed):
    rng = np.random.default_rng(seed)
    if seed % 2:
        # Triangles at random among few vertices: most edges have many faces.
        vertices, faces = rng.normal(size=(9, 3)), rng.integers(9, size=(25, 3))
    else:
        vertices, faces = GOOD[list(GOOD)[seed % 4]]
        faces = np.concatenate([faces, rng.integers(len(vertices), size=(20, 3))])
        for damage in rng.permutation(len(DAMAGES) - 1)[:3]:
            vertices, faces = DAMAGES[damage](rng, vertices, faces)
    mesh = repair(vertices, faces)
    assert_repaired(vertices, faces, mesh)
    whole = faces[[len({tuple(p) for p in vertices[f].tolist()}) == 3 for f in faces]]
    assert set(surface(mesh.vertices, mesh.faces)) == set(surface(vertices, whole))


def test_fin_is_cut_off_and_the_rest_stays():
    vertices, faces = icosphere(1)
    fin = np.array([[faces[0, 0], faces[0, 1], len(vertices)]])
    mesh = repair(np.vstack([vertices, [[2.0, 0, 0]]]), np.concatenate([faces, fin]))
    np.testing.assert_array_equal(mesh.faces[:-1], faces)
    np.testing.assert_array_equal(mesh.vertices[: len(vertices)], vertices)
    assert mesh.changes["copied vertices"] == 2
    assert mesh.index.tolist() == [*range(43), *sorted(fin[0, :2].tolist())]


def test_vertex_of_two_fans_is_copied():
    vertices, faces = join(icosphere(0), (icosphere(0)[0] + 5, icosphere(0)[1]))
    faces = np.where(faces == 12, 3, faces)
    mesh = repair(vertices, faces)
    assert topology(mesh.faces)[:2] == (2, 4)
    assert mesh.changes["copied vertices"] == 1 and mesh.changes["vertices without a face"] == 1


def test_moebius_strip_is_cut():
    n = 12
    u = np.arange(n) * 2 * np.pi / n
    sides = [
        np.stack(
            [
                (2 + w * np.cos(u / 2)) * np.cos(u),
                (2 + w * np.cos(u / 2)) * np.sin(u),
                w * np.sin(u / 2),
            ],
            1,
        )
        for w in (-0.5, 0.5)
    ]
    vertices = np.stack(sides, axis=1).reshape(-1, 3)
    a = 2 * np.arange(n)
    b = np.append(a[1:], 1)
    c, d = np.append(a[1:], 0) + 1, a + 1
    c[-1] = 0
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    with pytest.raises(ValueError, match="one orientation.*mesh.repair"):
        check_mesh(vertices, faces)
    mesh = repair(vertices, faces)
    assert_repaired(vertices, faces, mesh)
    assert topology(mesh.faces) == (1, 1, 1)  # a strip
    assert len(mesh.vertices) == len(vertices) + 2
    assert surface(mesh.vertices, mesh.faces) == surface(vertices, faces)


def test_component_inside_out_is_turned():
    vertices, faces = join(icosphere(1), (icosphere(1)[0] + 5, icosphere(1)[1][:, ::-1]))
    mesh = repair(vertices, faces)
    expected = np.concatenate(
        [faces[:80], orient_outwards(vertices[42:] - 5, faces[80:] - 42) + 42]
    )
    assert directed(mesh.vertices, mesh.faces) == directed(vertices, expected)
    assert mesh.changes["turned faces"] == 80


def test_seams_are_stitched_within_a_distance_or_not_at_all():
    rng = np.random.default_rng(0)
    vertices, faces = soup(rng, *icosphere(1))
    moved = vertices + rng.uniform(-1e-6, 1e-6, size=vertices.shape)
    assert repair(moved, faces).changes["stitched vertices"] == 0
    mesh = repair(moved, faces, merge=1e-5)
    assert topology(mesh.faces) == (1, 2, 0) and len(mesh.vertices) == 42
    assert len(repair(vertices, faces, merge=None).vertices) == len(vertices)


def test_vertices_at_one_place_take_little_memory():
    # Every triangle has corners of its own, as in an STL file, and many meet at the apex.
    n = 3000
    angle = np.arange(n) * 2 * np.pi / n
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(n)], axis=1)
    apex = np.tile([[0.0, 0.0, 1.0]], (n, 1))
    vertices = np.stack([apex, ring, np.roll(ring, -1, axis=0)], axis=1).reshape(-1, 3)
    tracemalloc.start()
    mesh = repair(vertices, np.arange(3 * n).reshape(-1, 3), merge=1e-6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(mesh.vertices) == n + 1 and len(mesh.faces) == n
    assert peak < 30e6  # all pairs at the apex alone would take 16 times 4.5 million bytes


def test_errors():
    vertices, faces = icosphere(0)
    with pytest.raises(ValueError, match="0 to 11 .got 0 to 12"):
        repair(vertices, np.where(faces == 3, 12, faces))
    with pytest.raises(ValueError, match="at vertex 3"):
        repair(np.where(np.arange(12)[:, None] == 3, np.nan, vertices), faces)
    with pytest.raises(ValueError, match="at least one face"):
        repair(vertices, np.zeros((5, 3), dtype=int))
    with pytest.raises(ValueError, match="'merge'"):
        repair(vertices, faces, merge=-1)
    with pytest.raises(ValueError, match=r"\[\*, 12, C\] .* .got \[4, 11, 3\]"):
        repair(vertices, faces).apply(np.zeros((4, 11, 3)))
