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


@contextmanager
def damage_named(path: str | Path, content: str) -> Iterator[None]:
    r"""Reading within this block names a damaged file: libraries raise some twenty types of errors,
    few of which tell the file.

    Args:
        path (str or Path): The file that is read.
        content (str): What it should hold, as in :obj:`"a whole archive"`.

    Raises:
        ValueError: For every error but :class:`FileNotFoundError`, :class:`ImportError` and
            :class:`MemoryError`.
    """
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError):
        raise
    except Exception as e:
        if isinstance(e, ValueError) and str(path) in str(e):
            raise
        raise ValueError(f"Expected {content} in {path} (got: {str(e) or type(e).__name__})") from e


def read_arrays(path: str | Path, content: str = "a whole file of arrays") -> dict[str, ndarray]:
    r"""The arrays of a :obj:`.npz` file, every one of which fits its checksum. Nothing is
    unpickled.

    Args:
        path (str or Path): The file.
        content (str, optional): As of :func:`damage_named`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds Python objects.
    """
    # NumPy would leave a damaged file open that it has opened itself.
    with (
        damage_named(path, content),
        open(path, "rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        # NumPy alone looks at no checksum of an array whose header asks for less than is there.
        broken = arrays.zip.testzip()
        if broken is not None:
            raise ValueError(f"another checksum of {broken}")
        return {name: arrays[name] for name in arrays.files}


def digest(arrays: dict[str, ndarray]) -> str:
    r"""The SHA-256 of arrays: names, types, shapes and content, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()
