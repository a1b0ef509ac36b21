import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks.speed import scaling


@pytest.mark.parametrize("num_vertices, coarsest", [(0, 4), (2000, 10), (5023, 22)])
def test_levels_of_a_bent_sphere(num_vertices, coarsest):
    levels = scaling.hierarchy(num_vertices, seed=0)  # whose constructor checks every mesh
    sphere, _, _ = scaling.sphere(num_vertices)
    counts = [4**n * (coarsest - 2) + 2 for n in (4, 3, 2, 1, 0)]
    assert levels.num_vertices == [len(v) for v in sphere] == counts
    for level, (n, faces) in enumerate(zip(counts, levels.faces, strict=True)):
        assert n - levels.edge_index(level).size(1) // 2 + len(faces) == 2  # Euler characteristic
        assert_close(np.linalg.norm(sphere[level], axis=1), np.ones(n))
        assert np.array_equal(levels.vertices[level], levels.vertices[0][:n])
        a, b, c = sphere[level][faces].transpose(1, 0, 2)
        assert (np.einsum("ij,ij->i", np.cross(b - a, c - a), a) > 0).all()  # outwards
    for level, (down, up) in enumerate(zip(levels.down, levels.up, strict=True)):
        fine, coarse = (torch.from_numpy(sphere[n]) for n in (level, level + 1))
        assert_close(down @ fine, coarse)
        halfway = up @ coarse
        assert_close(halfway[: len(coarse)], coarse)
        assert_close(torch.nn.functional.normalize(halfway, dim=1), fine)
        # Every edge is halved once: new vertices have its ends as parents.
        parents = up.index[len(coarse) :].sort(dim=1).values
        row, col = levels.edge_index(level + 1)
        edges = torch.stack([row, col], dim=1)[row < col]
        assert torch.equal(parents.unique(dim=0), edges) and len(parents) == len(edges)


def test_waves_are_seeded_and_differ():
    points = scaling.sphere(0)[0][0]
    a, b = scaling.Waves(points, 0), scaling.Waves(points, 0)
    first = a.sample(2, 3)
    assert first.shape == (2, len(points), 3) and torch.equal(first, b.sample(2, 3))
    assert not torch.equal(first, a.sample(2, 3))
    assert not torch.equal(first, scaling.Waves(points, 1).sample(2, 3))


def test_exponent():
    sizes = [5122, 19970, 80130]
    assert scaling.exponent(sizes, [3e-9 * n**1.7 for n in sizes]) == pytest.approx(1.7)
    assert scaling.exponent(sizes, [None, 2.0, 2.0 * (80130 / 19970) ** 0.5]) == pytest.approx(0.5)
    assert scaling.exponent(sizes, [None, 2.0, None]) is None


@pytest.mark.parametrize("make", [scaling.attention_layers, scaling.dense_layers])
def test_check_finds_a_wrong_layer(make):
    model = make(scaling.hierarchy(0, seed=0))
    scaling.check(model)
    model[1].register_forward_hook(lambda module, args, out: 1.0001 * out)
    with pytest.raises(ValueError, match="layer 1"):
        scaling.check(model)


def test_dense_layers_train_as_ours():
    gradients = []
    for make in (scaling.attention_layers, scaling.dense_layers):
        torch.manual_seed(0)
        model = make(scaling.hierarchy(0, seed=0)).double()
        x = scaling.Waves(scaling.sphere(0)[0][0], 0).sample(2, 5).double()
        model(x).square().mean().backward()
        gradients.append([p.grad for _, p in sorted(model.named_parameters())])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


@pytest.mark.slow
def test_scaling(tmp_path, one_thread):
    scaling.main(
        (900, 500), batch_size=1, steps=4, device="cpu", threads=1, memory=8 / 1024, output=tmp_path
    )
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    runs, growth = rows[:-3], [row["exponents"] for row in rows[-3:]]
    assert [(row["subject"], row["num_vertices"]) for row in runs] == [
        *[("layers", 514), ("autoencoder", 514), ("dense", 514)],
        *[("layers", 1026), ("autoencoder", 1026), ("dense", 900)],
    ]
    assert "left out" in runs.pop()["note"]
    for row in runs:
        assert row["steps"] == 4 and row["step_seconds"] > 0 and row["note"] is None
        if row["subject"] == "dense":
            assert row["share_searched"] is None
        else:
            assert 0 <= row["share_searched"] <= 1
    assert [row["what"] for row in growth] == list(scaling.SUBJECTS)
    assert isinstance(growth[0]["step"], float) and growth[2]["step"] is None
    assert "| autoencoder | 1,026 |" in (tmp_path / "scaling.md").read_text()


@pytest.mark.slow
def test_scaling_stops_at_its_budget(tmp_path, one_thread):
    scaling.main((500,), ("layers",), steps=4, device="cpu", threads=1, budget=0.0, output=tmp_path)
    assert "stopped at 0 s" in (tmp_path / "scaling.md").read_text()
