r"""The runner: trains what an experiment's settings ask for, and writes its table or figure."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.paper.data import Meshes
from benchmarks.paper.experiment import Experiment, Setting, shortest
from benchmarks.paper.jobs import folder_of, trained
from benchmarks.paper.options import Options
from benchmarks.paper.progress import Progress
from benchmarks.paper.results import ResultsFile
from benchmarks.paper.run import BATCH_SIZE, FAMILIES, SETTINGS, Run
from benchmarks.paper.tables import Cell, Results, write
from pyg_attnpool.training import epochs_for, quiet_lightning

SMOKE_EPOCHS = 2

# Sets of the kind that the paper's numbers are of.
REPORTED_ON = ("coma", "faces")


def sweep(experiment: Experiment, options: Options) -> dict[str, Results]:
    r"""Trains what is not trained yet, then writes and prints the table and draws the figure.

    Returns:
        The results for every data set, by row and column.

    Raises:
        FileNotFoundError: If a data set is missing.
        ValueError: If options do not fit each other, or there are results of other settings.
    """
    options.check()
    quiet_lightning()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output
    if output is None:
        names = [Path(name).name for name in options.data]
        output = Path("runs") / "-".join([experiment.name, options.scale, *names])

    meshes = {name: Meshes(name, options) for name in options.data}
    cells = []
    for name, m in meshes.items():
        table = experiment.table
        table = table(m.dataset, options) if callable(table) else table
        for row, columns in table.items():
            for column, setting in columns.items():
                if _possible(m, setting):
                    settings = settings_of(name, m, setting, experiment, options)
                    cells.append((name, row, column, setting, settings))
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
    results.take_over(runs, options.reuse)
    done = {row["key"] for row in results.rows}
    left = [run for run in runs if run.key not in done]
    progress = Progress(experiment.name, len(runs), options.jobs)
    progress.show(left, results.rows)
    with closing(trained(list(left), meshes, output, device, options)) as finished:
        for run, measured in finished:
            settings = dict(zip(SETTINGS, run.settings, strict=True))
            results.append({"key": run.key, **settings, "seed": run.seed, **measured})
            shutil.rmtree(folder_of(run, output), ignore_errors=True)
            left.remove(run)
            progress.show(left, results.rows)
    shutil.rmtree(output / "unfinished", ignore_errors=True)

    keys = {run.key for run in runs}
    rows = [row for row in results.rows if row["key"] in keys]
    found: dict[str, Results] = {name: {} for name in meshes}
    for name, row, column, setting, settings in cells:
        of_cell = [r for r in rows if tuple(r[n] for n in SETTINGS) == settings]
        cell = Cell(of_cell, setting.reported if name in REPORTED_ON else {})
        found[name].setdefault(row, {})[column] = cell
    variant, optimizer = choice(experiment, options)
    about = {"scale": options.scale, "variant": variant, "optimizer": optimizer}
    about["seeds"] = " ".join(map(str, options.seeds))
    for name, m in meshes.items():
        about[name] = f"{len(m.dataset)} meshes, levels {m.hierarchy.num_vertices}"
    print(write(experiment, output, found, about))
    return found


def choice(experiment: Experiment, options: Options) -> tuple[str, str]:
    r"""The variant of the models and their optimizer, where the options leave them open."""
    full = options.scale == "full"
    variant = options.variant or ("published" if full else experiment.variant)
    return variant, options.optimizer or ("published" if full else "one_cycle")


def settings_of(
    name: str, meshes: Meshes, setting: Setting, experiment: Experiment, options: Options
) -> tuple[str, ...]:
    r"""The values of :obj:`SETTINGS`, as they stand in the file of results."""
    family = FAMILIES[setting.model["family"]]
    num = meshes.num_train(**setting.split)
    model, variant, optimizer, epochs = setting.model, "", "", 0
    if family.epochs:
        variant, optimizer = choice(experiment, options)
        model = shortest(model, variant)
        optimizer = family.optimizer if optimizer == "published" else optimizer
        steps = options.steps or (experiment.steps if options.scale == "small" else None)
        if steps is not None:
            epochs = epochs_for(-(-steps // setting.fewer), num, BATCH_SIZE)
        else:
            epochs = SMOKE_EPOCHS if options.scale == "smoke" else family.epochs
    values = (name, options.scale, variant, setting.split, model, optimizer, epochs)
    values = (*values, BATCH_SIZE, num, meshes.template)
    return tuple(json.dumps(v, sort_keys=True) if isinstance(v, dict) else str(v) for v in values)


def _possible(meshes: Meshes, setting: Setting) -> bool:
    # PCA has fewer components than there are meshes.
    few = setting.model["latent_channels"] >= meshes.num_train(**setting.split)
    return setting.model["family"] != "pca" or not few


def _run(settings: tuple[str, ...], seed: int) -> Run:
    # Where nothing is trained step by step, nothing is random.
    run = Run(settings, seed)
    return Run(settings, 0) if run["epochs"] == "0" else run
