import functools
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for name in ("tyro", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.paper import jobs  # noqa: E402
from benchmarks.paper.data import Meshes  # noqa: E402
from benchmarks.paper.experiment import Setting, pca, spectral, spiral  # noqa: E402
from benchmarks.paper.progress import time_left  # noqa: E402
from benchmarks.paper.results import COLUMNS  # noqa: E402
from benchmarks.paper.run import SETTINGS, Run  # noqa: E402
from benchmarks.paper.sweep import settings_of, sweep  # noqa: E402
from pyg_attnpool import MorphableModel  # noqa: E402
from pyg_attnpool.training import MeshTraining  # noqa: E402
from tests.benchmarks.paper.few import FEW, rows_of, untimed  # noqa: E402

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_rows_are_the_grid(options, folder):
    found = sweep(FEW, options)[str(folder)]
    rows = rows_of(options.output / "few.csv")
    assert tuple(rows[0]) == COLUMNS
    models = [json.loads(row["model"]) for row in rows]
    kinds = [(m["family"], m.get("pool"), m["latent_channels"]) for m in models]
    trained = [("coma", "qem", 8), ("coma", "qem", 4), ("coma", "attention", 8)]
    trained.append(("neural3dmm", "qem", 4))
    # PCA knows no seed, and the setting that stands twice runs once.
    assert kinds == [*trained, ("pca", None, 4), *trained]
    assert [row["seed"] for row in rows] == ["0"] * 5 + ["1"] * 4
    assert len({row["key"] for row in rows}) == len(rows)
    for row, (family, pool, latent) in zip(rows, kinds, strict=True):
        assert (
            row["data"] == str(folder)
            and row["scale"] == "smoke"
            and row["variant"] == ("" if family == "pca" else "default")
        )
        # 48 meshes: 6 are test, 5 validation.
        assert row["meshes"] == "37" and row["epochs"] == ("0" if family == "pca" else "2")
        assert row["steps"] == ("0" if family == "pca" else "6")
        assert 0 <= int(row["alive"]) <= latent
        assert (int(row["trained"]) > int(row["shipped"])) == (pool == "attention")
        quantiles = json.loads(row["quantiles"])
        assert len(quantiles) == 101 and quantiles == sorted(quantiles)
        assert quantiles[50] == pytest.approx(float(row["median"]), rel=1e-3)
        assert float(row["seconds"]) > 0 and torch.__version__.split("+")[0] in row["versions"]
    assert rows[0]["shipped"] == rows[2]["shipped"]  # of QEM and attention
    assert found["again"]["simple"].rows == found["QEM"]["simple"].rows
    assert list(found["again"]) == ["simple", "PCA"]
    assert not (options.output / "unfinished").exists()


def test_fixed_attention_learns_no_mapping(options):
    table = {
        name: {"error": Setting(spectral("attention", fixed=fixed))}
        for name, fixed in (("fixed", True), ("learned", False))
    }
    options = replace(options, seeds=(0,))
    found = sweep(replace(FEW, table=table), options)[options.data[0]]
    fixed, learned = (found[name]["error"].rows[0] for name in table)
    assert fixed["trained"] == fixed["shipped"] == learned["shipped"]
    assert int(learned["trained"]) > int(learned["shipped"])
    assert fixed["mean"] != learned["mean"]


def test_no_pca_of_more_components_than_meshes(options):
    table = {
        size: {"QEM": Setting(spectral("qem", size)), "PCA": Setting(pca(size))}
        for size in (36, 37)
    }
    found = sweep(replace(FEW, table=table), replace(options, seeds=(0,)))[options.data[0]]
    assert list(found[36]) == ["QEM", "PCA"] and list(found[37]) == ["QEM"]
    # Meshes stretched along three axes are linear in three numbers.
    assert found[36]["PCA"].rows[0]["alive"] == "3" and found[36]["PCA"].mean() < 1e-4
    text = (options.output / "few.md").read_text(encoding="utf-8")
    (last,) = (line for line in text.splitlines() if line.startswith("| 37 |"))
    assert last.endswith(" | - | - |")


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_twice_is_as_never_killed(options, monkeypatch):
    whole = replace(options, output=options.output.with_name("whole"))
    sweep(FEW, whole)

    step, fit = MeshTraining.training_step, MorphableModel.fit
    count, starts = [0], []

    def counted(module, x, number):
        count[0] += 1
        if count[0] in (10, 32):  # in the second epoch of a run, and in the first of another
            raise Killed
        return step(module, x, number)

    def started(*args, **kwargs):
        if "output" in kwargs:  # not of PCA
            starts.append(kwargs["output"].name)
        return fit(*args, **kwargs)

    monkeypatch.setattr(MeshTraining, "training_step", counted)
    monkeypatch.setattr(MorphableModel, "fit", started)
    finished = []
    for resume in (False, True):
        with pytest.raises(Killed):
            sweep(FEW, replace(options, resume=resume))
        finished.append(len(rows_of(options.output / "few.csv")))
    sweep(FEW, replace(options, resume=True))
    assert finished == [1, 6]
    assert untimed(options.output / "few.csv") == untimed(whole.output / "few.csv")
    # Eight trainings, two of which began once more, where their last whole epoch had ended.
    assert len(starts) == 8 + 2 and len(set(starts)) == 8
    assert count[0] == 8 * 6 + 2 * 1
    values = [json.loads((o.output / "few.json").read_text())["rows"] for o in (options, whole)]
    assert values[0] == values[1]

    # Nothing is left to do, and more seeds add to what is there.
    before = (options.output / "few.csv").read_bytes()
    sweep(FEW, replace(options, resume=True))
    assert (options.output / "few.csv").read_bytes() == before and len(starts) == 10
    sweep(FEW, replace(options, resume=True, seeds=(5, 0, 1)))
    after = (options.output / "few.csv").read_bytes()
    assert after.startswith(before) and len(starts) == 14


def by_key(path):
    return sorted(untimed(path), key=lambda row: row["key"])


@pytest.mark.slow
def test_side_by_side_is_as_one_by_one(options):
    aside = replace(options, output=options.output.with_name("aside"), jobs=2)
    for o in (options, aside):
        sweep(FEW, o)
    assert by_key(aside.output / "few.csv") == by_key(options.output / "few.csv")
    values = [json.loads((o.output / "few.json").read_text())["rows"] for o in (options, aside)]
    assert values[0] == values[1]
    assert not multiprocessing.active_children()

    # What goes wrong in one process ends the sweep, and the other process with it.
    keys = [row["key"] for row in rows_of(options.output / "few.csv")]
    again = replace(aside, output=options.output.with_name("again"))
    (again.output / "unfinished").mkdir(parents=True)
    (again.output / "unfinished" / keys[1]).write_text("no folder")
    with pytest.raises(ValueError, match=keys[1]):
        sweep(FEW, again)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_killed_side_by_side(options, folder):
    args = ["--data", folder, "--scale", "smoke", "--device", "cpu", "--root", options.root]
    args = [
        sys.executable,
        "-m",
        "benchmarks.paper",
        "table3",
        *args,
        "--seeds",
        0,
        1,
        2,
        "--jobs",
        2,
        "--output",
    ]
    args = [str(arg) for arg in args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = functools.partial(
        subprocess.Popen, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    killed = start([*args, str(options.output)])
    for shown in killed.stdout:
        if " 3/13 " in shown:
            break
    killed.kill()
    # The pipe ends with the last process that holds it: none is left to train.
    killed.communicate(timeout=30)
    assert list((options.output / "unfinished").iterdir())
    number = len(rows_of(options.output / "table3.csv"))
    assert 3 <= number < 13

    whole = options.output.with_name("whole")
    for more in ([str(options.output), "--resume"], [str(whole)]):
        resumed = start([*args, *more])
        assert " 12/13 " in resumed.communicate()[0] and resumed.returncode == 0
    assert by_key(options.output / "table3.csv") == by_key(whole / "table3.csv")


def test_settings_of_scales_variants_and_optimizers(options):
    meshes = Meshes(options.data[0], options)

    def settings(model, fewer=1, experiment=FEW, **changes):
        o = replace(options, **changes)
        found = settings_of("x", meshes, Setting(model, fewer=fewer), experiment, o)
        run = Run(found, 0)
        return run["variant"], run["optimizer"], int(run["epochs"])

    # 37 meshes are three steps an epoch.
    qem, spirals = spectral("qem"), spiral("qem")
    assert settings(qem, scale="small")[:3] == ("default", "one_cycle", 567)
    assert settings(qem, scale="small", fewer=10)[2] == 57
    assert settings(qem, steps=10)[2] == 4
    assert settings(qem, scale="full")[:3] == ("published", "sgd", 300)
    assert settings(spirals, scale="full")[:3] == ("published", "adam", 200)
    assert settings(spirals, scale="full", variant="default")[:2] == ("default", "adam")
    assert settings(spirals, scale="full", optimizer="one_cycle")[1:3] == ("one_cycle", 200)
    assert settings(qem, optimizer="published")[:2] == ("default", "sgd")
    assert settings(qem, experiment=replace(FEW, variant="published"))[0] == "published"
    assert settings(pca(4), scale="full")[:3] == ("", "", 0)


def test_keys_are_stable():
    run = Run(tuple("abcdefghij"), 3)
    assert run.key == Run(tuple("abcdefghij"), 3).key == "d832dd28bb131dcd"
    assert len({run.key, Run(tuple("abcdefghij"), 4).key, Run(tuple("abcdefghix"), 3).key}) == 3


def test_time_left():
    fast, slow, new = (Run((kind, *"bcdefghij"), 0) for kind in ("fast", "slow", "new"))
    assert time_left([fast], []) is None

    def row(run, seconds):
        return {**dict(zip(SETTINGS, run.settings, strict=True)), "seconds": seconds}

    rows = [row(fast, "1.0"), row(fast, "2.0"), row(slow, "9.0")]
    assert time_left([fast, fast, slow], rows) == 1.5 + 1.5 + 9.0
    assert time_left([new], rows) == 4.0


def test_results_of_other_settings_are_refused(options):
    one = replace(FEW, table={"QEM": {"error": Setting(spectral("qem"))}})
    options = replace(options, seeds=(0,))
    sweep(one, options)
    content = (options.output / "few.csv").read_bytes()

    with pytest.raises(ValueError, match=r"no results in .*few.csv \(got 1 runs\): pass --resume"):
        sweep(one, options)
    again = replace(options, resume=True)
    for message, experiment, changed in (
        ("got variant default in line 2", one, replace(again, variant="published")),
        ("got epochs 2 in line 2", one, replace(again, steps=20)),
        (
            "got model .* in line 2",
            replace(one, table={"QEM": {"error": Setting(spectral("qem", wider=True))}}),
            again,
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(experiment, changed)
    assert (options.output / "few.csv").read_bytes() == content
    lines = content.splitlines(keepends=True)
    (options.output / "few.csv").write_bytes(content + lines[1])
    with pytest.raises(ValueError, match=r"once in .*few.csv \(got that of line 3 twice\)"):
        sweep(one, again)


@pytest.mark.slow
def test_runs_of_other_sweeps_are_taken_over(options, monkeypatch, tmp_path):
    sweep(FEW, options)
    first = options.output / "few.csv"
    one = replace(
        FEW,
        name="one",
        table={"QEM": {"error": Setting(spectral("qem")), "new": Setting(spectral("qem", 3))}},
    )
    trained = []
    train = jobs.train

    def counted(run, *args):
        trained.append((json.loads(run["model"])["latent_channels"], run.seed))
        return train(run, *args)

    monkeypatch.setattr(jobs, "train", counted)
    other = replace(options, output=tmp_path / "other", seeds=(1, 2), reuse=(first,))
    content = first.read_bytes()
    first.write_bytes(content + b"torn")  # a sweep that is still running
    found = sweep(one, other)[options.data[0]]
    assert first.read_bytes() == content + b"torn"
    assert sorted(trained) == [(3, 1), (3, 2), (8, 2)]
    (row,) = [row for row in rows_of(other.output / "one.csv") if row in rows_of(first)]
    assert row in found["QEM"]["error"].rows and row["seed"] == "1"
    with pytest.raises(FileNotFoundError, match="results of a sweep in .*none.csv"):
        again = replace(other, resume=True, reuse=(tmp_path / "none.csv",))
        sweep(one, again)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"data": ("face",)}, ValueError, r"faces, bodies, .*synhand or a folder .*\(got 'face'\)"),
        ({"data": ()}, ValueError, "different 'data', at least one"),
        ({"data": ("coma",)}, FileNotFoundError, "https://coma.is.tue.mpg.de"),
        ({"data": ("dfaust",)}, FileNotFoundError, "https://dfaust.is.tue.mpg.de"),
        ({"data": ("synhand",)}, FileNotFoundError, "arxiv.org/abs/1808.09208"),
        ({"seeds": (1, 1)}, ValueError, r"different 'seeds', at least one \(got \[1, 1\]\)"),
        ({"steps": 0}, ValueError, r"positive 'steps' \(got 0\)"),
        ({"jobs": 0}, ValueError, r"positive 'jobs' \(got 0\)"),
    ],
)
def test_bad_options_end_the_sweep_before_any_work(options, changes, error, message):
    with pytest.raises(error, match=message):
        sweep(FEW, replace(options, **changes))
    assert not options.output.exists()


def test_an_empty_folder_is_no_data(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        sweep(FEW, replace(options, data=(str(tmp_path / "empty"),)))
