r"""Campaigns of hostile cases. A family is a module of this folder with ``case(number, folder)``,
which raises AssertionError for a wrong answer. Cases run one after another in a process that may
take only a little more memory than it starts with and only a few seconds for a case; where it dies
or hangs, another goes on behind the case that did it."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = ("held", "wrong", "another error", "out of memory", "hangs", "dies")
HUNG = "hung"
IMPORTS = 600  # seconds before the first case


class Result(NamedTuple):
    number: int
    verdict: str
    said: str  # the case's name, and what it said


def campaign(
    family: str, start: int, stop: int, package: Path | None = None, seconds: float = 30
) -> Iterator[Result]:
    r"""Runs cases, and yields what becomes of each.

    Args:
        family (str): The module.
        start (int): The first case.
        stop (int): One more than the last.
        package (Path, optional): A checkout of another version of the package to run on.
            (default: :obj:`None`)
        seconds (float, optional): How long a case may take. (default: :obj:`30`)
    """
    with importing(package) as (folder, environment):
        while start < stop:
            with tempfile.TemporaryFile("w+") as errors:
                command = [sys.executable, "-m", "tests.hostile", family, str(start), str(stop)]
                begun, hung = "before any case", False
                with subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                ) as process:
                    for line in lines(process, seconds):
                        if line == HUNG:
                            hung = True
                            break
                        found = json.loads(line)
                        begun = found.get("name", begun)
                        if "verdict" in found:
                            yield Result(start, found["verdict"], f"{begun}: {found['said']}")
                            start += 1
                            begun = "after the last case"
                    process.kill()
                status = process.returncode
                if start < stop:
                    errors.seek(0)
                    said = f"{begun}: ended with {status}, {errors.read()[-400:]}"
                    if begun == "before any case":
                        raise RuntimeError(said)
                    yield Result(start, "hangs" if hung else "dies", said)
                    start += 1


@contextmanager
def importing(package: Path | None) -> Iterator[tuple[Path, dict[str, str]]]:
    r"""A working folder and an environment in which Python finds these tests and a package."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if package is None:
        yield ROOT, environment
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyg_attnpool").symlink_to(package.resolve() / "pyg_attnpool")
        environment["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT)])
        yield Path(folder), environment


def lines(process: subprocess.Popen, seconds: float) -> Iterator[str]:
    r"""The lines of a process, which is killed if one takes too long: then :obj:`HUNG` is last."""
    limit = float(IMPORTS)
    while True:
        late = threading.Event()

        def kill(late: threading.Event = late) -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        if not line.endswith("\n"):
            if late.is_set():
                yield HUNG
            return
        limit = seconds
        yield line
