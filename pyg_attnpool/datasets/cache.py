r"""Meshes stored for the next time: vertices in a file that is mapped rather than read, so that
there may be more than memory holds, and beside it what belongs to them."""

import glob
import hashlib
import inspect
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock
from numpy import ndarray
from tqdm import tqdm

from pyg_attnpool.files import damage_named, digest, read_arrays, replacing

FLOAT = np.dtype("<f4")
T = TypeVar("T")

# Python has no name for it before 3.13.
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Source(Protocol):
    r"""A source of meshes, block after block."""

    @property
    def template(self) -> tuple[ndarray, ndarray]:
        r"""Vertices and faces."""

    @property
    def sizes(self) -> Sequence[int]:
        r"""The number of meshes in every block."""

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        r"""Further arrays to store, by names other than those of the settings."""

    def blocks(self, start: int) -> Iterator[ndarray]:
        r"""The blocks of meshes :obj:`[m, N, 3]` from number :obj:`start` on."""


def stored(
    path: Path,
    settings: Mapping[str, int | str],
    open_source: Callable[[], Source],
    description: str,
    mapped: bool = True,
) -> dict[str, ndarray]:
    r"""Meshes of a file that is whole and of these settings, or else of a source, from where they
    are stored first. One process at a time does that; others wait for it. Where it is killed, the
    next one goes on after the blocks that are whole; where it fails, nothing is left.

    Args:
        path (Path): A :obj:`.npz` file. Its vertices are in a :obj:`.npy` file of the same name if
            :obj:`mapped`.
        settings (dict): The settings that decide the content.
        open_source (callable): Returns the :class:`Source`.
        description (str): The text of the progress bar.
        mapped (bool, optional): If set to :obj:`False`, the vertices are in the :obj:`.npz` file,
            and in memory. (default: :obj:`True`)

    Returns:
        :obj:`"vertices"`, :obj:`"template"`, :obj:`"faces"` and the labels.

    Raises:
        ValueError: If the disk is full.
    """
    with suppress(ValueError):
        arrays = load(path, settings)
        if arrays is not None:
            return arrays
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    partial = path.with_name(f".{path.stem}.{key}.partial.npy")
    with progress_bar("Loading") as progress:
        # Before there is a file for the blocks: what they are made from may not be there.
        source = open_source()
        progress.set_description(description, refresh=False)
        progress.total = len(source.sizes)
        with _held(path.with_name(f".{path.stem}.lock")):
            try:
                arrays = load(path, settings)  # of the process that was waited for
            except ValueError as e:
                print(f"{e} and made again")
                arrays = None
            try:
                if arrays is None:
                    _append(partial, source, progress)
                    _save(path, settings, source, partial, mapped)
            except Exception:
                _remove_partial(path)
                raise
            _remove_partial(path)
            if arrays is not None:
                return arrays
    written = path.with_suffix(".npy") if mapped else path
    print(
        f"Made {sum(source.sizes):,} meshes of {len(source.template[0]):,} vertices, "
        f"{written.stat().st_size / 1e6:.0f} MB in {written}"
    )
    arrays = load(path, settings)
    if arrays is None:
        raise ValueError(f"Expected meshes in {path} (got no such file, just after it was written)")
    return arrays


def load(
    path: Path, settings: Mapping[str, int | str], labels: Sequence[str] = ()
) -> dict[str, ndarray] | None:
    r"""The arrays that :meth:`stored` has stored, or :obj:`None` if there are none.

    Args:
        path (Path): As of :meth:`stored`.
        settings (dict): The settings that must be the same.
        labels (list, optional): The labels that must be there. (default: :obj:`()`)

    Raises:
        ValueError: If a file is damaged or of other settings.
    """
    if not path.exists():
        return None
    try:
        arrays = read_arrays(path)
        if "vertices" not in arrays:
            arrays["vertices"] = mapped_array(path.with_suffix(".npy"))
        if str(arrays.pop("sha256", None)) != digest(arrays):
            raise ValueError("another checksum")
        made = {name: arrays.pop(name).item() for name in settings}
        missing = {"template", "faces", *labels}.difference(arrays)
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except MemoryError:
        raise
    except Exception as e:  # also of arrays that another program has written
        # As text: a name for the error would keep what is mapped open until memory is collected.
        reason = str(e.__cause__ if str(path) in str(e) else e)
        raise ValueError(f"{path} is damaged ({reason})") from e
    if made != settings:
        raise ValueError(f"{path} is of another generator or other parameters")
    return arrays


def mapped_array(path: Path) -> ndarray:
    r"""The array of a :obj:`.npy` file, read where it is looked at. It may be written to, which
    copies pages and leaves the file as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds Python objects.
    """
    with damage_named(path, "a whole file of an array"):
        array = np.lib.format.open_memmap(path, mode="r")
        if array.offset + array.nbytes != path.stat().st_size:
            raise ValueError(
                f"{path.stat().st_size} bytes instead of {array.offset + array.nbytes}"
            )
        with open(path, "rb") as file:
            if hasattr(mmap, "MAP_PRIVATE"):
                # As mode "c" of NumPy, which the system refuses where the array is larger than
                # memory, since all of it might be written to.
                pages = mmap.mmap(
                    file.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            else:  # Windows
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return np.ndarray(array.shape, array.dtype, pages, array.offset, array.strides)


def progress_bar(description: str, total: int | None = None, leave: bool = True) -> tqdm:
    r"""The progress of work that may take long: a bar that is shown after two seconds. There is
    none where a program has no stream for errors.

    Args:
        description (str): The text before the bar.
        total (int, optional): The number of its steps. (default: :obj:`None`)
        leave (bool, optional): If set to :obj:`False`, the bar goes when the work is done.
            (default: :obj:`True`)
    """
    return tqdm(desc=description, total=total, delay=2, leave=leave, disable=sys.stderr is None)


def progress(items: Collection[T], description: str, leave: bool = True) -> Iterator[T]:
    r"""Goes through items with the bar of :meth:`progress_bar`."""
    with progress_bar(description, len(items), leave) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def _writing(folder: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as e:  # the latter of earlier versions of filelock
        raise ValueError(f"Expected to write to {folder} (got: {e})") from e


@contextmanager
def _held(path: Path) -> Iterator[None]:
    # The lock of this thread alone, which others wait for. The system releases that of a process
    # that is killed; where it has no locks, files as signs instead would be waited for for ever.
    falls_back = "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    lock = FileLock(path, fallback_to_soft=False) if falls_back else FileLock(path)
    while True:
        with _writing(path.parent), open(path, "ab") as file:
            lock.acquire()
            # Whoever held it before has removed the file, or the name is still that of this one.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            lock.release()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows lets no file go that others wait with
            path.unlink()
        lock.release()


def _append(path: Path, source: Source, progress: tqdm) -> None:
    # The whole blocks of a file that was cut off at any byte, or damaged since, are kept.
    num_vertices, channels = len(source.template[0]), getattr(source, "channels", 3)
    header = _header(sum(source.sizes), num_vertices, channels)
    size = FLOAT.itemsize * channels * num_vertices
    ends = [len(header) + size * num for num in accumulate(source.sizes, initial=0)]
    sums = path.with_suffix(".sums")
    with _writing(path.parent):
        known = sums.read_text("ascii", "replace").split() if sums.exists() else []
        start = _whole_blocks(path, header, ends, known)
        sums.write_text("".join(f"{known[i]}\n" for i in range(start)), "ascii")
        file = open(path, "ab", buffering=0)  # what a full disk refuses is not tried again
    with file:
        with _writing(path.parent):
            file.truncate(ends[start] if start else 0)
            if not start:
                _write(file, header)
            needed, free = ends[-1] - ends[start], shutil.disk_usage(path.parent).free
        if free < needed:
            raise ValueError(
                f"Expected {needed / 1e6:,.0f} MB of free space for {path} "
                f"(got {free / 1e6:,.0f} MB)"
            )
        progress.update(start)
        for block in source.blocks(start):
            content = np.ascontiguousarray(block, dtype=FLOAT).data.cast("B")
            with _writing(path.parent):
                # The sum comes first: where the block is cut off after it, the two do not fit.
                with open(sums, "a", encoding="ascii") as f:
                    f.write(f"{hashlib.sha256(content).hexdigest()}\n")
                _write(file, content)
            progress.update()
        written = os.fstat(file.fileno()).st_size
    if written != ends[-1]:
        raise ValueError(f"Expected {ends[-1]} bytes in {path} (got {written})")


def _whole_blocks(path: Path, header: bytes, ends: Sequence[int], sums: Sequence[str]) -> int:
    # How many blocks at the beginning of a partial file fit their sums.
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return 0
        whole = 0
        for sha, start, end in zip(sums, ends, ends[1:], strict=False):
            if hashlib.sha256(file.read(end - start)).hexdigest() != sha:
                break
            whole += 1
        return whole


def _remove_partial(path: Path) -> None:
    # Those of other settings too, which nobody will go on with.
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.partial.*"):
        left.unlink(missing_ok=True)


def _write(file: FileIO, rest: bytes | memoryview) -> None:
    while rest:
        rest = rest[file.write(rest) :]


def _header(num_meshes: int, num_vertices: int, channels: int = 3) -> bytes:
    buffer = BytesIO()
    shape = (num_meshes, num_vertices, channels)
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": FLOAT.str, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _save(
    path: Path, settings: Mapping[str, int | str], source: Source, partial: Path, mapped: bool
) -> None:
    arrays: dict[str, Any] = {
        **{name: np.array(value) for name, value in settings.items()},
        "vertices": mapped_array(partial),
        "template": source.template[0],
        "faces": source.template[1],
        **{name: np.array(values) for name, values in source.labels.items()},
    }
    sha256 = np.array(digest(arrays))
    if mapped:
        del arrays["vertices"]
    with _writing(path.parent):
        with replacing(path) as temporary:
            np.savez(temporary, **arrays, sha256=sha256)
        del arrays  # Windows renames no file that is mapped
        if mapped:
            os.replace(partial, path.with_suffix(".npy"))
