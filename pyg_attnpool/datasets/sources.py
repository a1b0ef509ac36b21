r"""Registered meshes in the files that people have: a folder or an archive of mesh files, or an
array."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from pyg_attnpool.datasets.cache import FLOAT, mapped_array, progress_bar, stored
from pyg_attnpool.files import damage_named, file_hash, opened_arrays
from pyg_attnpool.mesh.io import SUFFIXES, in_single_precision, read_features, read_mesh
from pyg_attnpool.units import metres

# Part of every stored file: raised with every change of how meshes are read.
GENERATOR = 2

BLOCK = 64  # meshes read between two steps of the progress bar

# Names that begin or end like this are of files that no one has finished, or that no one means.
HIDDEN = (".", "~")
TEMPORARY = (".tmp", ".temp", ".part", ".partial")


class MeshSource:
    r"""Meshes of one topology, block after block: a :class:`~pyg_attnpool.datasets.cache.Source`
    that also says when its files have changed."""

    channels = 3
    path: Path
    template: tuple[ndarray, ndarray]
    sizes: list[int]
    labels: dict[str, list[Any]]

    def stored(self, path: Path) -> dict[str, ndarray]:
        r"""All meshes, stored as by :meth:`~pyg_attnpool.datasets.cache.stored`. They are made
        again when the place of the files or their content is another."""
        known = hashlib.sha256(f"{self.path.resolve()} {self.content()}".encode())
        for array in self.template:
            known.update(np.ascontiguousarray(array).data)
        settings: dict[str, int | str] = {"generator": GENERATOR, "source": known.hexdigest()}
        return stored(path, settings, lambda: self, f"Reading {path.stem}")

    def content(self) -> str:
        r"""A text that changes when the meshes do."""
        raise NotImplementedError

    def blocks(self, start: int) -> Iterator[ndarray]:
        r"""As of :class:`~pyg_attnpool.datasets.cache.Source`."""
        raise NotImplementedError

    def read(self) -> Tensor:
        r"""All meshes, in memory."""
        raise NotImplementedError


class MeshFiles(MeshSource):
    r"""The files of a folder or archive as a source of meshes of one topology.

    Args:
        path (Path): A folder, or a :obj:`.zip` archive.
        names (list): The files within, in the order of the meshes.
        template (tuple, optional): Vertices and faces, or the first mesh. (default: :obj:`None`)
        unit (str, optional): The unit of the files. (default: :obj:`"m"`)
        features (list, optional): As in :class:`RegisteredMeshes`. (default: :obj:`()`)
        same_surface (bool, optional): As in :class:`RegisteredMeshes`. (default: :obj:`False`)
        origin (list, optional): As in :class:`RegisteredMeshes`. (default: :obj:`(0, 0, 0)`)

    Raises:
        ValueError: As of :class:`RegisteredMeshes`, also when blocks are read.
    """

    def __init__(
        self,
        path: Path,
        names: list[str],
        template: tuple[ndarray, ndarray] | None = None,
        unit: str = "m",
        features: Sequence[str] = (),
        same_surface: bool = False,
        origin: Sequence[float] = (0.0, 0.0, 0.0),
    ):
        self.path, self.names, self.features = path, names, tuple(features)
        self.metres = metres(unit)
        self.same_surface, self.origin = same_surface, np.asarray(origin, np.float64)
        self.first: Path | str = "the template"
        if template is None:
            with self._opened() as read:
                template, self.first = read(names[0]), path / names[0]
        if self.features:  # the first file tells how many channels they are
            further = self._further(path / names[0], len(template[0]))
            self.channels = 3 + further.shape[1]
        self.shape, self.faces = template[0].shape, template[1]
        self.template = self.metres * (template[0] - self.origin), template[1]
        self.sizes = _sizes(len(names))
        self.labels = _labels(names)

    def blocks(self, start: int) -> Iterator[ndarray]:
        r"""As of :class:`~pyg_attnpool.datasets.cache.Source`."""
        with self._opened() as read:
            for i in range(start * BLOCK, len(self.names), BLOCK):
                block = [self._checked(name, *read(name)) for name in self.names[i : i + BLOCK]]
                yield np.stack(block)

    def read(self) -> Tensor:
        r"""All meshes, in memory."""
        vertices = torch.empty(len(self.names), self.shape[0], self.channels)
        with progress_bar(f"Reading {self.path.name}", len(self.sizes)) as progress:
            for part, block in zip(vertices.split(BLOCK), self.blocks(0), strict=True):
                part.copy_(torch.from_numpy(block))
                progress.update()
        return vertices

    def content(self) -> str:
        r"""The names, the settings, and what the files hold by their hashes."""
        if self.path.is_dir():
            # Reading and hashing leave Python to other threads.
            with (
                ThreadPoolExecutor() as threads,
                progress_bar(f"Checking {self.path.name}", len(self.names)) as progress,
            ):
                content = []
                for found in threads.map(file_hash, [self.path / name for name in self.names]):
                    content.append(found)
                    progress.update()
        else:
            with damage_named(self.path, "a whole archive"), ZipFile(self.path) as archive:
                members = [archive.getinfo(name) for name in self.names]
                content = [f"{member.file_size} {member.CRC}" for member in members]
        settings = self.metres, self.features, self.same_surface, self.origin.tolist()
        return repr((self.names, *settings, content))

    @contextmanager
    def _opened(self) -> Iterator[Callable[[str], tuple[ndarray, ndarray]]]:
        if self.path.is_dir():
            yield lambda name: read_mesh(self.path / name)
            return
        # One file at a time is unpacked: all of them would take the disk twice.
        with (
            damage_named(self.path, "a whole archive"),
            ZipFile(self.path) as archive,
            tempfile.TemporaryDirectory() as folder,
        ):

            def read(name: str) -> tuple[ndarray, ndarray]:
                with damage_named(self.path, f"a whole mesh {name}"):
                    file = Path(archive.extract(name, folder))
                    mesh = read_mesh(file)
                    file.unlink()
                    return mesh

            yield read

    def _checked(self, name: str, vertices: ndarray, faces: ndarray) -> ndarray:
        file = self.path / name
        if vertices.shape != self.shape:
            raise ValueError(
                f"Expected {self.shape[0]} vertices in {file} as {self.first} has "
                f"(got {vertices.shape[0]})"
            )
        if not np.array_equal(faces, self.faces):
            same = faces.shape == self.faces.shape and np.array_equal(
                _surface(faces), _surface(self.faces)
            )
            if not (same and self.same_surface):
                what = "surface" if self.same_surface else "faces"
                hint = ", the same surface: 'same_surface=True' takes it" if same else ""
                raise ValueError(
                    f"Expected the {what} of {self.first} in {file} "
                    f"(got {_difference(faces, self.faces, self.same_surface)}{hint})"
                )
        coordinates = self.metres * (vertices - self.origin)
        coordinates = in_single_precision(f"vertices of {file}", coordinates)
        if not self.features:
            return coordinates
        further = self._further(file, len(vertices))
        if further.shape[1] != self.channels - 3:
            raise ValueError(
                f"Expected {self.channels - 3} channels of features in {file} as {self.first} has "
                f"(got {further.shape[1]})"
            )
        return np.concatenate([coordinates, further], axis=1)

    def _further(self, file: Path, num_vertices: int) -> ndarray:
        found = read_features(file)
        missing = [name for name in self.features if name not in found]
        if missing:
            raise ValueError(f"Expected features {missing} in {file} (got {list(found)})")
        further = np.concatenate([found[name] for name in self.features], axis=1)
        if len(further) != num_vertices or not np.isfinite(further).all():
            raise ValueError(f"Expected finite features of {num_vertices} vertices in {file}")
        return further.astype(np.float32)


class MeshArray(MeshSource):
    r"""An array of meshes beside a template, as a source.

    Args:
        path (Path): A :obj:`.npy` or :obj:`.npz` file, as in :class:`RegisteredMeshes`.
        template (tuple, optional): Vertices and faces.
        unit (str): The unit of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As of :class:`RegisteredMeshes`.
    """

    def __init__(self, path: Path, template: tuple[ndarray, ndarray] | None, unit: str):
        self.path, self.metres = path, metres(unit)
        self.vertices = _read_array(path)
        if template is None:
            raise ValueError(
                f"Expected a 'template' with the faces of the meshes in {path} (got None)"
            )
        if self.vertices.size(1) != len(template[0]):
            raise ValueError(
                f"Expected meshes of {len(template[0])} vertices as the template has in "
                f"{path} (got {self.vertices.size(1)})"
            )
        self.template = self.metres * template[0], template[1]
        self.sizes = _sizes(len(self.vertices))
        self.channels = self.vertices.size(2)
        self.labels = {}

    def blocks(self, start: int) -> Iterator[ndarray]:
        r"""As of :class:`~pyg_attnpool.datasets.cache.Source`."""
        for block in self.vertices.split(BLOCK)[start:]:
            yield self._in_metres(block).numpy()

    def read(self) -> Tensor:
        r"""All meshes: in memory, or mapped where their file is and is in metres."""
        return self._in_metres(self.vertices)

    def _in_metres(self, x: Tensor) -> Tensor:
        if self.metres == 1:
            return x
        return torch.cat([self.metres * x[..., :3], x[..., 3:]], dim=-1)

    def content(self) -> str:
        r"""The unit, and what the file holds by its hash."""
        return repr((self.metres, file_hash(self.path)))


def mesh_names(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    r"""The mesh files of a folder and the folders within, but for hidden and temporary ones. Sorted
    by folders, then names: what a file system lists first must not decide a split.

    Args:
        folder (Path): The folder.
        suffixes (tuple, optional): How names of files end that count. (default: those of meshes)

    Raises:
        ValueError: If there are none.
    """
    files = [
        f.relative_to(folder).parts
        for f in folder.rglob("*")
        # A link that leads nowhere is a mesh that is missing, which its reader will say.
        if f.suffix.lower() in suffixes and (f.is_file() or (f.is_symlink() and not f.is_dir()))
    ]
    files = [
        parts
        for parts in files
        if not any(part.startswith(HIDDEN) for part in parts)
        and not Path(parts[-1]).stem.lower().endswith(TEMPORARY)
    ]
    if not files:
        raise ValueError(f"Expected mesh files ending in one of {suffixes} in {folder} (got none)")
    return ["/".join(parts) for parts in sorted(files)]


def natural_order(name: str) -> list[tuple[tuple[str | int, ...], str]]:
    r"""A key that sorts relative paths folder by folder, and numbers in names by their size.

    Example:
        >>> sorted(["a/frame10.obj", "a/frame9.obj", "a b/frame1.obj"], key=natural_order)
        ['a/frame9.obj', 'a/frame10.obj', 'a b/frame1.obj']
    """
    # Text and numbers take turns, so that like is compared with like.
    return [
        (tuple(int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", part))), part)
        for part in name.split("/")
    ]


def _sizes(num: int) -> list[int]:
    return [min(BLOCK, num - i) for i in range(0, num, BLOCK)]


def _labels(names: list[str]) -> dict[str, list]:
    # Of subject/expression/file, what the folders say.
    labels: dict[str, list] = {"name": names}
    parts = [name.split("/") for name in names]
    if all(len(p) == 3 for p in parts):
        labels["subject"] = [p[0] for p in parts]
        labels["expression"] = [p[1] for p in parts]
        seen: Counter = Counter()
        labels["frame"] = []
        for subject, expression, _ in parts:
            labels["frame"].append(seen[subject, expression])
            seen[subject, expression] += 1
    return labels


def _surface(faces: ndarray) -> ndarray:
    # Each face from its smallest vertex on, and faces in order: what is left has to do with the
    # surface and its side alone.
    first = faces.argmin(axis=1)[:, None]
    turned = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1)
    return turned[np.lexsort(turned.T[::-1])]


def _difference(faces: ndarray, expected: ndarray, same_surface: bool) -> str:
    if len(faces) != len(expected):
        return f"{len(faces)} instead of {len(expected)}"
    if not same_surface:
        i = int((faces != expected).any(axis=1).argmax())
        return f"{faces[i].tolist()} instead of {expected[i].tolist()} at face {i}"
    left = Counter(map(tuple, _surface(expected).tolist()))
    i = 0
    while left[key := tuple(_surface(faces[i : i + 1])[0].tolist())] > 0:
        left[key] -= 1
        i += 1
    return f"{faces[i].tolist()} at face {i}, which it does not have"


def _read_array(path: Path) -> Tensor:
    if path.suffix.lower() not in (".npz", ".npy"):
        raise ValueError(f"Expected a folder, a mesh, a .npz or a .npy file (got {path})")
    if not path.is_file():
        raise FileNotFoundError(f"Expected meshes at {path} (got no such file or folder)")
    if path.suffix.lower() == ".npy":
        array = mapped_array(path)
    else:
        array = _array_of_archive(path)
    if array.ndim != 3 or array.shape[2] < 3 or array.size == 0:
        raise ValueError(
            f"Expected vertices of shape [M, N, 3] in {path} (got {list(array.shape)})"
        )
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise ValueError(f"Expected vertices of numbers in {path} (got {array.dtype})")
    if array.dtype.itemsize > FLOAT.itemsize or not np.issubdtype(array.dtype, np.floating):
        for i, mesh in enumerate(array):
            in_single_precision(f"vertices of mesh {i} in {path}", mesh[:, :3].astype(np.float64))
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        vertices = torch.from_numpy(array.astype(np.float32, copy=False))
    for i, mesh in enumerate(vertices):
        if not torch.isfinite(mesh).all():
            raise ValueError(
                f"Expected finite vertices in {path} (got NaN or infinity in mesh {i})"
            )
    return vertices


def _array_of_archive(path: Path) -> ndarray:
    # Of several arrays, the one that is needed alone is read.
    with opened_arrays(path, "a whole file of arrays") as arrays:
        key = arrays.files[0] if len(arrays.files) == 1 else "vertices"
        if key not in arrays.files:
            raise ValueError(f"Expected an array 'vertices' in {path} (got {arrays.files})")
        return arrays[key]
