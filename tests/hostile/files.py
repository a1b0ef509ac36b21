r"""Mesh files, good and damaged (corpus.py): read as the strict reader of these tests reads them
(strict.py), or refused by name. The cases are those of a corpus for every thousand numbers."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from pyg_attnpool.mesh import read_mesh
from tests.hostile.corpus import Case, corpus
from tests.hostile.strict import strict

SIZE = 1000


@lru_cache(maxsize=2)
def block(seed: int) -> list[Case]:
    return corpus(seed, SIZE)[:SIZE]


def name(number: int) -> str:
    return block(number // SIZE)[number % SIZE].name


def same(got, expected) -> bool:
    return all(
        np.array_equal(a, np.reshape(b, (-1, 3))) for a, b in zip(got, expected, strict=True)
    )


def case(number: int, folder: Path) -> None:
    file = block(number // SIZE)[number % SIZE]
    truth = strict(file.name, file.content)
    if file.mesh is not None and (truth is None or not same(truth, file.mesh)):
        raise TypeError("the strict reader is wrong")
    path = folder / file.name
    path.write_bytes(file.content)
    try:
        got = read_mesh(path)
    except ValueError as e:
        assert truth is None, f"refused ({e})"
        assert file.name in str(e), f"refused without its name ({e})"
    else:
        assert truth is not None, "read, though it is damaged"
        assert same(got, truth), "read as another mesh"
    finally:
        path.unlink()
