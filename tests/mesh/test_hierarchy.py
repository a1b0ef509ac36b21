import numpy as np
import pytest
import torch

from pyg_attnpool import Mapping
from pyg_attnpool.mesh import MeshHierarchy, decimate, hierarchy, write_mesh
from tests.mesh.meshes import blob, closest_distance, icosphere, join, topology, torus

TEMPLATE = blob(3, seed=0, hole=True)


@pytest.fixture(scope="module")
def coarse():
    return MeshHierarchy.from_template(TEMPLATE, factors=[4, 4, 3])


def test_levels(coarse):
    n = len(TEMPLATE[0])
    assert coarse.num_vertices == [n, -(-n // 4), -(-n // 16), -(-n // 48)]
    np.testing.assert_array_equal(coarse.vertices[0], TEMPLATE[0])
    np.testing.assert_array_equal(coarse.faces[0], TEMPLATE[1])
    assert repr(coarse) == f"MeshHierarchy({coarse.num_vertices})"


def test_coma_sizes():
    template = np.random.default_rng(0).normal(size=(5023, 3)), np.zeros((1, 3), dtype=int)
    assert hierarchy._counts(len(template[0]), None, None) == [5023, 1256, 314, 79, 20]
    assert hierarchy._counts(5023, [5023, 1256], None) == [5023, 1256]
    assert hierarchy._counts(5023, [1256], None) == [5023, 1256]


def test_down_selects_the_kept_vertices(coarse):
    for level, mapping in enumerate(coarse.down):
        assert mapping.k == 1
        fine, kept = map(torch.from_numpy, coarse.vertices[level : level + 2])
        torch.testing.assert_close(mapping @ fine, kept, atol=0, rtol=0)


def test_up_is_the_closest_point(coarse):
    for level, mapping in enumerate(coarse.up):
        assert mapping.k == 3
        assert (mapping.weight >= 0).all()
        torch.testing.assert_close(mapping.weight.sum(1), torch.ones(mapping.num_target).double())
        fine, kept = coarse.vertices[level : level + 2]
        distance = np.linalg.norm((mapping @ torch.from_numpy(kept)).numpy() - fine, axis=1)
        expected = closest_distance(fine, kept, coarse.faces[level + 1])
        np.testing.assert_allclose(distance, expected, atol=1e-13)
        # A kept vertex comes from itself with weight one.
        identity = coarse.down[level].to_scipy() @ mapping.to_scipy()
        np.testing.assert_array_equal(identity.toarray(), np.eye(len(kept)))


def test_edge_index(coarse):
    for level, faces in enumerate(coarse.faces):
        edges = {(a, b) for t in faces.tolist() for a in t for b in t if a != b}
        assert coarse.edge_index(level).t().tolist() == sorted(map(list, edges))


def test_positions(coarse):
    template = coarse.vertices[0]
    for level, vertices in enumerate(coarse.vertices):
        expected = (vertices - template.mean(axis=0)) / template.std(axis=0)
        got = coarse.positions(level)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_flat_template_has_finite_positions():
    x, y = np.meshgrid(np.arange(5.0), np.arange(5.0))
    i = np.arange(25).reshape(5, 5)
    quads = np.stack([i[:-1, :-1], i[:-1, 1:], i[1:, 1:], i[1:, :-1]], axis=-1).reshape(-1, 4)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    flat = MeshHierarchy.from_template((np.stack([x, y, 0 * x], -1).reshape(-1, 3), faces), [8])
    assert torch.isfinite(flat.positions(1)).all()
    assert (flat.positions(1)[:, 2] == 0).all()


def test_every_component_stays_by_default(tmp_path):
    ball, triangles = icosphere(1)
    spheres = [(ball + np.array([i % 4, i // 4, 0]) * 3, triangles) for i in range(16)]
    template = join(*spheres)
    with pytest.warns(UserWarning, match=r"\[168, 42, 11, 3\] vertices, fewer than collapses"):
        mesh = MeshHierarchy.from_template(template, cache=tmp_path)
    assert len(mesh.num_vertices) == 5 and mesh.num_vertices[-1] == 64
    assert [topology(faces)[0] for faces in mesh.faces] == [16] * 5
    # No vertex comes back on the surface of another sphere.
    x = torch.from_numpy(mesh.vertices[-1])
    for up in reversed(mesh.up):
        x = up @ x
    assert np.linalg.norm(x.numpy() - template[0], axis=1).max() < 1.5
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert same(MeshHierarchy.from_template(template, cache=tmp_path), mesh)
    assert path.stat().st_mtime_ns == written
    # Counts are kept to, and what ends is named.
    with pytest.warns(UserWarning, match="6 of 16 components end before the level of 42 vertices"):
        counted = MeshHierarchy.from_template(template, num_vertices=[168, 42])
    assert counted.num_vertices == [672, 168, 42]


def test_factors_stop_at_what_the_template_needs():
    for template, least in ((icosphere(1), 4), (torus(9, 7), 7)):
        with pytest.warns(UserWarning, match="fewer than collapses of edges leave"):
            mesh = MeshHierarchy.from_template(template)
        assert len(mesh.num_vertices) == 5
        assert mesh.num_vertices[-1] >= least
        assert [topology(faces)[:2] for faces in mesh.faces] == [topology(template[1])[:2]] * 5
    with pytest.raises(ValueError, match="at most 2 coarser levels of a template of 5 vertices"):
        MeshHierarchy.from_template(bipyramid())


def bipyramid():
    vertices = np.array([[1, 0, 0], [-0.5, 0.9, 0], [-0.5, -0.9, 0], [0, 0, 1], [0, 0, -1.0]])
    faces = [[0, 1, 3], [1, 2, 3], [2, 0, 3], [1, 0, 4], [2, 1, 4], [0, 2, 4]]
    return vertices, np.array(faces)


def test_template_file(tmp_path):
    write_mesh(tmp_path / "template.obj", *TEMPLATE)
    got = MeshHierarchy.from_template(tmp_path / "template.obj", num_vertices=[50, 12])
    vertices = TEMPLATE[0].astype(np.float32).astype(float)
    for (index, faces), level in zip(
        decimate(vertices, TEMPLATE[1], [50, 12]), (1, 2), strict=True
    ):
        np.testing.assert_allclose(got.vertices[level], got.vertices[level - 1][index])
        np.testing.assert_array_equal(got.faces[level], faces)


def same(a, b):
    pairs = [*zip(a.vertices, b.vertices, strict=True), *zip(a.faces, b.faces, strict=True)]
    for mine, theirs in zip(a.down + a.up, b.down + b.up, strict=True):
        pairs += [(mine.index, theirs.index), (mine.weight, theirs.weight)]
    return all(np.array_equal(x, y) for x, y in pairs)


def test_save_and_load(tmp_path, coarse):
    coarse.save(tmp_path / "hierarchy.npz")
    loaded = MeshHierarchy.load(tmp_path / "hierarchy.npz")
    assert same(loaded, coarse)
    assert loaded.hash == coarse.hash
    np.load(tmp_path / "hierarchy.npz", allow_pickle=False)["faces0"]
    assert [p.name for p in tmp_path.iterdir()] == ["hierarchy.npz"]


def test_hash_tells_hierarchies_apart(coarse):
    moved = coarse.vertices[0].copy()
    moved[5, 1] += 1e-9
    up = coarse.up[0]
    others = [
        MeshHierarchy([moved, *coarse.vertices[1:]], coarse.faces, coarse.down, coarse.up),
        MeshHierarchy(
            coarse.vertices,
            coarse.faces,
            coarse.down,
            [Mapping(up.index, up.weight.roll(1, 1), up.num_source), *coarse.up[1:]],
        ),
        MeshHierarchy.from_template(TEMPLATE, factors=[4, 4]),
    ]
    assert len({coarse.hash, *(other.hash for other in others)}) == 4


def test_cache_is_used_and_verified(tmp_path, monkeypatch, coarse):
    first = MeshHierarchy.from_template(TEMPLATE, factors=[4, 4, 3], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    MeshHierarchy.from_template(TEMPLATE, factors=[4, 4], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # other parameters, another file

    def refuse(*args):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(hierarchy, "decimate", refuse)
        assert same(MeshHierarchy.from_template(TEMPLATE, factors=[4, 4, 3], cache=tmp_path), first)
        with pytest.raises(AssertionError, match="made again"):
            MeshHierarchy.from_template(icosphere(2), factors=[4], cache=tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="made again from the template"):
        again = MeshHierarchy.from_template(TEMPLATE, factors=[4, 4, 3], cache=tmp_path)
    assert same(again, coarse)
    assert same(MeshHierarchy.load(path), coarse)


def damaged(arrays, **changes):
    return {**arrays, **{name: np.array(value) for name, value in changes.items()}}


def test_load_errors(tmp_path, coarse):
    path = tmp_path / "hierarchy.npz"
    with pytest.raises(FileNotFoundError):
        MeshHierarchy.load(path)
    coarse.save(path)
    content, arrays = path.read_bytes(), dict(np.load(path, allow_pickle=False))
    moved = arrays["vertices1"] + 1e-6
    cases = [
        (content[: len(content) // 2], "Expected a.* mesh hierarchy in .*hierarchy.npz"),
        (content[:2000] + b"\0" * 20 + content[2020:], "mesh hierarchy in .*hierarchy.npz"),
        (b"", "mesh hierarchy in"),
        (damaged(arrays, version=99), "version 1 in .*hierarchy.npz .got 99"),
        (damaged(arrays, vertices1=moved), "got a damaged one"),
        (damaged(arrays, source="0" * 64), "got a damaged one"),
        ({"something": np.zeros(3)}, "Expected a mesh hierarchy"),
        ({"version": np.array([{}], dtype=object)}, "whole mesh hierarchy"),
    ]
    for case, message in cases:
        if isinstance(case, bytes):
            path.write_bytes(case)
        else:
            np.savez(path, **case)
        with pytest.raises(ValueError, match=message):
            MeshHierarchy.load(path)


def test_construction_errors(coarse):
    v, f = TEMPLATE
    with pytest.raises(ValueError, match="either 'num_vertices' or 'factors'"):
        MeshHierarchy.from_template(TEMPLATE, num_vertices=[10], factors=[4])
    with pytest.raises(ValueError, match=r"at least three vertices each .got \[\d+, 2\]"):
        MeshHierarchy.from_template(TEMPLATE, num_vertices=[2])
    with pytest.raises(ValueError, match=r"'factors' above 1 .got 1"):
        MeshHierarchy.from_template(TEMPLATE, factors=[1])
    with pytest.raises(ValueError, match="descending"):
        MeshHierarchy.from_template(TEMPLATE, num_vertices=[len(v) + 1])
    with pytest.raises(ValueError, match="finite"):
        MeshHierarchy.from_template((np.where(v > v.max() - 1e-9, np.nan, v), f))
    with pytest.raises(ValueError, match="at least two levels"):
        MeshHierarchy([v], [f], [], [])
    with pytest.raises(ValueError, match="mappings between .* at level 0"):
        MeshHierarchy(coarse.vertices[:2], coarse.faces[:2], coarse.up[:1], coarse.down[:1])


@pytest.mark.parametrize("factors", [["a"], [None], 2, "44"])
def test_factors_are_a_list_of_numbers(factors):
    with pytest.raises(TypeError, match="'factors' to be a list of numbers"):
        MeshHierarchy.from_template(TEMPLATE, factors=factors)
