r"""Figure 10: the part of all vertices whose error is below a bound, as a curve over the bound;
quadric (QEM) and learned aggregation, spectral and spiral, 8 latent dimensions."""

import json

import numpy as np
import tyro
from experiments import Experiment, Options, Results, Setting, spectral, spiral, sweep
from matplotlib.figure import Figure

TABLE = {
    "QEM": {
        "spectral": Setting(spectral("qem"), {"mean": 0.939}),
        "spiral": Setting(spiral("qem"), {"mean": 0.785}),
    },
    "attention": {
        "spectral": Setting(spectral("attention"), {"mean": 0.519}),
        "spiral": Setting(spiral("attention"), {"mean": 0.487}),
    },
}


def draw(figure: Figure, found: dict[str, Results]):
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, (name, results) in zip(axes, found.items(), strict=True):
        curves = {
            f"{row}, {column}": np.array([json.loads(run["quantiles"]) for run in cell.rows])
            for row, cells in results.items()
            for column, cell in cells.items()
        }
        percent = np.arange(101)
        for i, (label, error) in enumerate(curves.items()):
            for seed in error:
                ax.plot(seed, percent, color=f"C{i}", linewidth=0.5, alpha=0.5)
            ax.plot(error.mean(axis=0), percent, color=f"C{i}", label=label)
        # The last percent is long.
        end = max(error[:, 99].max() for error in curves.values())
        ax.set(title=name, xlim=(0, end), ylim=(0, 100))
        ax.set(xlabel="error (mm)", ylabel="vertices below (%)")
        ax.legend(loc="lower right")


def main(options: Options):
    experiment = Experiment(
        "figure10",
        "Cumulative error",
        TABLE,
        rows="aggregation",
        statistics=("mean", "median"),
        notes=("Thin lines are seeds.",),
        draw=draw,
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
