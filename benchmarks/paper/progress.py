r"""How far a sweep is, and how long it will take."""

import statistics
import time
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.paper.run import SETTINGS, Run


class Progress:
    r"""Finished runs and the time left, on a line of their own, since training draws bars below."""

    def __init__(self, name: str, total: int, jobs: int):
        self.name, self.total, self.jobs = name, total, jobs
        self.start = time.monotonic()

    def show(self, left: list[Run], rows: Sequence[dict[str, str]]):
        seconds = time_left(left, rows)
        left_over = "" if seconds is None else f"{tqdm.format_interval(seconds / self.jobs)} left"
        line = tqdm.format_meter(
            self.total - len(left),
            self.total,
            time.monotonic() - self.start,
            ncols=80,
            prefix=self.name,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
            postfix=left_over,
        )
        print(line, flush=True)


def time_left(runs: Sequence[Run], rows: Sequence[dict[str, str]]) -> float | None:
    r"""Seconds that runs will take, given finished ones: as long as others of the same settings, or
    else as an average one."""
    if not rows:
        return None
    taken: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        settings = tuple(row[name] for name in SETTINGS)
        taken.setdefault(settings, []).append(float(row["seconds"]))
    average = statistics.mean(float(row["seconds"]) for row in rows)
    return sum(statistics.mean(taken.get(run.settings, [average])) for run in runs)
