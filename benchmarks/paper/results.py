r"""The file of a sweep's results, by which it goes on where it was cut off."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.run import MEASURED, SETTINGS, Run

COLUMNS = ("key", *SETTINGS, "seed", *MEASURED)


class ResultsFile:
    r"""The finished runs of a sweep, a line each. A line is on the disk before the next run begins;
    one that a crash tore is dropped.

    Args:
        path (str or Path): The CSV file.

    Raises:
        ValueError: If the file is something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict[str, str]] = []
        self.torn: int | None = None
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # cut off when it is written to: it may be a running sweep's
            self.torn = len(whole)
        reader = csv.DictReader(io.StringIO(whole.decode()))
        if whole and tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"Expected results of a sweep in {self.path} (got other columns)")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"Expected {len(COLUMNS)} values in line {reader.line_num} of {self.path} "
                    f"(got another number)"
                )
            self.rows.append(row)

    def append(self, row: dict[str, Any]):
        r"""Adds a finished run."""
        if self.torn is not None:
            os.truncate(self.path, self.torn)
            self.torn = None
        line = io.StringIO()
        writer = csv.DictWriter(line, COLUMNS, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(line.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append({name: str(row[name]) for name in COLUMNS})

    def check(self, runs: Sequence[Run]):
        r"""Raises a :class:`ValueError` if a finished run is of none of the settings, whatever the
        seed, or stands there twice."""
        known = {run.settings for run in runs}
        keys = set()
        for number, row in enumerate(self.rows, start=2):
            if row["key"] in keys:
                raise ValueError(
                    f"Expected every run once in {self.path} (got that of line {number} twice): "
                    f"did two sweeps write to it?"
                )
            keys.add(row["key"])
            if tuple(row[name] for name in SETTINGS) not in known:
                # What no run has at all, or else a combination.
                other = [n for n in SETTINGS if row[n] not in {run[n] for run in runs}]
                name = other[0] if other else "model"
                raise ValueError(
                    f"Expected runs of this sweep in {self.path} (got {name} {row[name]} in line "
                    f"{number}): choose another 'output'"
                )

    def take_over(self, runs: Sequence[Run], paths: Sequence[Path]):
        r"""Adds what the files of other sweeps have of runs that are not here yet."""
        wanted = {run.key for run in runs} - {row["key"] for row in self.rows}
        for path in paths:
            for row in ResultsFile(path).rows:
                if row["key"] in wanted:
                    self.append(row)
                    wanted.remove(row["key"])
