r"""The files that a benchmark leaves: a table to read, its values to compute with, and where they
come from."""

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pyg_attnpool.files import replacing


def machine(device: str | torch.device) -> dict[str, Any]:
    r"""What a time depends on and a reader may know: no names of hosts, no paths."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["python"] = platform.python_version()
    for package in ("torch", "torch_geometric", "torch_sparse"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found | {"date": datetime.date.today().isoformat()}


def command() -> str:
    r"""The command line of this run."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])


def write(
    folder: str | Path,
    name: str,
    command: str,
    rows: Sequence[dict[str, Any]],
    tables: dict[str, Sequence[dict[str, Any]]],
    about: dict[str, Any],
    notes: Sequence[str] = (),
) -> str:
    r"""Writes :obj:`NAME.json` and :obj:`NAME.md`, each in one piece, and returns the latter.

    Args:
        folder (str or Path): Where to.
        name (str): The name of both files.
        command (str): The command line.
        rows (list): All measured values, in units that their names tell.
        tables (dict): What is shown of them, under headings; a row maps columns to cells.
        about (dict): Machine, seed and other settings.
        notes (list, optional): Sentences below the tables. (default: :obj:`()`)
    """
    content = {"command": command, "about": about, "rows": list(rows), "notes": list(notes)}
    lines = [f"# {name}", "", f"    {command}", ""]
    lines += [", ".join(f"{key} {cell(value)}" for key, value in about.items()), ""]
    for heading, table in tables.items():
        columns = list(dict.fromkeys(column for row in table for column in row))
        cells = [[cell(row.get(column)) for column in columns] for row in table]
        lines += [f"## {heading}", "", *_line(columns, ["---"] * len(columns), *cells), ""]
    lines += [f"* {note}" for note in notes]
    markdown = "\n".join(lines).rstrip() + "\n"
    for suffix, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", markdown)):
        with replacing(Path(folder) / f"{name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return markdown


def _line(*rows: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def standard_error(values: Sequence[float]) -> float | None:
    r"""That of the mean over seeds; of one seed it is not known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def cell(value: Any) -> str:
    r"""A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
