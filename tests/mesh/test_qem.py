import warnings
from pathlib import Path

import numpy as np
import pytest

from pyg_attnpool.mesh import check_mesh, decimate
from pyg_attnpool.mesh.qem import FewestVertices
from tests.mesh.meshes import blob, closest_distance, icosphere, join, topology, torus

GOLDEN = np.load(Path(__file__).parents[1] / "golden/qem.npz", allow_pickle=False)


def levels_of(vertices, faces, counts):
    r"""Absolute indices into the mesh and faces of every level."""
    kept = np.arange(len(vertices))
    for index, coarse_faces in decimate(vertices, faces, counts):
        kept = kept[index]
        yield kept, coarse_faces


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_closer_to_the_original_than_the_authors_program(kind):
    vertices, faces = GOLDEN[f"{kind}_vertices"].astype(float), GOLDEN[f"{kind}_faces"]
    counts = [len(GOLDEN[f"{kind}_level{level}_vertices"]) for level in (1, 2)]
    for level, (kept, coarse) in enumerate(levels_of(vertices, faces, counts), start=1):
        assert len(kept) == counts[level - 1]
        distance = closest_distance(vertices, vertices[kept], coarse).mean()
        assert distance < GOLDEN[f"{kind}_level{level}_mean_distance"]


@pytest.mark.parametrize("seed", range(4))
def test_closer_than_the_quadrics_alone_on_average(monkeypatch, seed):
    vertices, faces = blob(3, seed=seed, hole=seed % 2 == 1)
    counts = [len(vertices) // 4, len(vertices) // 16]
    ours = list(levels_of(vertices, faces, counts))
    monkeypatch.setattr("pyg_attnpool.mesh.qem.SWEEPS", 0)
    for (kept, coarse), (plain, plain_coarse) in zip(
        ours, levels_of(vertices, faces, counts), strict=True
    ):
        moved = closest_distance(vertices, vertices[kept], coarse).mean()
        assert moved < closest_distance(vertices, vertices[plain], plain_coarse).mean()


MESHES = {
    "closed": (blob(3, seed=10), [161, 41, 11, 4]),
    "open": (blob(3, seed=11, hole=True), [140, 36, 9, 3]),
    "torus": (torus(24, 13), [78, 20, 8]),
    "parts": (
        join(blob(3, seed=12), *[(icosphere(1)[0] * 0.1 + 2 * i, icosphere(1)[1]) for i in (1, 2)]),
        [182, 46, 12],
    ),
    "prime": (blob(2, seed=13), [161, 160, 97, 31, 30, 5]),
}


@pytest.mark.parametrize("name", MESHES)
def test_counts_subset_and_topology(name):
    (vertices, faces), counts = MESHES[name]
    before = topology(faces)
    for count, (kept, coarse) in zip(counts, levels_of(vertices, faces, counts), strict=True):
        assert len(kept) == count
        assert (np.diff(kept) > 0).all()
        check_mesh(vertices[kept], coarse)
        assert topology(coarse) == before


@pytest.mark.parametrize("name", ["closed", "open", "prime"])
def test_no_face_is_flipped(name):
    # Surfaces star-shaped around the origin: which way is outwards is known everywhere.
    (vertices, faces), counts = MESHES[name]
    for kept, coarse in list(levels_of(vertices, faces, counts))[:2]:
        a, b, c = (vertices[kept][coarse[:, i]] for i in range(3))
        assert ((np.cross(b - a, c - a) * (a + b + c)).sum(axis=1) > 0).all()


def test_boundary_keeps_its_shape():
    # A flat square: the corners hold the boundary, the inside costs nothing.
    x, y = (a.ravel() for a in np.meshgrid(np.arange(9.0), np.arange(9.0)))
    vertices = np.stack([x, y, 0 * x], axis=1)
    i = np.arange(81).reshape(9, 9)
    a, b, c, d = (s.ravel() for s in (i[:-1, :-1], i[:-1, 1:], i[1:, 1:], i[1:, :-1]))
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    for kept, coarse in levels_of(vertices, faces, [21, 6]):
        p, q, r = (vertices[kept][coarse[:, i]] for i in range(3))
        area = np.cross(q - p, r - p)[:, 2] / 2
        assert (area > 0).all()
        np.testing.assert_allclose(area.sum(), 64)
        assert {0, 8, 72, 80} <= set(kept.tolist())


def test_components_go_when_the_count_demands_it():
    spheres = [(icosphere(1)[0] * s + 3 * i, icosphere(1)[1]) for i, s in enumerate((1, 0.5, 0.7))]
    vertices, faces = join(*spheres)
    with pytest.warns(
        UserWarning, match="1 of 3 components end before the level of 9 vertices, those"
    ):
        kept, coarse = list(levels_of(vertices, faces, [60, 9]))[-1]
    assert len(kept) == 9
    assert topology(coarse)[0] == 2
    assert set((kept // 42).tolist()) == {0, 2}  # the sphere closest to the others went
    with pytest.raises(FewestVertices, match=r"at least 12 vertices for 3 components.* .got 9"):
        decimate(vertices, faces, [60, 9], drop=False)


def test_components_that_cost_the_surface_little_give_up_their_last_vertices():
    # A head with two eyeballs: four vertices each are a fifth of the coarsest level.
    ball, triangles = icosphere(2)
    eyes = [(0.1 * ball + [0.3 * side, 0.5, 0.6], triangles) for side in (-1, 1)]
    vertices, faces = join(blob(3, seed=0), *eyes)
    counts = [len(vertices) // 4, len(vertices) // 16, 16]
    with pytest.warns(UserWarning, match="2 of 3 components end before the level of 16 vertices"):
        levels = list(levels_of(vertices, faces, counts))
    assert [topology(coarse)[0] for _, coarse in levels] == [3, 3, 1]
    kept, coarse = levels[-1]
    assert len(kept) == 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyg_attnpool.mesh.qem.SMALL", 0)
        with_eyes, its_faces = list(levels_of(vertices, faces, counts))[-1]
    assert topology(its_faces)[0] == 3
    distance = closest_distance(vertices, vertices[kept], coarse).mean()
    assert distance < 0.9 * closest_distance(vertices, vertices[with_eyes], its_faces).mean()
    # Far apart, they cost the surface much, and stay.
    vertices, faces = join(blob(3, seed=0), *[(v + 9 * i, f) for i, (v, f) in enumerate(eyes, 1)])
    assert [topology(coarse)[0] for _, coarse in levels_of(vertices, faces, counts)] == [3, 3, 3]


@pytest.mark.parametrize("seed, better", [(0, True), (2, False)])
def test_of_several_rules_the_closest_surface_is_taken(seed, better):
    # A head with a neck and two eyeballs.
    ball, triangles = icosphere(2)
    eyes = [(0.1 * ball + [0.3 * side, 0.5, 0.6], triangles) for side in (-1, 1)]
    vertices, faces = join(blob(3, seed=seed, hole=True), *eyes)
    counts, distances = [len(vertices) // 4, len(vertices) // 16, 16], []
    for few in (0, 32):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr("pyg_attnpool.mesh.qem.FEW", few)
            warnings.simplefilter("ignore")  # of the components that end
            kept, coarse = list(levels_of(vertices, faces, counts))[-1]
        distances.append(closest_distance(vertices, vertices[kept], coarse).mean())
    assert distances[1] < 0.7 * distances[0] if better else distances[1] == distances[0]


@pytest.mark.parametrize("seed", range(3))
def test_order_of_vertices_and_faces_does_not_matter(seed):
    vertices, faces = blob(3, seed=20 + seed, hole=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(vertices))
    other = np.argsort(order)[faces][rng.permutation(len(faces))]
    other = np.roll(other, 1, axis=1)
    counts = [len(vertices) // 4, len(vertices) // 16]
    for (kept, coarse), (other_kept, other_coarse) in zip(
        levels_of(vertices, faces, counts), levels_of(vertices[order], other, counts), strict=True
    ):
        np.testing.assert_array_equal(kept, np.sort(order[other_kept]))

        def triangles(faces):
            return {tuple(np.roll(t, -t.argmin()).tolist()) for t in faces}

        assert triangles(kept[coarse]) == triangles(order[other_kept][other_coarse])


def test_scale_and_place_do_not_matter():
    vertices, faces = blob(3, seed=30)
    for (kept, _), (other, _) in zip(
        levels_of(vertices, faces, [161, 41]),
        levels_of(vertices / 1024 + 0.5, faces, [161, 41]),
        strict=True,
    ):
        assert len(np.intersect1d(kept, other)) >= 0.95 * len(kept)


def test_chunks_do_not_matter(monkeypatch):
    vertices, faces = blob(3, seed=31)
    expected = list(levels_of(vertices, faces, [161, 41]))
    monkeypatch.setattr("pyg_attnpool.mesh.qem.CHUNK", 1000)
    for (kept, coarse), (other, other_coarse) in zip(
        expected, levels_of(vertices, faces, [161, 41]), strict=True
    ):
        np.testing.assert_array_equal(kept, other)
        np.testing.assert_array_equal(coarse, other_coarse)


def test_errors():
    vertices, faces = icosphere(1)
    with pytest.raises(ValueError, match=r"descending vertex counts below 42 .got \[20, 20\]"):
        decimate(vertices, faces, [20, 20])
    with pytest.raises(ValueError, match=r"below 42 .got \[42\]"):
        decimate(vertices, faces, [42])
    with pytest.raises(ValueError, match="at least 4 vertices .*got 3"):
        decimate(vertices, faces, [3])
    with pytest.raises(ValueError, match="one orientation|at most two faces"):
        decimate(vertices, np.concatenate([faces, faces[:1]]), [20])
