r"""Learning curves of long trainings: the errors on validation and test meshes, the share w_a of
every attention layer and the latent dimensions alive, epoch by epoch."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.optimize import least_squares
from torch import Tensor

from benchmarks import report
from benchmarks.paper.data import Meshes
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import Options
from benchmarks.paper.registry import EXPERIMENTS
from benchmarks.paper.run import Run, fitted
from benchmarks.paper.sweep import REPORTED_ON, settings_of
from benchmarks.peers.rows import append_row, read_rows, rounded, write_rows
from pyg_attnpool import MorphableModel
from pyg_attnpool.files import replacing
from pyg_attnpool.nn import AttentionPool
from pyg_attnpool.training import quiet_lightning

ABOUT = "not in the paper: error, w_a and latent dimensions alive, epoch by epoch"
CURVES = Experiment("curves", "Learning curves", ABOUT, {}, rows="model")

# The models of figure 10, by names such as "QEM, spectral"; PCA is one of them.
TABLE = next(e.table for e in EXPERIMENTS if e.name == "figure10")
assert isinstance(TABLE, dict)
MODELS = {
    row if row == "PCA" else f"{row}, {column}": setting
    for row, columns in TABLE.items()
    for column, setting in columns.items()
}
COLUMNS = (
    *("model", "data", "scale", "variant", "optimizer", "epochs", "seed"),
    *("epoch", "steps", "val", "test", "alive", "w_a"),
)
SKIPPED = 1 / 3  # of a curve, its beginning, to which no power law is fitted


@dataclass
class CurveOptions(Options):
    scale: Literal["smoke", "small", "full"] = "full"
    seeds: tuple[int, ...] = (0,)
    models: tuple[str, ...] = ("PCA", "QEM, spectral", "attention, spectral")
    """What is trained, one after the other, of the models of figure 10. Calls for different models
    may write to one folder at the same time; each draws all curves that are there."""
    draw: bool = False
    """Trains nothing and draws what is there."""

    def check(self) -> None:
        super().check()
        unknown = set(self.models) - set(MODELS)
        if unknown:
            raise ValueError(f"Expected 'models' among {list(MODELS)} (got {sorted(unknown)})")


class Record(pl.Callback):
    r"""Writes a line after every epoch. A run that goes on drops the lines of epochs that it makes
    again."""

    def __init__(self, path: Path, about: dict[str, Any], test: Tensor):
        self.path, self.about, self.test = path, about, test

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        rows = read_rows(self.path, COLUMNS)
        made = [row for row in rows if int(row["epoch"]) <= trainer.current_epoch]
        if len(made) < len(rows):
            write_rows(self.path, COLUMNS, made)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        val = trainer.callback_metrics["val_mm"].item()
        self.write(trainer.current_epoch + 1, trainer.global_step, module.model, val)

    def write(self, epoch: int, steps: int, model: MorphableModel, val: float) -> None:
        found = model.evaluate(self.test)
        row = {
            "epoch": epoch,
            "steps": steps,
            "val": rounded(val),
            "test": rounded(found["mean"]),
            "alive": found["alive"],
            "w_a": json.dumps(shares(model)),
        }
        append_row(self.path, COLUMNS, self.about | row)


def shares(model: MorphableModel) -> list[float]:
    r"""The share w_a of every attention layer, from the input to the output."""
    layers = [module for module in model.modules() if isinstance(module, AttentionPool)]
    weights = [layer.fusion_weight for layer in layers if layer.fusion_weight is not None]
    return [rounded(weight.item()) for weight in weights]


def train(name: str, run: Run, meshes: Meshes, output: Path, options: CurveOptions) -> None:
    r"""Trains a model from where it was cut off, if it was."""
    about = {"model": name, "seed": run.seed}
    about |= {key: run[key] for key in ("data", "scale", "variant", "optimizer", "epochs")}
    words = (name.replace(",", ""), run["variant"], run["optimizer"], str(run.seed))
    path = output / f"{'-'.join(' '.join(words).split())}.csv"
    rows = read_rows(path, COLUMNS)
    other = [key for key, value in about.items() if rows and rows[0][key] != str(value)]
    if other:
        raise ValueError(
            f"Expected the curve of this training in {path} (got another {other[0]!r}): choose "
            f"another 'output'"
        )
    if rows and rows[-1]["epoch"] == run["epochs"]:
        return
    parts = meshes.split()
    record = Record(path, about, parts[2])
    model = run.model(meshes)
    folder = output / "unfinished" / run.key
    fitted(run, model, parts, folder, options.device, resume=True, callbacks=[record])
    if run["epochs"] == "0":
        record.write(0, 0, model, model.evaluate(parts[1])["mean"])
    shutil.rmtree(folder, ignore_errors=True)


def extrapolated(epoch: ndarray, error: ndarray, at: int) -> float:
    r"""What a power law that falls to a constant, :math:`c + a t^{-p}`, makes of a curve."""
    late = epoch > SKIPPED * epoch[-1]
    t, y = epoch[late], np.log(error[late])

    def law(x: ndarray, t: Any) -> Any:
        return np.log(np.exp(x[0]) + np.exp(x[1]) * t ** -np.exp(x[2]))

    start = [y[-1] - 0.5, y[0], -0.7]
    x = least_squares(lambda x: law(x, t) - y, start, loss="soft_l1", f_scale=0.02).x
    return float(np.exp(law(x, float(at))))


def read_curves(output: Path) -> list[list[dict[str, str]]]:
    r"""All curves of a folder, in the order of :obj:`MODELS`."""
    curves = [rows for path in sorted(output.glob("*.csv")) if (rows := read_rows(path, COLUMNS))]
    return sorted(curves, key=lambda rows: list(MODELS).index(rows[0]["model"]))


def summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    r"""A line of the table: how far a curve is, and where it goes."""
    first, last = rows[0], rows[-1]
    line: dict[str, Any] = {"model": label(first), "optimizer": first["optimizer"] or "-"}
    line |= {"epochs": f"{last['epoch']} of {last['epochs']}", "steps": int(last["steps"])}
    line |= {"validation (mm)": float(last["val"]), "test (mm)": float(last["test"])}
    epoch = np.array([float(row["epoch"]) for row in rows])
    error = np.array([float(row["test"]) for row in rows])
    if len(rows) >= 12 and last["epoch"] != last["epochs"]:
        half = len(rows) // 2
        line["test at the end, extrapolated (mm)"] = extrapolated(epoch, error, int(last["epochs"]))
        before = extrapolated(epoch[:half], error[:half], int(last["epoch"]))
        line["today's, from the first half (mm)"] = before
    line["latent alive"] = int(last["alive"])
    line["w_a, input to output"] = " ".join(f"{w:.2f}" for w in json.loads(last["w_a"])) or "-"
    if first["data"] in REPORTED_ON:
        line["reported (mm)"] = MODELS[first["model"]].reported.get("mean")
    return line


def label(row: dict[str, str]) -> str:
    r"""A model and how it starts, where there are several ways."""
    return f"{row['model']}, {row['variant']}" if row["variant"] else row["model"]


def ratios(curves: list[list[dict[str, str]]]) -> list[str]:
    r"""The error of attention by that of QEM after as many epochs, where both were trained."""
    by_name = {label(rows[0]) + rows[0]["seed"]: rows for rows in curves}
    found = []
    for name, rows in by_name.items():
        other = by_name.get(name.replace("attention", "QEM"), rows)
        both = min(len(rows), len(other))
        if other is not rows and both:
            ratio = float(rows[both - 1]["test"]) / float(other[both - 1]["test"])
            found.append(f"{label(rows[0])}, over QEM after {both} epochs: {ratio:.2f}.")
    return found


def draw(figure: Figure, curves: list[list[dict[str, str]]]) -> None:
    r"""Errors by epoch, and beside them what the attention layers and the latent code make."""
    figure.set_size_inches(13, 4)
    errors, weights, alive = figure.subplots(1, 3)
    for number, rows in enumerate(curves):
        color, name = f"C{number}", label(rows[0])
        epoch = [int(row["epoch"]) for row in rows]
        if epoch == [0]:
            errors.axhline(float(rows[0]["test"]), color="0.4", linestyle=":", label=name)
            continue
        errors.plot(epoch, [float(row["test"]) for row in rows], color=color, label=name)
        reported = MODELS[rows[0]["model"]].reported.get("mean")
        if reported is not None and rows[0]["variant"] == "published":
            errors.axhline(reported, color=color, linestyle="--", linewidth=0.8)
        for layer in np.array([json.loads(row["w_a"]) for row in rows]).T:
            weights.plot(epoch, layer, color=color, linewidth=0.8)
        alive.plot(epoch, [int(row["alive"]) for row in rows], color=color)
    errors.set(title="error of test meshes (mm)", xlabel="epoch", yscale="log")
    errors.yaxis.set_major_formatter("{x:g}")
    errors.yaxis.set_minor_formatter("{x:g}")
    errors.legend(fontsize=8, title="dashed: the paper's, on COMA", title_fontsize=7)
    weights.set(title="w_a of every attention layer", xlabel="epoch")
    alive.set(title="latent dimensions alive", xlabel="epoch")
    alive.yaxis.get_major_locator().set_params(integer=True)


def main(options: CurveOptions) -> None:
    r"""Trains what is not trained yet, and writes table and picture of all curves."""
    options.check()
    quiet_lightning()
    if len(options.data) > 1:
        raise ValueError(f"Expected one set in 'data' (got {list(options.data)})")
    (data,) = options.data
    output = options.output or Path("runs") / f"curves-{options.scale}-{Path(data).name}"
    if not options.draw:
        meshes = Meshes(data, options)
        for seed in options.seeds:
            for name in options.models:
                settings = settings_of(data, meshes, MODELS[name], CURVES, options)
                train(name, Run(settings, seed), meshes, output, options)
    curves = read_curves(output)
    lines = [summary(rows) for rows in curves]
    about = report.machine("cpu") | {"seeds": " ".join(map(str, options.seeds))}
    notes = (
        "After every epoch all test meshes are decoded; nothing is chosen by them.",
        "Extrapolated: a power law that falls to a constant, fitted to all but the first third; "
        "beside it what the same makes of the first half for where the curve is now.",
        *ratios(curves),
    )
    command = report.command()
    print(report.write(output, "curves", command, lines, {CURVES.title: lines}, about, notes))
    figure = Figure(layout="constrained")
    draw(figure, curves)
    with replacing(output / "curves.png") as temporary:
        figure.savefig(temporary, dpi=110)
