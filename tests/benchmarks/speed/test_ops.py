import json

import pytest
import torch
from torch.testing import assert_close

from benchmarks.speed import measure, ops


@pytest.fixture
def floor(monkeypatch):
    monkeypatch.setattr(measure, "floor", lambda _: {"bytes_per_s": 1e10, "flop_per_s": 1e11})


def test_references_of_the_product_agree():
    p = ops.Pattern(torch.tensor([[0, 2], [1, 3], [1, 4], [0, 1]]), 5)
    weight, x, grad = torch.randn(4, 2), torch.randn(5, 7), torch.randn(4, 7)
    both = [ops.product_in_double(p, weight, x, grad, dense) for dense in (True, False)]
    for a, b in zip(*both, strict=True):
        assert_close(a, b)


@pytest.mark.slow
def test_ops(tmp_path, floor, one_thread):
    ops.main(("60:15",), "cpu", threads=1, repeat=1, seed=1, output=tmp_path)
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        every = ops.PRODUCTS if row["operation"] == "product" else ops.SEARCHES
        assert {*row["seconds"], *row["left_out"]} == {*every}
        assert "torch.sparse CSR" in row["seconds"] or row["operation"] == "top-k"
        assert min(row["seconds"].values()) > 0 and row["bytes_floor_seconds"] > 0
    text = (tmp_path / "ops.md").read_text()
    assert "| 60:15 unpool | 15 → 60 | 15 |" in text and "| 60:15 pool | 60 → 15 | 2 |" in text


@pytest.mark.slow
def test_ops_leaves_out_what_is_too_large(tmp_path, floor, one_thread):
    ops.main(("130:40",), "cpu", threads=1, repeat=1, memory=1e-5, output=tmp_path)
    text = (tmp_path / "ops.md").read_text()
    assert text.count("- (needs 5.81e-05 GiB)") == 8  # dense matmul and full top-k
    assert "| ×" in text


@pytest.mark.parametrize("name", ["index_add", "ours"])
def test_ops_prints_no_time_of_what_is_wrong(
    tmp_path, capsys, monkeypatch, floor, one_thread, name
):
    wrong = {name: lambda p, weight, x: 1.001 * ops.dense_matmul(p, weight, x)}
    monkeypatch.setattr(ops, "PRODUCTS", ops.PRODUCTS | wrong)
    with pytest.raises(ValueError, match=f"output of {name}"):
        ops.main(("60:15",), "cpu", threads=1, repeat=1, output=tmp_path)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
