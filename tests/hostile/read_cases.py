r"""Reads every file of a corpus in a process of its own, which may take only a little memory more
than it has when it starts: ``python -m tests.hostile.read_cases SEED DAMAGED FOLDER``. The name of
each file is printed before it is read, so that the last line tells where a run hangs or dies."""

import resource
import sys
import warnings
from pathlib import Path

import numpy as np

from pyg_attnpool.mesh import read_mesh
from tests.hostile.corpus import corpus
from tests.hostile.strict import strict

MEMORY = 128 << 20  # more than the process has after its imports, for files of a few kilobytes


def same(got, expected):
    return all(
        np.array_equal(a, np.reshape(b, (-1, 3))) for a, b in zip(got, expected, strict=True)
    )


def main(seed: int, num_damaged: int, folder: Path):
    warnings.simplefilter("error")
    cases = corpus(seed, num_damaged)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    right = refused = 0
    for case in cases:
        print(case.name, flush=True)
        path = folder / case.name
        path.write_bytes(case.content)
        truth = strict(case.name, case.content)
        if case.mesh is not None and (truth is None or not same(truth, case.mesh)):
            raise AssertionError(f"{case.name}: the strict reader is wrong")
        try:
            got = read_mesh(path)
        except ValueError as e:
            if truth is not None or case.name not in str(e):
                raise AssertionError(f"{case.name}: refused, or not named ({e})") from e
            refused += 1
        else:
            if truth is None or not same(got, truth):
                raise AssertionError(
                    f"{case.name}: read, and it is {truth and 'another'}"
                ) from None
            right += 1
        path.unlink()
    print(right, refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
