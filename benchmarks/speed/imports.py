r"""The time that imports take: the package beyond torch and torch_geometric, without its public
names and with all of them; and the whole process of the command line's help. Each runs in a process
of its own, in turn."""

import statistics
import subprocess
import sys
import time
from collections import defaultdict

TIMED = """
import time, torch, torch_geometric
wall, own = time.perf_counter(), time.process_time()
{}
print(time.perf_counter() - wall, time.process_time() - own)
"""


def import_times(line: str) -> list[float]:
    r"""The seconds that pass, and those of them on the processor."""
    command = [sys.executable, "-c", TIMED.format(line)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.split()]


def help_time() -> list[float]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "pyg_attnpool.cli", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [time.perf_counter() - start]


def main(repeat: int = 9):
    taken = defaultdict(list)
    for _ in range(repeat):
        # Names are imported when they are asked for, so a user waits for those of the second line.
        for line in ("import pyg_attnpool", "from pyg_attnpool import *"):
            taken[line].append(import_times(line))
        taken["pyg-attnpool --help"].append(help_time())
    for name, runs in taken.items():
        medians = (1000 * statistics.median(run) for run in zip(*runs, strict=True))
        texts = (
            f"{t:5.0f} ms {of}" for t, of in zip(medians, ("", "of the processor"), strict=False)
        )
        print(f"{name:27}", *texts)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
