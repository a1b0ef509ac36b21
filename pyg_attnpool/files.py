r"""How files are written and recognised."""

import hashlib
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy import ndarray


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    r"""Yields a temporary name beside :obj:`path`, with the same suffix; what is written there
    takes the place of :obj:`path` when the block ends without an error and the disk has it. After
    an error or an interrupt, :obj:`path` is as it was and the temporary file is gone; a kill may
    leave the latter, under a hidden name."""
    path = Path(path)
    target = Path(os.path.realpath(path))  # behind a link
    if target.is_dir():
        raise IsADirectoryError(f"Expected a file to write to (got the folder {path})")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    r"""Writes a file whole, or leaves the old one; what was written is compared first.

    Raises:
        OSError: If the disk did not take every byte.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if temporary.read_bytes() != content:
            raise OSError(f"Expected {len(content)} bytes written to {path} (got others)")


@contextmanager
def replacing_folder(path: str | Path, check: Callable[[Path], None]) -> Iterator[Path]:
    r"""Yields a temporary folder beside :obj:`path`. When the block ends without an error, it takes
    the place of :obj:`path` as a whole; until then an older folder stays as it is. That takes two
    renames: after a kill between them, the older folder is where :meth:`whole_folder` finds it.

    Args:
        path (str or Path): The folder.
        check (callable): Raises if a folder that is there holds anything that must not be lost.

    Raises:
        NotADirectoryError: If a file is in its place.
        ValueError: If it is the working folder, or one that holds it.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"Expected a folder to write to (got the file {path})")
    if target in (here := Path(os.path.realpath("."))).parents or target == here:
        raise ValueError(
            f"Expected a folder to write to that can be replaced (got {target}, which holds the "
            f"working folder)"
        )
    older = _older(target)
    for folder in (target, older):
        if folder.is_dir() and any(folder.iterdir()):
            check(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            _flush(part)
        if target.exists():
            shutil.rmtree(older, ignore_errors=True)  # of a write that was killed at its end
            os.rename(target, older)
        try:
            os.rename(temporary, target)
        except BaseException:
            if not target.exists():
                os.rename(older, target)
            raise
        _flush(target.parent)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def whole_folder(path: str | Path) -> Path:
    r"""Where to read a folder that :meth:`replacing_folder` writes: :obj:`path`, or, where a write
    was killed between its two renames, the older folder beside it."""
    path = Path(path)
    older = _older(Path(os.path.realpath(path)))
    return older if older.is_dir() and not path.exists() else path


def _older(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _flush(path: Path) -> None:
    # To the disk. Windows has no flush of folders, and one of files that are open for writing only.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def damage_named(path: str | Path, content: str) -> Iterator[None]:
    r"""Reading within this block names a damaged file: libraries raise some twenty types of errors,
    few of which tell the file.

    Args:
        path (str or Path): The file that is read.
        content (str): The content that it should have, as in :obj:`"a whole archive"`.

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


@contextmanager
def opened_arrays(path: str | Path, content: str) -> Iterator[Any]:
    r"""A :obj:`.npz` file of which every array fits its checksum; arrays are read when they are
    asked for. Nothing is unpickled.

    Args:
        path (str or Path): The file.
        content (str): As of :func:`damage_named`.

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
        for member in arrays.zip.infolist():
            with arrays.zip.open(member) as entry:
                _check_header(entry, member.file_size, member.filename)
        yield arrays


def _check_header(entry: IO[bytes], size: int, name: str) -> None:
    # An array is as large as its header says: NumPy asks for that memory before it reads.
    major = np.lib.format.read_magic(entry)[0]
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if major not in read:
        raise ValueError(f"format {major} of {name}")
    shape, _, dtype = read[major](entry)
    needed = entry.tell() + math.prod(shape) * dtype.itemsize
    if needed != size and not dtype.hasobject:
        raise ValueError(f"{size} bytes of {name}, whose header asks for {needed}")


def read_arrays(path: str | Path, content: str = "a whole file of arrays") -> dict[str, ndarray]:
    r"""All arrays of a :obj:`.npz` file, as :func:`opened_arrays` has them."""
    with opened_arrays(path, content) as arrays:
        return {name: arrays[name] for name in arrays.files}


def file_hash(path: str | Path) -> str:
    r"""The SHA-256 of a file's content."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def digest(arrays: dict[str, ndarray]) -> str:
    r"""The SHA-256 of arrays: names, types, shapes and content, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()
