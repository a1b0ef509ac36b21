r"""What the scripts of the paper's tables and figures share: a sweep of trainings over settings and
seeds whose results are kept run by run, and the table or figure made of them."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import measure
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import (
    AnnyBodies,
    AnnyFaces,
    AnnyHands,
    CoMA,
    DynamicFAUST,
    MeshDataset,
    RegisteredMeshes,
    SynHand,
)
from pyg_attnpool.files import replacing
from pyg_attnpool.mesh import decimate
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.models import MeshAutoencoder, coma, neural3dmm
from pyg_attnpool.training import quiet_lightning

BATCH_SIZE = 16
RESIDENT = 8 << 30  # bytes of training meshes beyond which they are read while training

# Of a smoke run: vertices of the template, how many times fewer every level has, training and other
# meshes, epochs.
SMOKE_VERTICES, SMOKE_FACTORS, SMOKE_MESHES, SMOKE_EPOCHS = 400, [2.5] * 4, (48, 16, 16), 2

# The published optimizer and number of epochs of every family of models.
FAMILIES = {"coma": (coma, "paper", 300), "neural3dmm": (neural3dmm, "neural3dmm", 200)}

# The optimizers by the names that results know them by.
OPTIMIZERS = {"paper": "sgd", "neural3dmm": "adam", "fast": "one_cycle"}

# The default start of attention, spelt out: results tell what was trained, whatever the default is.
START = {"init": "lifted", "normalization": "softmax", "fusion_weight": -2.0}

# Sets of the kind that the paper's numbers are of.
REPORTED_ON = ("coma", "faces")


class Recipe(NamedTuple):
    r"""How models are trained, and what attention and latent code are where a setting does not say
    otherwise."""

    optimizer: str | None
    r"""One of :obj:`OPTIMIZERS`; :obj:`None` is the published one."""
    attention: dict[str, Any]
    r"""Arguments of the attention layers."""
    latent_activation: str | None
    r"""That of spectral models; spiral ones have none."""
    variant: str
    r"""As in :func:`~pyg_attnpool.models.coma`."""


RECIPES = {
    "paper": Recipe(None, {}, "relu", "published"),
    "published": Recipe("fast", {}, "relu", "published"),
    "fast": Recipe("fast", START, None, "default"),
}


@dataclass
class Options:
    data: tuple[str, ...] = ("faces",)
    """faces, bodies or hands, made here; coma, dfaust or synhand; or folders of registered
    meshes."""
    scale: Literal["smoke", "small", "full"] = "small"
    """A few steps on a mesh of a few hundred vertices; about an hour on two cores; or as many
    epochs as published, on as many meshes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: Literal["paper", "published", "fast"] | None = None
    """paper: model and optimizer as published. published: the published model with a one-cycle
    learning rate. fast: that with keys lifted to the sphere, a softmax, w_a from -2 and a linear
    latent, for every pooling. By default paper at full scale, else what the script says."""
    steps: int | None = None
    """Steps of a run, in place of the scale's."""
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    jobs: int = 1
    """Runs that train side by side, each in a process with its share of the cores."""
    root: Path = Path("data")
    """Folder of the data sets: AnnyFaces, AnnyBodies and AnnyHands are made there; CoMA,
    DynamicFAUST and SynHand are where these put their files."""
    unit: Literal["m", "cm", "mm"] = "m"
    """The unit of the folders' meshes."""
    output: Path | None = None
    """Folder for everything written; by default runs/ and the name of script, scale and data."""
    resume: bool = False
    """Go on where an earlier sweep into the same folder was cut off."""
    reuse: tuple[Path, ...] = ()
    """CSV files of other sweeps. What they have of the same settings and seeds is taken from there:
    tables share settings, and a run takes hours at full scale."""


@dataclass(frozen=True)
class Setting:
    r"""What a cell of a table shows the results of.

    Args:
        model (dict): As :func:`spectral`, :func:`spiral` and :func:`pca` return. With
            :obj:`"fixed"`, attention layers are frozen as they start, and nothing of them learned.
        reported (dict, optional): The paper's values of statistics.
        split (dict, optional): Arguments of :meth:`MeshDataset.split`.
        fewer (int, optional): How many times fewer steps it gets below full scale, as its steps
            take so much longer. (default: :obj:`1`)
    """

    model: dict[str, Any]
    reported: dict[str, float] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    fewer: int = 1


# Settings by row and column.
Table = dict[Any, dict[str, Setting]]


@dataclass(frozen=True)
class Experiment:
    r"""A table or figure.

    Args:
        name (str): That of the script and of the files that it writes.
        title (str): What it shows.
        table (dict or callable): Settings by row and column, or what makes them of a data set.
        rows (str, optional): What the rows are.
        statistics (tuple, optional): Columns of the results to show, a table for each.
        steps (int, optional): Steps of a run at small scale. (default: :obj:`1700`)
        recipe (str, optional): Below full scale. (default: :obj:`"fast"`)
        notes (tuple, optional): Sentences below the tables.
        draw (callable, optional): Draws the results of every data set into a figure.
    """

    name: str
    title: str
    table: Table | Callable[[MeshDataset], Table]
    rows: str = ""
    statistics: tuple[str, ...] = ("mean",)
    steps: int = 1700
    recipe: str = "fast"
    notes: tuple[str, ...] = ()
    draw: "Callable[[Figure, dict[str, Results]], None] | None" = None


def spectral(pool: str, latent_channels: int = 8, **kwargs: Any) -> dict[str, Any]:
    r"""The arguments of :func:`~pyg_attnpool.models.coma`."""
    return {"family": "coma", "pool": pool, "latent_channels": latent_channels, **kwargs}


def spiral(pool: str, latent_channels: int = 8, **kwargs: Any) -> dict[str, Any]:
    r"""The arguments of :func:`~pyg_attnpool.models.neural3dmm`."""
    return {"family": "neural3dmm", "pool": pool, "latent_channels": latent_channels, **kwargs}


def pca(latent_channels: int = 8) -> dict[str, Any]:
    r"""The arguments of :class:`~pyg_attnpool.models.PCA`."""
    return {"family": "pca", "latent_channels": latent_channels}


# Data #############################################################################


class Meshes:
    r"""A data set at a scale, with its hierarchy.

    Args:
        name (str): As in :class:`Options`.
        options (Options): Scale and places.
    """

    def __init__(self, name: str, options: Options):
        self.smoke = options.scale == "smoke"
        self.dataset = _open(name, options)
        vertices, faces = self.dataset.template
        self.kept = torch.arange(len(vertices))
        if self.smoke and len(vertices) > SMOKE_VERTICES:
            ((kept, faces),) = decimate(vertices, faces, [SMOKE_VERTICES])
            vertices, self.kept = vertices[kept], torch.from_numpy(kept)
        factors = SMOKE_FACTORS if self.smoke else None
        self.hierarchy = MeshHierarchy.from_template(
            (vertices, faces), factors=factors, cache=options.root / "hierarchies"
        )

    def split(self, **kwargs: str) -> list[Tensor | MeshDataset]:
        r"""Training, validation and test meshes."""
        parts = self.dataset.split(**kwargs)
        if self.smoke:
            # Evenly spread over the part.
            parts = [
                part[torch.linspace(0, len(part) - 1, min(num, len(part))).long()]
                for part, num in zip(parts, SMOKE_MESHES, strict=True)
            ]
            return [self.dataset.read(part)[:, self.kept] for part in parts]
        size = 12 * len(self.kept) * len(parts[0])
        train = self.dataset[parts[0]] if size > RESIDENT else self.dataset.read(parts[0])
        return [train, *(self.dataset.read(part) for part in parts[1:])]


def _open(name: str, options: Options) -> MeshDataset:
    size = ("smoke", "small", "full").index(options.scale)
    root = options.root
    if name == "faces":
        return AnnyFaces(root / "AnnyFaces", frames=(1, 20, 140)[size])
    if name == "bodies":
        return AnnyBodies(root / "AnnyBodies", frames=(1, 20, 286)[size])
    if name == "hands":
        return AnnyHands(root / "AnnyHands", meshes=(100, 3000, 100_000)[size])
    if name == "coma":
        return CoMA(root / "CoMA")
    if name == "dfaust":
        listed = root / "DynamicFAUST" / "test_list.txt"
        return DynamicFAUST(root / "DynamicFAUST", listed if listed.exists() else None)
    if name == "synhand":
        return SynHand(root / "SynHand" / "raw", cache=root / "SynHand" / "processed")
    if not Path(name).is_dir():
        raise ValueError(
            f"Expected 'data' to be faces, bodies, hands, coma, dfaust, synhand or a folder of "
            f"registered meshes (got {name!r})"
        )
    return RegisteredMeshes(name, unit=options.unit, cache=root / "RegisteredMeshes")


# Runs #############################################################################

# What decides the result of a run; a sweep goes on with runs that differ in nothing but the seed.
SETTINGS = (
    *("data", "scale", "recipe", "split", "model", "optimizer"),
    *("epochs", "batch_size", "meshes", "hierarchy"),
)
# Errors are in millimetres; "quantiles" are the percentiles of the error from 0 to 100.
MEASURED = (
    *("steps", "mean", "std", "median", "quantiles", "alive", "trained", "shipped"),
    *("seconds", "device", "versions"),
)
COLUMNS = ("key", *SETTINGS, "seed", *MEASURED)


@dataclass(frozen=True)
class Run:
    r"""One training: its settings, as they stand in the file of results."""

    settings: tuple[str, ...]
    seed: int

    @property
    def key(self) -> str:
        r"""The same for the same settings and seed, on any machine."""
        text = json.dumps([*self.settings, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getitem__(self, name: str) -> str:
        return self.settings[SETTINGS.index(name)]


def _settings(
    name: str, meshes: Meshes, setting: Setting, experiment: Experiment, options: Options
) -> tuple[str, ...]:
    scale = options.scale
    recipe = options.recipe or ("paper" if scale == "full" else experiment.recipe)
    num = len(meshes.dataset.split(**setting.split).train)
    if meshes.smoke:
        num = min(num, SMOKE_MESHES[0])
    model, optimizer, epochs = dict(setting.model), "", 0
    if model["family"] != "pca":
        _, optimizer, epochs = FAMILIES[model["family"]]
        optimizer = RECIPES[recipe].optimizer or optimizer
        steps = options.steps or (experiment.steps if scale == "small" else None)
        if steps is not None:
            epochs = -(-steps // setting.fewer * BATCH_SIZE // num)
        elif scale == "smoke":
            epochs = SMOKE_EPOCHS
        _complete(model, RECIPES[recipe])
    values = (name, scale, recipe, setting.split, model, optimizer, epochs, BATCH_SIZE, num)
    values = (*values, meshes.hierarchy.hash[:16])
    return tuple(json.dumps(v, sort_keys=True) if isinstance(v, dict) else str(v) for v in values)


def _complete(model: dict[str, Any], recipe: Recipe):
    # The recipe's arguments where a setting gives none.
    if model["family"] == "coma":
        model.setdefault("latent_activation", recipe.latent_activation)
    pools = {"down_kwargs": model["pool"], "up_kwargs": model.get("up") or model["pool"]}
    for name, pool in pools.items():
        if pool == "attention":
            model[name] = {**recipe.attention, **model.get(name, {})}


def _train(run: Run, meshes: Meshes, folder: Path, device: str, resume: bool) -> dict[str, Any]:
    r"""What a run measures."""
    start = time.perf_counter()
    train, val, test = meshes.split(**json.loads(run["split"]))
    arguments = json.loads(run["model"])
    family = arguments.pop("family")
    steps = 0
    if family == "pca":
        model = MorphableModel.pca(meshes.hierarchy, **arguments).fit(train)
        network = model.autoencoder
        trained = shipped = network.mean.numel() + network.components.numel()
    else:
        torch.manual_seed(run.seed)
        build: Callable[..., MeshAutoencoder] = FAMILIES[family][0]
        fixed = arguments.pop("fixed", False)
        variant = RECIPES[run["recipe"]].variant
        model = MorphableModel(build(meshes.hierarchy, **arguments, variant=variant))
        model = model.freeze() if fixed else model
        trained = _num_parameters(model)
        model.fit(
            train,
            val,
            output=folder,
            optimizer=OPTIMIZERS[run["optimizer"]],
            epochs=int(run["epochs"]),
            batch_size=BATCH_SIZE,
            seed=run.seed,
            accelerator=device,
            resume=resume,
        )
        # From here on attention is a fixed mapping, and the model as small as its QEM twin.
        model.freeze()
        shipped = _num_parameters(model)
        steps = int(run["epochs"]) * -(-len(train) // BATCH_SIZE)
    model.to(device)
    quantiles = np.quantile(_distances(model, test), np.linspace(0, 1, 101))
    about = measure.machine(device)
    versions = ("python", "torch", "torch_geometric")
    return {
        "steps": steps,
        **model.evaluate(test),
        "quantiles": json.dumps([float(f"{q:.4g}") for q in quantiles]),
        "trained": trained,
        "shipped": shipped,
        "seconds": float(f"{time.perf_counter() - start:.3g}"),
        "device": about.get("gpu", about["processor"]),
        "versions": ", ".join(f"{name} {about[name]}" for name in versions),
    }


def _folder(run: Run, output: Path) -> Path:
    # Where a run keeps what it needs to go on.
    return output / "unfinished" / run.key


def _trained(
    runs: list[Run], meshes: dict[str, Meshes], output: Path, device: str, options: Options
) -> Generator[tuple[Run, dict[str, Any]], None, None]:
    # Runs and what they measured, in the order in which they end.
    if options.jobs == 1:
        for run in runs:
            folder = _folder(run, output)
            yield run, _train(run, meshes[run["data"]], folder, device, options.resume)
        return
    # Processes and not threads, which would wait for each other's Python.
    threads = max(1, torch.get_num_threads() // options.jobs)
    pool = ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("spawn"), _begin, (options, threads)
    )
    try:
        futures = {
            pool.submit(_train_here, run, _folder(run, output), device, options.resume): run
            for run in runs
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # After an error nobody waits for what the others train; a resumed sweep goes on with it.
        for child in multiprocessing.active_children():
            child.kill()  # a signal that Lightning does not catch
        pool.shutdown(cancel_futures=True)


# What a process that trains beside others has opened: the same files, mapped to memory.
_meshes: dict[str, Meshes] = {}


def _begin(options: Options, threads: int):
    # A sweep that is killed must not leave behind what writes to the folders of its runs.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    quiet_lightning()
    sys.stdout = open(os.devnull, "w")  # bars of several trainings would overwrite each other
    _meshes.update((name, Meshes(name, options)) for name in options.data)


def _train_here(run: Run, folder: Path, device: str, resume: bool) -> dict[str, Any]:
    return _train(run, _meshes[run["data"]], folder, device, resume)


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _distances(model: MorphableModel, x: Tensor) -> np.ndarray:
    # Per vertex, in millimetres.
    device = model.mean.device
    blocks = (b.to(device) for b in x.split(64))
    return torch.cat([vertex_distances(model(b), b).flatten().cpu() for b in blocks]).numpy()


class ResultsFile:
    r"""The finished runs of a sweep, a line each. A line is on the disk before the next run begins;
    one that a crash tore is dropped.

    Args:
        path (str or Path): The CSV file.

    Raises:
        ValueError: If the file is something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict[str, str]] = []
        self.torn: int | None = None
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # cut off when it is written to: it may be a running sweep's
            self.torn = len(whole)
        reader = csv.DictReader(io.StringIO(whole.decode()))
        if whole and tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"Expected results of a sweep in {self.path} (got other columns)")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"Expected {len(COLUMNS)} values in line {reader.line_num} of {self.path} "
                    f"(got another number)"
                )
            self.rows.append(row)

    def append(self, row: dict[str, Any]):
        r"""Adds a finished run."""
        if self.torn is not None:
            os.truncate(self.path, self.torn)
            self.torn = None
        line = io.StringIO()
        writer = csv.DictWriter(line, COLUMNS, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(line.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append({name: str(row[name]) for name in COLUMNS})

    def check(self, runs: Sequence[Run]):
        r"""Raises a :class:`ValueError` if a finished run is of none of the settings, whatever the
        seed, or stands there twice."""
        known = {run.settings for run in runs}
        keys = set()
        for number, row in enumerate(self.rows, start=2):
            if row["key"] in keys:
                raise ValueError(
                    f"Expected every run once in {self.path} (got that of line {number} twice): "
                    f"did two sweeps write to it?"
                )
            keys.add(row["key"])
            if tuple(row[name] for name in SETTINGS) not in known:
                # What no run has at all, or else a combination.
                other = [n for n in SETTINGS if row[n] not in {run[n] for run in runs}]
                name = other[0] if other else "model"
                raise ValueError(
                    f"Expected runs of this sweep in {self.path} (got {name} {row[name]} in line "
                    f"{number}): choose another 'output'"
                )


def sweep(experiment: Experiment, options: Options) -> "dict[str, Results]":
    r"""Trains what is not trained yet, then writes and prints the table and draws the figure.

    Returns:
        The results for every data set, by row and column.

    Raises:
        FileNotFoundError: If a data set is missing.
        ValueError: If options do not fit each other, or there are results of other settings.
    """
    _check(options)
    quiet_lightning()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output
    if output is None:
        names = [Path(name).name for name in options.data]
        output = Path("runs") / "-".join([experiment.name, options.scale, *names])

    meshes = {name: Meshes(name, options) for name in options.data}
    tables = {
        name: experiment.table(m.dataset) if callable(experiment.table) else experiment.table
        for name, m in meshes.items()
    }
    cells = [
        (name, row, column, _settings(name, meshes[name], setting, experiment, options))
        for name, table in tables.items()
        for row, columns in table.items()
        for column, setting in columns.items()
    ]
    # Settings that stand in several cells run once. All settings before the next seed, so that soon
    # the time is known that each takes.
    every = (_run(settings, seed) for seed in options.seeds for *_, settings in cells)
    runs = list(dict.fromkeys(every))
    results = ResultsFile(output / f"{experiment.name}.csv")
    if results.rows and not options.resume:
        raise ValueError(
            f"Expected no results in {results.path} (got {len(results.rows)} runs): pass --resume "
            f"to go on with them, or choose another 'output'"
        )
    results.check(runs)
    _take_over(results, runs, options.reuse)
    done = {row["key"] for row in results.rows}
    left = [run for run in runs if run.key not in done]
    bar = _Bar(experiment.name, len(runs), options.jobs)
    bar.show(left, results.rows)
    with closing(_trained(list(left), meshes, output, device, options)) as trained:
        for run, measured in trained:
            settings = dict(zip(SETTINGS, run.settings, strict=True))
            results.append({"key": run.key, **settings, "seed": run.seed, **measured})
            shutil.rmtree(_folder(run, output), ignore_errors=True)
            left.remove(run)
            bar.show(left, results.rows)
    shutil.rmtree(output / "unfinished", ignore_errors=True)

    keys = {run.key for run in runs}
    done = [row for row in results.rows if row["key"] in keys]
    found: dict[str, Results] = {name: {} for name in tables}
    for name, row, column, settings in cells:
        of_cell = [r for r in done if tuple(r[n] for n in SETTINGS) == settings]
        cell = Cell(of_cell, tables[name][row][column].reported if name in REPORTED_ON else {})
        found[name].setdefault(row, {})[column] = cell
    print(_report(experiment, options, output, device, meshes, found))
    return found


def _take_over(results: ResultsFile, runs: list[Run], paths: Sequence[Path]):
    wanted = {run.key for run in runs} - {row["key"] for row in results.rows}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"Expected results of a sweep in {path} (got no such file)")
        for row in ResultsFile(path).rows:
            if row["key"] in wanted:
                results.append(row)
                wanted.remove(row["key"])


def _run(settings: tuple[str, ...], seed: int) -> Run:
    # Where nothing is trained, nothing is random.
    run = Run(settings, seed)
    return Run(settings, 0) if run["epochs"] == "0" else run


def _check(options: Options):
    for name in ("data", "seeds"):
        values = getattr(options, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"Expected different '{name}', at least one (got {list(values)})")
    for name in ("steps", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected positive '{name}' (got {value})")


class _Bar:
    # Finished runs and the time left, on a line of their own, since training draws bars below.
    def __init__(self, name: str, total: int, jobs: int):
        self.name, self.total, self.jobs = name, total, jobs
        self.start = time.monotonic()

    def show(self, left: list[Run], rows: Sequence[dict[str, str]]):
        seconds = time_left(left, rows)
        left_over = "" if seconds is None else f"{tqdm.format_interval(seconds / self.jobs)} left"
        line = tqdm.format_meter(
            self.total - len(left),
            self.total,
            time.monotonic() - self.start,
            ncols=80,
            prefix=self.name,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
            postfix=left_over,
        )
        print(line, flush=True)


def time_left(runs: Sequence[Run], rows: Sequence[dict[str, str]]) -> float | None:
    r"""Seconds that runs will take, given finished ones: as long as others of the same settings, or
    else as an average one."""
    if not rows:
        return None
    taken: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        settings = tuple(row[name] for name in SETTINGS)
        taken.setdefault(settings, []).append(float(row["seconds"]))
    average = statistics.mean(float(row["seconds"]) for row in rows)
    return sum(statistics.mean(taken.get(run.settings, [average])) for run in runs)


# Tables and figures ###############################################################


@dataclass(frozen=True)
class Cell:
    r"""The results of one setting, a row for each seed, and what the paper reports of it."""

    rows: list[dict[str, str]]
    reported: dict[str, float]

    def values(self, statistic: str) -> list[float]:
        return [float(row[statistic]) for row in self.rows]

    def mean(self, statistic: str = "mean") -> float:
        return statistics.mean(self.values(statistic))

    def error(self, statistic: str = "mean") -> float | None:
        r"""The standard error of the mean over seeds; of one seed it is not known."""
        values = self.values(statistic)
        return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

    @property
    def steps(self) -> int:
        return int(self.rows[0]["steps"])

    @property
    def alive(self) -> str:
        r"""How many latent dimensions are alive, over the seeds."""
        low, high = (int(f(self.values("alive"))) for f in (min, max))
        return f"{low}" if low == high else f"{low} to {high}"

    @property
    def latent(self) -> int:
        return json.loads(self.rows[0]["model"])["latent_channels"]

    def text(self, statistic: str, steps: int) -> str:
        r"""What the table shows, with a word on what sets it apart from other cells, of which most
        had :obj:`steps`."""
        if statistic in ("trained", "shipped"):
            return f"{int(self.mean(statistic)):,}"
        text = f"{self.mean(statistic):.3f}"
        if self.error(statistic) is not None:
            text += f" ± {self.error(statistic):.3f}"
        notes = []
        if min(self.values("alive")) < self.latent:
            notes.append(f"{self.alive} of {self.latent} alive")
        if self.steps not in (0, steps):
            notes.append(f"{self.steps:,} steps")
        return f"{text} ({', '.join(notes)})" if notes else text


# Cells by row and column.
Results = dict[Any, dict[str, Cell]]

STATISTICS = {
    "mean": "mean error (mm)",
    "std": "standard deviation of the error (mm)",
    "median": "median error (mm)",
    "trained": "parameters in training",
    "shipped": "parameters shipped",
}


def columns(results: Results) -> list[str]:
    r"""The columns that any row has, in order."""
    return list(dict.fromkeys(column for cells in results.values() for column in cells))


def _report(
    experiment: Experiment,
    options: Options,
    output: Path,
    device: str,
    meshes: dict[str, Meshes],
    found: dict[str, Results],
) -> str:
    tables, values, runs = {}, [], []
    for name, results in found.items():
        steps = max(cell.steps for cells in results.values() for cell in cells.values())
        for statistic in experiment.statistics:
            lines = []
            for row, cells in results.items():
                line = {experiment.rows: str(row)}
                for column in columns(results):
                    cell = cells.get(column)
                    reported = cell and cell.reported.get(statistic)
                    line[f"{column}, reported"] = reported
                    line[f"{column}, here"] = cell and cell.text(statistic, steps)
                    if cell:
                        about = {"data": name, "row": row, "column": column}
                        about |= {"statistic": statistic, "reported": reported}
                        mean, error = cell.mean(statistic), cell.error(statistic)
                        values.append({**about, "mean": mean, "standard_error": error})
                lines.append(line)
            tables[f"{experiment.title}: {STATISTICS[statistic]}, {name}"] = lines
        for row, cells in results.items():
            for column, cell in cells.items():
                runs.append(
                    {
                        "data": name,
                        experiment.rows: str(row),
                        "column": column,
                        "runs": len(cell.rows),
                        "steps": cell.steps,
                        "latent dimensions alive": f"{cell.alive} of {cell.latent}",
                        "parameters in training": int(cell.mean("trained")),
                        "shipped": int(cell.mean("shipped")),
                        "seconds a run": statistics.median(cell.values("seconds")),
                    }
                )
    tables["Runs"] = runs
    notes = [
        "Mean ± standard error over seeds. Errors are Euclidean distances of vertices of test "
        "meshes in millimetres.",
        "Reported are the paper's numbers on COMA as far as this project knows them, beside faces "
        "alone.",
        *experiment.notes,
    ]
    if experiment.draw is not None:
        figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
        experiment.draw(figure, found)
        with replacing(output / f"{experiment.name}.png") as temporary:
            figure.savefig(temporary, dpi=120)
        notes.append(f"![{experiment.title}]({experiment.name}.png)")
    recipe = options.recipe or ("paper" if options.scale == "full" else experiment.recipe)
    seeds = " ".join(map(str, options.seeds))
    about = {"scale": options.scale, "recipe": recipe, "seeds": seeds}
    for name, m in meshes.items():
        about[name] = f"{len(m.dataset)} meshes, levels {m.hierarchy.num_vertices}"
    about |= measure.machine(device)
    command = measure.command()
    return measure.report(output, experiment.name, command, values, tables, about, notes)


def lines(figure: Figure, found: dict[str, Results], label: str, log: bool = False):
    r"""Draws the mean error over the rows, with its standard error, a line for every column and
    axes for every data set.

    Args:
        figure (matplotlib.figure.Figure): The figure to draw in.
        found (dict): The results of every data set.
        label (str): What the rows are: numbers, or names, which no line connects.
        log (bool, optional): If set to :obj:`True`, numbers are on a scale of powers of two.
            (default: :obj:`False`)
    """
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, (name, results) in zip(axes, found.items(), strict=True):
        if log:
            ax.set_xscale("log", base=2)
        for column in columns(results):
            cells = {row: cells[column] for row, cells in results.items() if column in cells}
            ax.errorbar(
                list(cells),
                [cell.mean() for cell in cells.values()],
                [cell.error() or 0 for cell in cells.values()],
                fmt="o" if isinstance(next(iter(cells)), str) else "o-",
                capsize=3,
                label=column,
            )
        ax.set_xticks(list(results), [str(row) for row in results])
        ax.minorticks_off()
        ax.set(title=name, xlabel=label, ylabel="mean error (mm)")
    # One for all data sets, beside the axes: lines cross every corner.
    drawn = axes[0].get_legend_handles_labels()
    figure.legend(*drawn, loc="outside upper center", ncols=2 * len(found))
