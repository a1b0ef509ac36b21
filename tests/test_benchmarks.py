import json
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

sys.path.append(
    str(Path(__file__).parents[1] / "benchmarks")
)  # scripts import each other from there

import measure
import scaling
import speed_ops

from pyg_attnpool import Mapping


@pytest.fixture
def clock(monkeypatch):
    r"""A clock that the test moves."""
    time = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: time[0])
    return time


def sleeping(clock, *seconds):
    left = iter(seconds)

    def run():
        clock[0] += next(left)

    return run


def test_interleaved_medians(clock):
    # The first call of each is a rehearsal and not counted.
    runs = {"a": sleeping(clock, 99.0, 1.0, 3.0, 2.0), "b": sleeping(clock, 0.0, 10.0, 10.0, 40.0)}
    assert measure.interleaved(runs, 3, budget=1000) == {"a": 2.0, "b": 10.0}


def test_interleaved_calls_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert measure.interleaved(runs, 20, budget=1000).keys() == {"a", "b", "c"}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 3  # none always follows the same one
    assert measure.interleaved({}, 2, budget=1000) == {}


def test_interleaved_stops_at_the_budget_after_a_whole_round(clock):
    runs = {"a": sleeping(clock, 0.0, 5.0), "b": sleeping(clock, 0.0, 7.0)}
    assert measure.interleaved(runs, 9, budget=1) == {"a": 5.0, "b": 7.0}


def test_equal():
    expected = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert measure.equal("x", expected, expected.double(), rtol=0) == 0
    off = expected + torch.tensor([[0.0, 0.0], [0.0, 2e-3]])
    assert measure.equal("x", off, expected, rtol=2e-3) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ValueError, match=r"x to differ by at most 5e-04 .* \(got 1.00e-03\)"):
        measure.equal("x", off, expected, rtol=5e-4)
    with pytest.raises(ValueError, match="got nan"):
        measure.equal("x", torch.full_like(expected, torch.nan), expected, rtol=1)
    with pytest.raises(ValueError, match=r"x of shape \[2, 2\] \(got \[2, 1\]\)"):
        measure.equal("x", expected[:, :1], expected, rtol=1)


def circle(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize("max_scores", [measure.CHECKED_SCORES, 1])  # all rows, or a sample of them
def test_equal_topk(max_scores):
    query, key = circle(0), circle(40, 10, 20.00001, 20, 80)

    def check(*index):
        return measure.equal_topk("x", torch.tensor([index]), query, key, max_scores)

    # Two keys are as good as equal: both orders are right, the first slot is determined.
    assert check(1, 3, 2) == check(1, 2, 3) == pytest.approx(1 / 3)
    assert check(1, 3, 2, 0, 4) == check(1, 2, 3, 0, 4) == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="largest scores"):
        check(1, 3, 0)
    with pytest.raises(ValueError, match="largest scores"):
        check(3, 1, 2)
    with pytest.raises(ValueError, match="one twice"):
        check(1, 3, 3)


def test_equal_topk_sees_an_order_that_rounding_does_not_explain(monkeypatch):
    query, key = circle(0), circle(10, 10.1)
    monkeypatch.setattr(measure, "ROUNDING", 1e-4)  # the two differ by 3e-4
    measure.equal_topk("x", torch.tensor([[0, 1]]), query, key)
    with pytest.raises(ValueError):
        measure.equal_topk("x", torch.tensor([[1, 0]]), query, key)


def test_peak_memory_sees_what_a_call_holds_and_frees():
    def run():
        torch.ones(16 << 20).add_(1)
        return torch.ones(1)

    peak = measure.peak_memory(run, "cpu")
    assert peak is None or 60 << 20 < peak < 200 << 20


def test_machine_names_no_host():
    about = measure.machine("cpu")
    assert about["torch"].startswith(torch.__version__.partition("+")[0])
    assert platform.node() not in json.dumps(about)


def test_report(tmp_path):
    tables = {"Times": [{"size": "a", "ms": 0.12345}, {"size": "b", "ms": None, "MiB": 12345}]}
    text = measure.report(
        tmp_path / "new", "name", "python x.py", [{"ms": 0.12345}], tables, {"seed": 3}, ["Why."]
    )
    assert (tmp_path / "new" / "name.md").read_text() == text
    assert "| size | ms | MiB |\n| --- | --- | --- |\n| a | 0.123 | - |\n| b | - | 12,345 |" in text
    assert "python x.py" in text and "seed 3" in text and "* Why." in text
    content = json.loads((tmp_path / "new" / "name.json").read_text())
    assert content["rows"] == [{"ms": 0.12345}] and content["about"] == {"seed": 3}


@pytest.fixture
def one_thread():
    r"""Threads of two processes on the same cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def floor(monkeypatch):
    monkeypatch.setattr(measure, "floor", lambda _: {"bytes_per_s": 1e10, "flop_per_s": 1e11})


# Operations #######################################################################


def test_references_of_the_product_agree():
    p = speed_ops.Pattern(torch.tensor([[0, 2], [1, 3], [1, 4], [0, 1]]), 5)
    weight, x, grad = torch.randn(4, 2), torch.randn(5, 7), torch.randn(4, 7)
    both = [speed_ops.product_in_double(p, weight, x, grad, dense) for dense in (True, False)]
    for a, b in zip(*both, strict=True):
        assert_close(a, b)


def test_speed_ops(tmp_path, floor, one_thread):
    speed_ops.main(("60:15",), "cpu", threads=1, repeat=1, seed=1, output=tmp_path)
    rows = json.loads((tmp_path / "speed_ops.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        every = speed_ops.PRODUCTS if row["operation"] == "product" else speed_ops.SEARCHES
        assert {*row["seconds"], *row["left_out"]} == {*every}
        assert "torch.sparse CSR" in row["seconds"] or row["operation"] == "top-k"
        assert min(row["seconds"].values()) > 0 and row["bytes_floor_seconds"] > 0
    text = (tmp_path / "speed_ops.md").read_text()
    assert "| 60:15 unpool | 15 → 60 | 15 |" in text and "| 60:15 pool | 60 → 15 | 2 |" in text


def test_speed_ops_leaves_out_what_is_too_large(tmp_path, floor, one_thread):
    speed_ops.main(("130:40",), "cpu", threads=1, repeat=1, memory=1e-5, output=tmp_path)
    text = (tmp_path / "speed_ops.md").read_text()
    assert text.count("- (needs 5.81e-05 GiB)") == 8  # dense matmul and full top-k
    assert "| ×" in text


@pytest.mark.parametrize("name", ["index_add", "ours"])
def test_speed_ops_prints_no_time_of_what_is_wrong(
    tmp_path, capsys, monkeypatch, floor, one_thread, name
):
    wrong = {name: lambda p, weight, x: 1.001 * speed_ops.dense_matmul(p, weight, x)}
    monkeypatch.setattr(speed_ops, "PRODUCTS", speed_ops.PRODUCTS | wrong)
    with pytest.raises(ValueError, match=f"output of {name}"):
        speed_ops.main(("60:15",), "cpu", threads=1, repeat=1, output=tmp_path)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_floor(one_thread):
    floor = measure.floor("cpu")
    assert 1e8 < floor["bytes_per_s"] < 1e13 and 1e8 < floor["flop_per_s"] < 1e15


# Scaling ##########################################################################


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


def test_scaling_stops_at_its_budget(tmp_path, one_thread):
    scaling.main((500,), ("layers",), steps=4, device="cpu", threads=1, budget=0.0, output=tmp_path)
    assert "stopped at 0 s" in (tmp_path / "scaling.md").read_text()


def test_what_needs_a_gpu_runs_on_a_cpu_too(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    import gpu

    row = gpu.search(60, 50, "cpu", channels=5, k=4)
    assert row["keys that gaps determine"] > 0.9 and row["matmul + topk, times ours"] > 0
    # Deformations of a few waves, of which an epoch learns something.
    monkeypatch.chdir(tmp_path)
    one, more = (gpu.train(64, 0, "32-true", epochs, "cpu") for epochs in (1, 6))
    assert more["mm"] < one["mm"] and more["300 epochs min"] == pytest.approx(
        5 * more["an epoch s"]
    )


def test_roughness_of_known_mappings():
    for name in ("openmesh", "pytorch_lightning", "matplotlib", "tyro"):
        pytest.importorskip(name)
    import sharpening

    ring = torch.arange(30)
    edge_index = torch.stack([torch.cat([ring, ring]), torch.cat([ring.roll(1), ring.roll(-1)])])

    def roughness(matrix):
        return sharpening.roughness(Mapping.from_matrix(matrix), edge_index)

    assert roughness(torch.ones(30, 30)) == pytest.approx(0, abs=1e-5)
    assert roughness(torch.eye(30)) == pytest.approx(1, abs=0.05)
    signs = (-1.0) ** ring
    assert roughness(signs[:, None]) == pytest.approx(2, rel=1e-5)
