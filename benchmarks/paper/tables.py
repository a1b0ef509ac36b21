r"""The results of an experiment as tables, with the paper's numbers beside them."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.paper.experiment import Experiment
from pyg_attnpool.files import replacing

STATISTICS = {
    "mean": "mean error (mm)",
    "std": "standard deviation of the error (mm)",
    "median": "median error (mm)",
    "trained": "parameters in training",
    "shipped": "parameters shipped",
}
NOTES = (
    "Mean ± standard error over seeds. Errors are Euclidean distances of vertices of test meshes "
    "in millimetres.",
    "Reported are the paper's numbers on COMA as far as this project knows them, beside faces "
    "alone.",
    "PCA has the same latent size. It is computed once, in millimetres; columns that set other "
    "models apart leave it as it is.",
)


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
        return report.standard_error(self.values(statistic))

    @property
    def steps(self) -> int:
        return int(self.rows[0]["steps"])

    @property
    def alive(self) -> str:
        r"""How many latent dimensions are alive, over the seeds."""
        low, high = (int(f(self.values("alive"))) for f in (min, max))
        return f"{low}" if low == high else f"{low} to {high}"

    @property
    def model(self) -> dict[str, Any]:
        return json.loads(self.rows[0]["model"])

    @property
    def latent(self) -> int:
        return self.model["latent_channels"]

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


def columns_of(results: Results) -> list[str]:
    r"""The columns that any row has, in order."""
    return list(dict.fromkeys(column for cells in results.values() for column in cells))


def write(
    experiment: Experiment, output: Path, found: dict[str, Results], about: dict[str, Any]
) -> str:
    r"""Writes :obj:`NAME.md` and :obj:`NAME.json`, and :obj:`NAME.png` of a figure. Returns the
    first."""
    tables, values = {}, []
    for name, results in found.items():
        steps = max(cell.steps for cells in results.values() for cell in cells.values())
        for statistic in experiment.statistics:
            lines = []
            for row, cells in results.items():
                line = {experiment.rows: str(row)}
                for column in columns_of(results):
                    cell = cells.get(column)
                    reported = cell and cell.reported.get(statistic)
                    line[f"{column}, reported"] = (
                        f"{reported:.3f}" if isinstance(reported, float) else reported
                    )
                    line[f"{column}, here"] = cell and cell.text(statistic, steps)
                    if cell:
                        known = {"data": name, "row": row, "column": column}
                        known |= {"statistic": statistic, "reported": reported}
                        mean, error = cell.mean(statistic), cell.error(statistic)
                        values.append({**known, "mean": mean, "standard_error": error})
                lines.append(line)
            tables[f"{experiment.title}: {STATISTICS[statistic]}, {name}"] = lines
    tables["Runs"] = _runs(experiment, found)
    notes = [*NOTES, *experiment.notes]
    if experiment.draw is not None:
        figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
        experiment.draw(figure, found)
        with replacing(output / f"{experiment.name}.png") as temporary:
            figure.savefig(temporary, dpi=120)
        notes.append(f"![{experiment.title}]({experiment.name}.png)")
    cells = (
        cell for results in found.values() for row in results.values() for cell in row.values()
    )
    about = {**about, "versions": _different(row for cell in cells for row in cell.rows)}
    return report.write(output, experiment.name, report.command(), values, tables, about, notes)


def _runs(experiment: Experiment, found: dict[str, Results]) -> list[dict[str, Any]]:
    return [
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
            "on": _different(cell.rows, "device"),
        }
        for name, results in found.items()
        for row, cells in results.items()
        for column, cell in cells.items()
    ]


def _different(rows: Any, name: str = "versions") -> str:
    return "; ".join(dict.fromkeys(row[name] for row in rows))
