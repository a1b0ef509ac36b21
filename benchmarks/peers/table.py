r"""Finished runs as a table, and as a picture of error against size and training time."""

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.peers.costs import seconds_of
from benchmarks.peers.data import measured_on
from benchmarks.report import standard_error
from pyg_attnpool.files import replacing

Rows = list[dict[str, str]]
Costs = dict[tuple[str, ...], dict[str, float]]

KEYS = ("data", "meshes", "latent", "peer", "steps", "seed")
MEASURED = {
    "lr": "rate",
    "mean": "mean error (mm)",
    "median": "median",
    "p95": "95th percentile",
    "train": "mean on training meshes",
    "normals": "angle of normals (degrees)",
    "edges": "error of edges (%)",
    "roughness": "roughness, of the true one",
    "parameters": "parameters shipped",
}
COLUMNS = (*KEYS, *MEASURED)
TICKS = (1, 1.5, 2, 3, 4, 5, 7)  # of every power of ten
COSTS = ("training (s)", "a step (ms)", "decoding a mesh (ms)", "on disk (MB)")


def write_table(path: Path, rows: Rows, costs: Costs) -> str:
    r"""Writes all rows as Markdown, a table for every set, number of meshes and latent size."""
    about = f"python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        "# Peers",
        "",
        f"    {shlex.join(['python', '-m', 'benchmarks.peers', *sys.argv[1:]])}",
        "",
        f"{os.cpu_count()} cores that other work shared, {torch.get_num_threads()} thread a run, "
        f"{about}. Mean ± standard error over seeds; errors are of test meshes. Times are by "
        f"`python -m benchmarks.peers.costs`, one thread, with all meshes of a set.",
        "",
        "![Peers](peers.png)",
        "",
        *_overview(rows),
    ]
    for (data, meshes, latent), of_peers in _groups(rows).items():
        lines += [f"## {data}, {meshes} training meshes, latent size {latent}", ""]
        lines += ["| | seeds | " + " | ".join((*MEASURED.values(), *COSTS)) + " |"]
        lines += ["|---" * (len(MEASURED) + len(COSTS) + 2) + "|"]
        for (peer, steps), found in of_peers.items():
            label = peer if steps == 0 else f"{peer}, {steps:,} steps"
            cells = [_cell(name, [float(r[name]) for r in found]) for name in MEASURED]
            cost = costs.get((measured_on(data), latent, peer))
            cells += [""] * len(COSTS) if cost is None else _costs(cost, steps)
            seeds = " ".join(row["seed"] for row in found)
            lines.append(f"| {label} | {seeds} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def draw(path: Path, rows: Rows, costs: Costs) -> None:
    r"""Draws the mean test error against the parameters that ship and against the time of
    training. PCA, which has no steps, is a line."""
    groups = _groups(rows)
    figure = Figure(figsize=(10, 2.9 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False, sharey="row")
    names = dict.fromkeys(row["peer"] for row in rows)
    colors = {name: f"C{i}" for i, name in enumerate(name for name in names if name != "PCA")}
    for (size, time), ((data, meshes, latent), of_peers) in zip(axes, groups.items(), strict=True):
        for ax in (size, time):
            ax.set(xscale="log", yscale="log", title=f"{data}, {meshes} meshes, latent {latent}")
            ax.minorticks_off()
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(LogLocator(subs=TICKS))
                axis.set_major_formatter("{x:g}")
        size.set(xlabel="million parameters shipped", ylabel="mean test error (mm)")
        time.set(xlabel="training, one thread (s)")
        curves: dict[str, list[tuple[float, float]]] = {}
        for (peer, steps), found in of_peers.items():
            error = statistics.mean(float(row["mean"]) for row in found)
            if peer == "PCA":
                for ax in (size, time):
                    ax.axhline(error, color="black", linestyle="--", linewidth=1)
                continue
            size.plot(float(found[0]["parameters"]) / 1e6, error, "o", color=colors[peer])
            cost = costs.get((measured_on(data), latent, peer))
            if cost is not None:
                curves.setdefault(peer, []).append((seconds_of(cost, steps), error))
        for peer, points in curves.items():
            time.plot(*zip(*sorted(points), strict=True), "o-", color=colors[peer])
    for name, color in colors.items():
        axes[0, 0].plot([], [], "o", color=color, label=name)
    axes[0, 0].plot([], [], "--", color="black", label="PCA")
    figure.legend(loc="outside upper center", ncols=4)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _overview(rows: Rows) -> list[str]:
    # Mean errors alone, of each peer those of its fewest steps.
    groups = _groups(rows)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [
        "## Mean test error (mm)",
        "",
        "| data | meshes | latent | " + " | ".join(peers) + " |",
    ]
    lines += ["|---" * (len(peers) + 3) + "|"]
    for group, of_peers in groups.items():
        fewest: dict[str, Rows] = {}
        for (peer, _), found in sorted(of_peers.items()):
            fewest.setdefault(peer, found)
        errors = {peer: [float(row["mean"]) for row in found] for peer, found in fewest.items()}
        cells = [_cell("mean", errors[peer]) if peer in errors else "" for peer in peers]
        lines.append(f"| {' | '.join((*group, *cells))} |")
    return [*lines, ""]


def _groups(rows: Rows) -> dict[tuple[str, str, str], dict[tuple[str, int], Rows]]:
    groups: dict[tuple[str, str, str], dict[tuple[str, int], Rows]] = {}
    for row in rows:
        group = groups.setdefault((row["data"], row["meshes"], row["latent"]), {})
        group.setdefault((row["peer"], int(row["steps"])), []).append(row)
    return groups


def _costs(cost: dict[str, float], steps: int) -> Iterator[str]:
    for value in (seconds_of(cost, steps), cost["step_ms"], cost["decode_ms"], cost["disk_mb"]):
        yield f"{value:.{2 if value < 10 else 0}f}"


def _cell(name: str, values: list[float]) -> str:
    mean = statistics.mean(values)
    if name == "parameters":
        return f"{int(mean):,}"
    if name == "lr":
        return f"{mean:g}" if mean else ""
    digits = 2 + (mean < 10) + (mean < 0.1)
    text = f"{mean:.{digits}f}"
    error = standard_error(values)
    if name == "mean" and error is not None:
        text += f" ± {error:.{digits}f}"
    return text
