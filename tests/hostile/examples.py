r"""A case for every verdict, which tests the campaign."""

import os
import signal
import time
from pathlib import Path


def name(number: int) -> str:
    return f"case {number}"


def case(number: int, folder: Path) -> None:
    if number == 1:
        raise AssertionError("two is three")
    if number == 2:
        raise RuntimeError("something")
    if number == 3:
        raise MemoryError
    if number == 4:
        time.sleep(1000)
    if number == 5:
        os.kill(os.getpid(), signal.SIGTERM)
