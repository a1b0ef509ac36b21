r"""How files are written and recognised."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy import ndarray


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    r"""Yields a temporary name beside :obj:`path`, with the same suffix; what is written there
    takes the place of :obj:`path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    r"""Yields a temporary folder beside :obj:`path`. When the block ends without an error, it takes
    the place of :obj:`path` as a whole; until then an older folder stays as it is. That takes two
    renames: a kill between them leaves the older folder beside :obj:`path`, under a hidden name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    older = temporary.with_name(f"{temporary.name}.old")
    try:
        temporary.chmod(0o755)
        yield temporary
        if path.exists():
            os.rename(path, older)
        try:
            os.rename(temporary, path)
        except OSError:
            if older.exists():
                os.rename(older, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def digest(arrays: dict[str, ndarray]) -> str:
    r"""The SHA-256 of arrays: names, types, shapes and content, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()
