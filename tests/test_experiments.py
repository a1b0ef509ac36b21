import copy
import csv
import functools
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(
    str(Path(__file__).parents[1] / "benchmarks")
)  # scripts import each other from there
tyro = pytest.importorskip("tyro")
for name in ("openmesh", "pytorch_lightning", "matplotlib"):
    pytest.importorskip(name)

import experiments  # noqa: E402
from experiments import (  # noqa: E402
    Cell,
    Experiment,
    Options,
    ResultsFile,
    Run,
    Setting,
    pca,
    spectral,
    spiral,
)

from pyg_attnpool import MorphableModel  # noqa: E402
from pyg_attnpool.mesh import write_mesh  # noqa: E402
from pyg_attnpool.training import MeshTraining  # noqa: E402
from tests.mesh.meshes import blob  # noqa: E402

SCRIPTS = (
    *("table1", "table2", "table3", "table8", "table9", "table10", "table11", "table12"),
    "ablation",
    *("figure3", "figure10", "figure15", "figure16", "figure17", "figure18_19"),
)
QUICK = ("table1", "figure10", "figure18_19")


@pytest.fixture(autouse=True)
def one_thread():
    r"""Threads of two processes on the same cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    r"""Stretched blobs of about 10 cm: two subjects, three expressions, eight frames."""
    folder = tmp_path_factory.mktemp("scans")
    vertices, faces = blob(2, seed=0)
    rng = np.random.default_rng(0)
    for subject in ("ann", "bob"):
        for expression in ("calm", "glad", "sad"):
            (folder / subject / expression).mkdir(parents=True)
            for frame in range(8):
                mesh = rng.uniform(0.09, 0.11, 3) * vertices
                write_mesh(folder / subject / expression / f"{frame}.ply", mesh, faces)
    return folder


@pytest.fixture
def options(folder, tmp_path):
    return Options(
        data=(str(folder),),
        scale="smoke",
        seeds=(0, 1),
        device="cpu",
        root=tmp_path / "data",
        output=tmp_path / "out",
    )


FEW = Experiment(
    "few",
    "A few settings",
    {
        "QEM": {"simple": Setting(spectral("qem")), "small": Setting(spectral("qem", 4))},
        "attention": {"simple": Setting(spectral("attention")), "small": Setting(spiral("qem", 4))},
        # Stands for itself and in another cell.
        "again": {"simple": Setting(spectral("qem")), "PCA": Setting(pca(4))},
    },
)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def untimed(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]


# Sweeps ###########################################################################


def test_rows_are_the_grid(options, folder):
    found = experiments.sweep(FEW, options)[str(folder)]
    rows = rows_of(options.output / "few.csv")
    assert tuple(rows[0]) == experiments.COLUMNS
    models = [json.loads(row["model"]) for row in rows]
    kinds = [(m["family"], m.get("pool"), m["latent_channels"]) for m in models]
    trained = [("coma", "qem", 8), ("coma", "qem", 4), ("coma", "attention", 8)]
    trained.append(("neural3dmm", "qem", 4))
    # PCA knows no seed, and the setting that stands twice runs once.
    assert kinds == [*trained, ("pca", None, 4), *trained]
    assert [row["seed"] for row in rows] == ["0"] * 5 + ["1"] * 4
    assert len({row["key"] for row in rows}) == len(rows)
    for row, (family, pool, latent) in zip(rows, kinds, strict=True):
        assert row["data"] == str(folder) and row["scale"] == "smoke" and row["recipe"] == "fast"
        # 48 meshes: 6 are test, 5 validation.
        assert row["meshes"] == "37" and row["epochs"] == ("0" if family == "pca" else "2")
        assert row["steps"] == ("0" if family == "pca" else "6")
        assert 0 <= int(row["alive"]) <= latent
        assert (int(row["trained"]) > int(row["shipped"])) == (pool == "attention")
        quantiles = json.loads(row["quantiles"])
        assert len(quantiles) == 101 and quantiles == sorted(quantiles)
        assert quantiles[50] == pytest.approx(float(row["median"]), rel=1e-3)
        assert float(row["seconds"]) > 0 and torch.__version__.split("+")[0] in row["versions"]
    # The fast recipe's attention and linear latent, spelt out.
    assert models[2]["up_kwargs"] == experiments.START
    assert models[0]["latent_activation"] is None
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
    found = experiments.sweep(replace(FEW, table=table), options)[options.data[0]]
    fixed, learned = (found[name]["error"].rows[0] for name in table)
    assert fixed["trained"] == fixed["shipped"] == learned["shipped"]
    assert int(learned["trained"]) > int(learned["shipped"])
    assert fixed["mean"] != learned["mean"]


class Killed(Exception):
    pass


def test_killed_twice_is_as_never_killed(options, monkeypatch):
    whole = replace(options, output=options.output.with_name("whole"))
    experiments.sweep(FEW, whole)

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
            experiments.sweep(FEW, replace(options, resume=resume))
        finished.append(len(rows_of(options.output / "few.csv")))
    experiments.sweep(FEW, replace(options, resume=True))
    assert finished == [1, 6]
    assert untimed(options.output / "few.csv") == untimed(whole.output / "few.csv")
    # Eight trainings, two of which began once more, where their last whole epoch had ended.
    assert len(starts) == 8 + 2 and len(set(starts)) == 8
    assert count[0] == 8 * 6 + 2 * 1
    values = [json.loads((o.output / "few.json").read_text())["rows"] for o in (options, whole)]
    assert values[0] == values[1]

    # Nothing is left to do, and more seeds add to what is there.
    before = (options.output / "few.csv").read_bytes()
    experiments.sweep(FEW, replace(options, resume=True))
    assert (options.output / "few.csv").read_bytes() == before and len(starts) == 10
    experiments.sweep(FEW, replace(options, resume=True, seeds=(5, 0, 1)))
    after = (options.output / "few.csv").read_bytes()
    assert after.startswith(before) and len(starts) == 14


def by_key(path):
    return sorted(untimed(path), key=lambda row: row["key"])


def test_side_by_side_is_as_one_by_one(options):
    aside = replace(options, output=options.output.with_name("aside"), jobs=2)
    for o in (options, aside):
        experiments.sweep(FEW, o)
    assert by_key(aside.output / "few.csv") == by_key(options.output / "few.csv")
    values = [json.loads((o.output / "few.json").read_text())["rows"] for o in (options, aside)]
    assert values[0] == values[1]
    assert not multiprocessing.active_children()

    # What goes wrong in one process ends the sweep, and the other process with it.
    keys = [row["key"] for row in rows_of(options.output / "few.csv")]
    again = replace(aside, output=options.output.with_name("again"))
    (again.output / "unfinished").mkdir(parents=True)
    (again.output / "unfinished" / keys[1]).write_text("no folder")
    with pytest.raises(OSError, match=keys[1]):
        experiments.sweep(FEW, again)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_killed_side_by_side(options, folder):
    script = Path(experiments.__file__).with_name("table3.py")
    args = ["--data", folder, "--scale", "smoke", "--device", "cpu", "--root", options.root]
    args = [sys.executable, script, *args, "--seeds", 0, 1, 2, "--jobs", 2, "--output"]
    args = [str(arg) for arg in args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    sweep = functools.partial(subprocess.Popen, env=env, stdout=subprocess.PIPE, text=True)
    killed = sweep([*args, str(options.output)])
    for shown in killed.stdout:
        if " 3/12 " in shown:
            break
    killed.kill()
    # The pipe ends with the last process that holds it: none is left to train.
    killed.communicate(timeout=30)
    assert list((options.output / "unfinished").iterdir())
    number = len(rows_of(options.output / "table3.csv"))
    assert 3 <= number < 12

    whole = options.output.with_name("whole")
    for more in ([str(options.output), "--resume"], [str(whole)]):
        resumed = sweep([*args, *more])
        assert " 12/12 " in resumed.communicate()[0] and resumed.returncode == 0
    assert by_key(options.output / "table3.csv") == by_key(whole / "table3.csv")


def test_settings_of_scales_and_recipes(options):
    meshes = experiments.Meshes(options.data[0], options)

    def settings(model, fewer=1, experiment=FEW, **changes):
        o = replace(options, **changes)
        found = experiments._settings("x", meshes, Setting(model, fewer=fewer), experiment, o)
        run = Run(found, 0)
        return run["recipe"], run["optimizer"], int(run["epochs"]), json.loads(run["model"])

    # 37 meshes are three steps an epoch; as many epochs as it takes to see so many batches.
    assert settings(spectral("qem"), scale="small")[:3] == ("fast", "fast", 736)
    assert settings(spectral("qem"), scale="small", fewer=10)[2] == 74
    assert settings(spectral("qem"), steps=10)[2] == 5
    assert settings(spectral("qem"), scale="full")[:3] == ("paper", "paper", 300)
    assert settings(spiral("qem"), scale="full")[:3] == ("paper", "neural3dmm", 200)
    assert settings(spiral("qem"), scale="full", recipe="fast")[:3] == ("fast", "fast", 200)

    published = settings(spectral("attention"), recipe="paper")[3]
    assert published["latent_activation"] == "relu" and published["up_kwargs"] == {}
    # Only attention takes arguments, and those of a setting win.
    mixed = settings(spectral("qem", up="attention", up_kwargs={"init": "normal"}))[3]
    assert mixed["up_kwargs"] == {**experiments.START, "init": "normal"}
    assert "down_kwargs" not in mixed
    assert "latent_activation" not in settings(spiral("qem"))[3]


def test_keys_are_stable():
    run = Run(tuple("abcdefghij"), 3)
    assert run.key == Run(tuple("abcdefghij"), 3).key == "d832dd28bb131dcd"
    assert len({run.key, Run(tuple("abcdefghij"), 4).key, Run(tuple("abcdefghix"), 3).key}) == 3


def test_time_left():
    fast, slow, new = (Run((kind, *"bcdefghij"), 0) for kind in ("fast", "slow", "new"))
    assert experiments.time_left([fast], []) is None

    def row(run, seconds):
        return {**dict(zip(experiments.SETTINGS, run.settings, strict=True)), "seconds": seconds}

    rows = [row(fast, "1.0"), row(fast, "2.0"), row(slow, "9.0")]
    assert experiments.time_left([fast, fast, slow], rows) == 1.5 + 1.5 + 9.0
    assert experiments.time_left([new], rows) == 4.0


# The file of results ##############################################################


def line(**values):
    return {name: values.get(name, "1") for name in experiments.COLUMNS}


def test_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "x.csv"
    file = ResultsFile(path)
    model = json.dumps({"family": "coma", "text": 'a "b", c'})
    for key in "ab":
        file.append(line(key=key, model=model))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    # Whatever of the last line has reached the disk.
    for cut in (ends[1] + 1, ends[2] - 20, ends[2] - 1):
        path.write_bytes(whole[:cut])
        file = ResultsFile(path)
        assert [row["key"] for row in file.rows] == ["a"] and file.rows[0]["model"] == model
        file.append(line(key="b", model=model))
        assert path.read_bytes() == whole
        assert file.rows == ResultsFile(path).rows
    # Nor is a torn header kept.
    path.write_bytes(whole[:10])
    file = ResultsFile(path)
    file.append(line(key="a", model=model))
    file.append(line(key="b", model=model))
    assert path.read_bytes() == whole


def test_damaged_or_foreign_files_are_refused(tmp_path, options):
    path = tmp_path / "x.csv"
    path.write_text("name,error\nqem,1.0\n")
    with pytest.raises(ValueError, match=r"results of a sweep in .*x.csv \(got other columns\)"):
        ResultsFile(path)
    path.unlink()
    ResultsFile(path).append(line())
    with open(path, "a") as file:
        file.write("1,2,3\n")
    with pytest.raises(ValueError, match=r"values in line 3 of .*x.csv \(got another number\)"):
        ResultsFile(path)


def test_results_of_other_settings_are_refused(options):
    one = replace(FEW, table={"QEM": {"error": Setting(spectral("qem"))}})
    options = replace(options, seeds=(0,))
    experiments.sweep(one, options)
    content = (options.output / "few.csv").read_bytes()

    with pytest.raises(ValueError, match=r"no results in .*few.csv \(got 1 runs\): pass --resume"):
        experiments.sweep(one, options)
    again = replace(options, resume=True)
    for message, experiment, changed in (
        ("got recipe fast in line 2", one, replace(again, recipe="published")),
        ("got epochs 2 in line 2", one, replace(again, steps=20)),
        (
            "got model .* in line 2",
            replace(one, table={"QEM": {"error": Setting(spectral("qem", wider=True))}}),
            again,
        ),
    ):
        with pytest.raises(ValueError, match=message):
            experiments.sweep(experiment, changed)
    assert (options.output / "few.csv").read_bytes() == content
    lines = content.splitlines(keepends=True)
    (options.output / "few.csv").write_bytes(content + lines[1])
    with pytest.raises(ValueError, match=r"once in .*few.csv \(got that of line 3 twice\)"):
        experiments.sweep(one, again)


def test_runs_of_other_sweeps_are_taken_over(options, monkeypatch, tmp_path):
    experiments.sweep(FEW, options)
    first = options.output / "few.csv"
    one = replace(
        FEW,
        name="one",
        table={"QEM": {"error": Setting(spectral("qem")), "new": Setting(spectral("qem", 3))}},
    )
    trained = []
    train = experiments._train

    def counted(run, *args):
        trained.append((json.loads(run["model"])["latent_channels"], run.seed))
        return train(run, *args)

    monkeypatch.setattr(experiments, "_train", counted)
    other = replace(options, output=tmp_path / "other", seeds=(1, 2), reuse=(first,))
    content = first.read_bytes()
    first.write_bytes(content + b"torn")  # a sweep that is still running
    found = experiments.sweep(one, other)[options.data[0]]
    assert first.read_bytes() == content + b"torn"
    assert sorted(trained) == [(3, 1), (3, 2), (8, 2)]
    (row,) = [row for row in rows_of(other.output / "one.csv") if row in rows_of(first)]
    assert row in found["QEM"]["error"].rows and row["seed"] == "1"
    with pytest.raises(FileNotFoundError, match="results of a sweep in .*none.csv"):
        again = replace(other, resume=True, reuse=(tmp_path / "none.csv",))
        experiments.sweep(one, again)


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
        experiments.sweep(FEW, replace(options, **changes))
    assert not options.output.exists()


def test_an_empty_folder_is_no_data(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        experiments.sweep(FEW, replace(options, data=(str(tmp_path / "empty"),)))


def test_units_and_places_of_data(options, folder):
    meshes = experiments.Meshes(options.data[0], options)
    small = experiments.Meshes(options.data[0], replace(options, unit="mm"))
    torch.testing.assert_close(small.dataset.vertices, 0.001 * meshes.dataset.vertices)
    assert meshes.hierarchy.num_vertices == [162, 65, 26, 11, 5]
    assert [len(part) for part in meshes.split()] == [37, 5, 6]
    # Synthetic hands, in millimetres, are drawn one by one.
    (options.root / "SynHand").mkdir(parents=True)
    (options.root / "SynHand" / "raw").symlink_to(folder)
    hands = experiments.Meshes("synhand", options)
    torch.testing.assert_close(hands.dataset.vertices, small.dataset.vertices)
    assert [len(part) for part in hands.split()] == [38, 5, 5]


# Tables ###########################################################################


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


def test_table_has_the_numbers_of_the_file(options, folder, monkeypatch):
    monkeypatch.setattr(experiments, "REPORTED_ON", (str(folder),))
    table = copy.deepcopy(FEW.table)
    table["QEM"]["simple"] = replace(table["QEM"]["simple"], reported={"mean": 0.939})
    experiments.sweep(replace(FEW, table=table, rows="pooling"), options)
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


# Scripts ##########################################################################


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS]
)
def test_script(options, folder, name):
    script = importlib.import_module(name)
    kind = script.LatentOptions if name == "figure3" else Options
    args = ["--data", folder, "--scale", "smoke", "--seeds", 0, "--device", "cpu"]
    args += ["--root", options.root, "--output", options.output]
    args += ["--latent", 4, 8] if name == "figure3" else []
    script.main(tyro.cli(kind, args=[str(arg) for arg in args]))
    rows = rows_of(options.output / f"{name}.csv")
    text = (options.output / f"{name}.md").read_text()
    assert rows and text.count("\n| ") > len(rows) and "nan" not in text
    assert name.startswith("figure") == (options.output / f"{name}.png").exists()
    if name.startswith("figure"):
        assert (options.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    expected = {
        "table1": 6,
        "table2": 4,
        "table3": 4,
        "table8": 3 * 3,  # expressions and models
        "table9": 4,
        "table10": 4,
        "table11": 3,
        "table12": 5,
        "ablation": 11 * 2,
        "figure3": 2 * 4,
        "figure10": 4,
        "figure15": 2,
        "figure16": 6,
        "figure17": 5,
        "figure18_19": 11,  # both figures share k = 2 and 32
    }
    assert len(rows) == expected[name]


def test_table8_needs_expressions(options, tmp_path):
    table8 = importlib.import_module("table8")
    vertices, faces = blob(2, seed=0)
    (tmp_path / "flat").mkdir()
    for i in range(30):
        write_mesh(tmp_path / "flat" / f"{i:02d}.ply", (1 + 0.01 * i) * vertices, faces)
    with pytest.raises(ValueError, match="known 'expression'"):
        table8.main(replace(options, data=(str(tmp_path / "flat"),)))


@pytest.mark.slow
def test_sets_made_here_at_smoke_scale(options):
    sizes = {}
    for name in ("faces", "bodies", "hands"):
        meshes = experiments.Meshes(name, options)
        sizes[name] = meshes.hierarchy.num_vertices
        parts = meshes.split()
        assert [len(part) for part in parts] == [48, *(min(16, len(p)) for p in parts[1:])]
        assert all(part.shape[1:] == (400, 3) for part in parts)
    assert all(size == [400, 160, 64, 26, 11] for size in sizes.values())
