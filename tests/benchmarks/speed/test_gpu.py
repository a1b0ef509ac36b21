import pytest


@pytest.mark.slow
def test_what_needs_a_gpu_runs_on_a_cpu_too(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    from benchmarks.speed import gpu

    row = gpu.search(60, 50, "cpu", channels=5, k=4)
    assert row["keys that gaps determine"] > 0.9 and row["matmul + topk, times ours"] > 0
    # Deformations of a few waves, of which an epoch learns something.
    monkeypatch.chdir(tmp_path)
    one, more = (gpu.train(64, 0, "32-true", epochs, "cpu") for epochs in (1, 6))
    assert more["mm"] < one["mm"] and more["300 epochs min"] == pytest.approx(
        5 * more["an epoch s"]
    )
