import copy
import json
import statistics
from dataclasses import replace

import pytest

for name in ("tyro", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.paper import sweep  # noqa: E402
from benchmarks.paper.tables import Cell  # noqa: E402
from tests.benchmarks.paper.few import FEW, line, rows_of  # noqa: E402


def cell(means, reported=None, **values):
    rows = [
        line(mean=str(m), alive="8", steps="100", model='{"latent_channels": 8}') for m in means
    ]
    return Cell([{**row, **values} for row in rows], reported or {})


def test_mean_and_standard_error():
    three = cell([1.0, 2.0, 4.5])
    # Deviations -1.5, -0.5 and 2 from 2.5: sqrt(6.5 / 2 / 3).
    assert three.mean() == 2.5 and three.error() == pytest.approx(1.0408330)
    assert three.text("mean", steps=100) == "2.500 ± 1.041"
    assert cell([1.0]).error() is None and cell([1.0]).text("mean", 100) == "1.000"
    assert cell([1.0], trained="30056").text("trained", 100) == "30,056"


def test_cells_tell_dead_dimensions_and_other_steps():
    assert cell([1.0, 1.0], alive="7").text("mean", 100) == "1.000 ± 0.000 (7 of 8 alive)"
    some = cell([1.0, 1.0])
    some.rows[0]["alive"] = "6"
    assert some.text("mean", 2000) == "1.000 ± 0.000 (6 to 8 of 8 alive, 100 steps)"
    # PCA makes no steps.
    assert cell([1.0], steps="0").text("mean", 100) == "1.000"


@pytest.mark.slow
def test_table_has_the_numbers_of_the_file(options, folder, monkeypatch):
    monkeypatch.setattr(sweep, "REPORTED_ON", (str(folder),))
    table = copy.deepcopy(FEW.table)
    table["QEM"]["simple"] = replace(table["QEM"]["simple"], reported={"mean": 0.939})
    sweep.sweep(replace(FEW, table=table), options)
    rows = rows_of(options.output / "few.csv")
    qem = [float(row["mean"]) for row in rows if row["key"] in (rows[0]["key"], rows[5]["key"])]
    expected = f"{sum(qem) / 2:.3f} ± {abs(qem[0] - qem[1]) / 2:.3f}"
    lines = (options.output / "few.md").read_text().splitlines()
    header = next(i for i, text in enumerate(lines) if text.startswith("| pooling"))
    heads, shown = ([c.strip() for c in lines[i].split("|")[1:-1]] for i in (header, header + 2))
    assert heads[:5] == [
        "pooling",
        *(f"{c}, {w}" for c in ("simple", "small") for w in ("reported", "here")),
    ]
    assert shown[:3] == ["QEM", "0.939", expected]
    assert shown[3] == "-" and shown[5:] == ["-", "-"]  # nothing reported; no PCA in this row
    entry = json.loads((options.output / "few.json").read_text())["rows"][0]
    assert entry["mean"] == pytest.approx(statistics.mean(qem))
    assert entry["standard_error"] == pytest.approx(abs(qem[0] - qem[1]) / 2)
