r"""The results of an experiment as pictures."""

import json

import numpy as np
from matplotlib.figure import Figure

from benchmarks.paper.tables import Results, columns_of


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
        for column in columns_of(results):
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


def cumulative(figure: Figure, found: dict[str, Results]):
    r"""Draws the part of all vertices whose error is below a bound, a thin line for every seed."""
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, (name, results) in zip(axes, found.items(), strict=True):
        curves = {
            row if cell.model["family"] == "pca" else f"{row}, {column}": np.array(
                [json.loads(run["quantiles"]) for run in cell.rows]
            )
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
