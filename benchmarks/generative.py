r"""What models of the same size and steps are like as generators of new meshes:

    python -m benchmarks.generative --data faces hands bodies --seeds 0

Real meshes stand beside the models and tell what a value can be.

A finished model is a line of :obj:`generative.csv` in the folder of results, on the disk before the
next one begins. A call into the same folder goes on where the last one ended, and writes the table
:obj:`generative.md` of all that is there of the same sizes.
"""

import statistics
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import report
from benchmarks.peers.data import load
from benchmarks.peers.registry import BATCH_SIZE
from benchmarks.peers.rows import append_row, read_rows, rounded
from pyg_attnpool import MorphableModel, metrics
from pyg_attnpool.training import epochs_for, quiet_lightning

REAL = "real meshes"
MODELS = {
    "PCA": MorphableModel.pca,
    "CoMA, learned": MorphableModel.coma,
    "CoMA, learned, variational": lambda h, n: MorphableModel.coma(h, n, variational=True),
    "modal": MorphableModel.modal,
}
KEYS = ("data", "latent", "steps", "samples", "model", "seed")
MEASURED = {
    "generalisation": "generalisation (mm)",
    "specificity": "specificity (mm)",
    "compactness": "compactness",
    "diversity": "diversity (mm)",
    "coverage": "coverage",
    "nearest neighbor accuracy": "1-NN accuracy",
    "collapsed latent channels": "collapsed channels",
}
COLUMNS = (*KEYS, *MEASURED)


@dataclass
class Options:
    data: tuple[str, ...] = ("faces",)
    """Sets, as in benchmarks.peers."""
    seeds: tuple[int, ...] = (0,)
    """Of the training and of the samples."""
    latent: int = 8
    """Latent channels, and components of PCA."""
    steps: int = 425
    """Training steps, rounded up to whole epochs."""
    samples: int = 200
    """Meshes that a model makes, and test meshes beside them."""
    root: Path = Path("data")
    """Folder of the data sets."""
    output: Path = Path("runs") / "generative"
    """Folder of the results."""


def main(options: Options):
    quiet_lightning()
    path = options.output / "generative.csv"
    sizes = {name: str(getattr(options, name)) for name in ("latent", "steps", "samples")}
    for data in options.data:
        done = {(row["seed"], row["model"]) for row in _of(path, sizes) if row["data"] == data}
        every = product(options.seeds, (REAL, *MODELS))
        left = [(seed, name) for seed, name in every if (str(seed), name) not in done]
        if not left:
            continue
        hierarchy, (train, val, test), _ = load(data, options.root)
        for seed, name in left:
            generator = torch.Generator().manual_seed(seed)
            if name == REAL:
                row = real(train, test, options.samples, generator)
            else:
                torch.manual_seed(seed)
                model = MODELS[name](hierarchy, options.latent)
                row = measured(model, (train, val, test), seed, options, generator)
            row = {column: rounded(row[column]) for column in MEASURED if column in row}
            key = {"data": data, **sizes, "model": name, "seed": seed}
            append_row(path, COLUMNS, dict.fromkeys(COLUMNS, "") | key | row)
            print(data, name, seed, row, flush=True)
    print(written(_of(path, sizes), options))


def measured(
    model: MorphableModel,
    parts: tuple[Tensor, Tensor, Tensor],
    seed: int,
    options: Options,
    generator: torch.Generator,
) -> dict[str, float]:
    r"""Trains a model and measures what it makes."""
    train, val, test = parts
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have collapsed")  # a column tells it
        model.fit(
            train,
            val,
            epochs=epochs_for(options.steps, len(train), BATCH_SIZE),
            batch_size=BATCH_SIZE,
            seed=seed,
            freeze=True,
            accelerator="cpu",
            enable_progress_bar=False,
        )
    return metrics.generation(model, train, test, options.samples, generator) | model.summary


def real(train: Tensor, test: Tensor, n: int, generator: torch.Generator) -> dict[str, float]:
    r"""What real meshes reach: training meshes as samples, and test meshes beside training ones."""
    test = test[torch.linspace(0, len(test) - 1, min(n, len(test))).long()]
    drawn = train[torch.randperm(len(train), generator=generator)[: len(test)]]
    return {
        "specificity": metrics.specificity(test, train),
        "diversity": metrics.diversity(test),
        "coverage": metrics.coverage(drawn, test),
        "nearest neighbor accuracy": metrics.nearest_neighbor_accuracy(drawn, test),
    }


def _of(path: Path, sizes: dict[str, str]) -> list[dict[str, str]]:
    return [row for row in read_rows(path, COLUMNS) if sizes.items() <= row.items()]


def written(rows: list[dict[str, str]], options: Options) -> str:
    r"""Writes the table, means over seeds, and returns it."""
    tables = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        seeds = sorted({row["seed"] for row in mine}, key=int)
        tables[f"{data}, seeds {' '.join(seeds)}"] = [
            {"": name}
            | {
                title: _cell([row[column] for row in mine if row["model"] == name])
                for column, title in MEASURED.items()
            }
            for name in (*MODELS, REAL)
        ]
    about: dict[str, Any] = report.machine("cpu") | {
        name: getattr(options, name) for name in ("latent", "steps", "samples")
    }
    notes = [
        "Mean ± standard error over seeds of training and of samples; PCA has no seed of training.",
        "Generalisation: error of reconstructed test meshes. Specificity: from a sample to the "
        "closest training mesh.",
        "Compactness: share of the variance of reconstructed training meshes along one direction.",
        "Diversity: between two samples. Coverage: share of test meshes closest to some sample. "
        "1-NN accuracy: of samples and test meshes told apart; one half is best.",
        "Real meshes: specificity and diversity of test meshes; coverage and 1-NN accuracy of "
        "random training meshes as samples.",
        "The variational network has its defaults; its divergence gets full weight at step 500.",
    ]
    return report.write(options.output, "generative", report.command(), rows, tables, about, notes)


def _cell(cells: list[str]) -> str | None:
    values = [float(cell) for cell in cells if cell]
    if not values:
        return None
    error = report.standard_error(values)
    return f"{statistics.mean(values):.3g}" + ("" if error is None else f" ± {error:.2g}")


if __name__ == "__main__":
    main(tyro.cli(Options, description="Models as generators of new meshes, at equal size."))
