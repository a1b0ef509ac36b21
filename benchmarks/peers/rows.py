r"""Finished runs as lines of a file, on the disk before the next run begins."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyg_attnpool.files import replacing


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    r"""The lines of a file, if there is one.

    Raises:
        ValueError: If it has other columns.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and tuple(rows[0]) != tuple(columns):
        raise ValueError(f"Expected results of this script in {path} (got other columns)")
    return [row for row in rows if None not in row.values()]  # a torn last line is run again


def append_row(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    r"""Writes the whole file anew: a torn line of a crash goes with it."""
    write_rows(path, columns, [*read_rows(path, columns), row])


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    r"""Writes the file of these lines, in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rounded(value: float) -> float:
    r"""A measured value in the digits that a line has of it."""
    return float(f"{value:.5g}")
