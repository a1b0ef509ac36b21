import numpy as np
import pytest

for name in ("tyro", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)

import matplotlib.image  # noqa: E402

from benchmarks.paper import curves  # noqa: E402
from benchmarks.paper.data import Meshes  # noqa: E402
from benchmarks.peers.rows import read_rows  # noqa: E402
from pyg_attnpool import MorphableModel  # noqa: E402

STEPS = 10  # of which three are an epoch


@pytest.fixture
def curve_options(options):
    fields = {name: getattr(options, name) for name in ("data", "scale", "device", "root")}
    return curves.CurveOptions(**fields, output=options.output, steps=STEPS, seeds=(0,))


def rows_of(options, name):
    return read_rows(options.output / f"{name}-0.csv", curves.COLUMNS)


@pytest.mark.slow
def test_a_curve_goes_on_where_it_was_cut_off(curve_options, tmp_path, monkeypatch, capsys):
    curves.main(curve_options)
    whole = rows_of(curve_options, "attention-spectral-default-one_cycle")
    assert [(row["epoch"], row["steps"]) for row in whole] == [
        *(("1", "3"), ("2", "6"), ("3", "9"), ("4", "12"))
    ]
    assert not list((curve_options.output / "unfinished").iterdir())
    pixels = matplotlib.image.imread(curve_options.output / "curves.png")
    assert pixels.std() > 0.05
    text = capsys.readouterr().out
    assert "| attention, spectral, default | one_cycle | 4 of 4 | 12 |" in text
    ratio = float(whole[-1]["test"]) / float(
        rows_of(curve_options, "QEM-spectral-default-one_cycle")[-1]["test"]
    )
    assert f"over QEM after 4 epochs: {ratio:.2f}" in text

    # Cut off after the line of the third epoch, before its checkpoint.
    write = curves.Record.write
    cut = curve_options
    cut.output, cut.models = tmp_path / "cut", ("attention, spectral",)

    def stops(record, epoch, *values):
        write(record, epoch, *values)
        if epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(curves.Record, "write", stops)
        with pytest.raises(KeyboardInterrupt):
            curves.main(cut)
    assert len(rows_of(cut, "attention-spectral-default-one_cycle")) == 3
    curves.main(cut)
    assert rows_of(cut, "attention-spectral-default-one_cycle") == whole
    cut.steps = 3
    with pytest.raises(ValueError, match="another 'epochs'"):
        curves.main(cut)


def test_a_line_tells_error_and_shares(curve_options, tmp_path):
    meshes = Meshes(curve_options.data[0], curve_options)
    model = MorphableModel.coma(meshes.hierarchy, 2, pool="attention")
    _, _, test = meshes.split()
    model.set_statistics(test.mean(dim=0), test.std(dim=0).clamp(min=1e-4))
    record = curves.Record(tmp_path / "curve.csv", dict.fromkeys(curves.COLUMNS, "x"), test)
    record.write(7, 70, model, 1.25)
    (row,) = read_rows(tmp_path / "curve.csv", curves.COLUMNS)
    error = 1000 * (model(test) - test).norm(dim=-1).mean().item()
    assert float(row["test"]) == pytest.approx(error, rel=1e-4)
    assert (row["epoch"], row["steps"], row["val"]) == ("7", "70", "1.25")
    assert row["w_a"] == str([-2.0] * 8)  # four levels, down and up


def test_a_power_law_is_continued():
    epoch = np.arange(1.0, 61)
    error = 0.5 + 3 * epoch**-0.8
    assert curves.extrapolated(epoch, error, 300) == pytest.approx(0.5 + 3 * 300**-0.8, rel=1e-3)
    noisy = error * np.exp(0.01 * np.random.default_rng(0).normal(size=60))
    assert curves.extrapolated(epoch, noisy, 120) == pytest.approx(0.5 + 3 * 120**-0.8, rel=0.03)


def test_models_that_are_not_compared_are_refused(curve_options):
    curve_options.models = ("LAMM",)
    with pytest.raises(ValueError, match=r"'models' among .*attention, spiral.*got \['LAMM'\]"):
        curves.main(curve_options)
