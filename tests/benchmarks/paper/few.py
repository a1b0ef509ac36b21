r"""A small experiment, and the rows that it leaves."""

import csv

from benchmarks.paper.experiment import Experiment, Setting, pca, spectral, spiral
from benchmarks.paper.results import COLUMNS

FEW = Experiment(
    "few",
    "A few settings",
    "a few settings, one of which stands twice",
    {
        "QEM": {"simple": Setting(spectral("qem")), "small": Setting(spectral("qem", 4))},
        "attention": {"simple": Setting(spectral("attention")), "small": Setting(spiral("qem", 4))},
        # Stands for itself and in another cell.
        "again": {"simple": Setting(spectral("qem")), "PCA": Setting(pca(4))},
    },
    rows="pooling",
)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def untimed(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(path)]


def line(**values):
    r"""A row of results."""
    return {name: values.get(name, "1") for name in COLUMNS}
