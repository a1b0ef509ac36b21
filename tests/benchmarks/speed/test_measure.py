import pytest
import torch

from benchmarks.speed import measure


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


def test_floor(one_thread):
    floor = measure.floor("cpu")
    assert 1e8 < floor["bytes_per_s"] < 1e13 and 1e8 < floor["flop_per_s"] < 1e15
