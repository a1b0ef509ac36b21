r"""State and arguments that no sound program gives: every case is taken for what it is or refused,
and no process dies. The cases are in states.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(start, stop):
    r"""Runs cases in a process of their own. Returns the ones that failed or killed it."""
    failed = []
    while start < stop:
        command = [sys.executable, "-m", "tests.hostile.states", str(start), str(stop)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        *_, last = done.stdout.splitlines() or ["nothing"]
        if last == "done":
            break
        failed.append((last, done.returncode, done.stderr[-1500:]))
        if last == "nothing" or len(failed) == 5:
            break
        start = int(last.split()[0]) + 1
    return failed


def test_cases():
    assert run(0, 450) == []


@pytest.mark.slow
@pytest.mark.parametrize("start", range(450, 9450, 1500))
def test_more_cases(start):
    assert run(start, start + 1500) == []
