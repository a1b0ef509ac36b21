from __future__ import annotations

import hashlib
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from pyg_attnpool.datasets.align import align as align_meshes
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.stored import mapped_array, stored
from pyg_attnpool.mesh.io import SUFFIXES, read_features, read_mesh
from pyg_attnpool.units import metres

# Part of every stored file: raised with every change of how meshes are read.
GENERATOR = 2

BLOCK = 64  # meshes read between two steps of the progress bar


class RegisteredMeshes(MeshDataset):
    r"""Your own registered meshes: a folder of mesh files of one topology, or an array of vertices
    beside a template.

    Of a folder, all :obj:`.obj`, :obj:`.ply`, :obj:`.off` and :obj:`.stl` files are read, also in
    folders within, in the order of their relative paths, numbers by their size. Where every file
    lies two folders deep, as COMA's do (:obj:`subject/expression/mesh.ply`), these folders name
    subject and expression, and the place of a file among those of its folder is the frame.

    More meshes than memory holds are mapped rather than read: with :obj:`cache`, or those of a
    :obj:`.npy` file of float32 in metres.

    Args:
        root (str or Path): A folder of mesh files, or a :obj:`.npz` or :obj:`.npy` file with an
            array of meshes :obj:`[M, N, C]`, of which the first three features are coordinates. A
            :obj:`.npz` file names it :obj:`"vertices"` or has no other array.
        template (str, Path or tuple, optional): A mesh file, or vertices :obj:`[N, 3]` and faces
            :obj:`[F, 3]`, in the unit of the meshes. If :obj:`None`, the first mesh of a folder.
            (default: :obj:`None`)
        unit (str, optional): The unit of the files, :obj:`"m"`, :obj:`"cm"` or :obj:`"mm"`. The
            meshes are held in metres. (default: :obj:`"m"`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        cache (str or Path, optional): A folder to store the meshes in, as :obj:`{name}-{hash}.npz`
            and :obj:`.npy`; files are then read once, and again when their place, names, sizes,
            times or ends change. (default: :obj:`None`)
        features (list, optional): What PLY files say of their vertices beyond coordinates, as
            further features in this order: :obj:`"color"`, :obj:`"normal"` or the name of a
            property (:meth:`~pyg_attnpool.mesh.read_features`). (default: :obj:`()`)
        align (bool, optional): If set to :obj:`True`, turns and moves every mesh onto the template
            (:func:`~pyg_attnpool.datasets.align`). (default: :obj:`False`)

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If there are no meshes, a file cannot be read, a mesh has another number of
            vertices or other faces than the template, a coordinate is not finite, or the disk is
            full. The message names the file.
    """

    def __init__(
        self,
        root: str | Path,
        template: str | Path | tuple[ndarray, ndarray] | None = None,
        unit: str = "m",
        transform: Callable | None = None,
        cache: str | Path | None = None,
        features: Sequence[str] = (),
        align: bool = False,
    ):
        scale = metres(unit)
        path = Path(root).expanduser()
        if isinstance(template, str | Path):
            template = read_finite(Path(template).expanduser())
        elif template is not None:
            template = _check_template(*template)
        if path.is_dir():
            names = sorted(mesh_names(path), key=_natural)
            source: _Meshes = MeshFiles(path, names, template, scale, features)
        elif features:
            raise ValueError(f"Expected 'features' of a folder of PLY files (got {path})")
        else:
            source = _MeshArray(path, template, scale)
        if cache is None:
            vertices = source.read()
        else:
            place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
            file = Path(cache).expanduser() / f"{path.stem}-{place}.npz"
            vertices = torch.from_numpy(source.stored(file)["vertices"])
        if align:
            reference = torch.from_numpy(source.template[0])
            vertices = align_meshes(vertices, reference=reference).vertices
        super().__init__(vertices, source.template, source.labels, str(path), transform)
        self.unit = unit


class _Meshes:
    # Meshes in a folder or file, as source.
    channels = 3
    path: Path
    template: tuple[ndarray, ndarray]
    sizes: list[int]
    labels: dict[str, list[Any]]

    def stored(self, path: Path) -> dict[str, ndarray]:
        r"""All meshes, stored as by :meth:`~pyg_attnpool.datasets.stored.stored`."""
        known = hashlib.sha256(self.content().encode())
        for array in self.template:
            known.update(np.ascontiguousarray(array).data)
        settings: dict[str, int | str] = {"generator": GENERATOR, "source": known.hexdigest()}
        return stored(path, settings, lambda: self, f"Reading {path.stem}")

    def content(self) -> str:
        r"""What changes when the meshes do."""
        raise NotImplementedError

    def blocks(self, start: int) -> Iterator[ndarray]:
        r"""As of :class:`~pyg_attnpool.datasets.stored.Source`."""
        raise NotImplementedError

    def read(self) -> Tensor:
        r"""All meshes, in memory."""
        raise NotImplementedError


class MeshFiles(_Meshes):
    r"""The files of a folder or archive as a source of meshes of one topology.

    Args:
        path (Path): A folder, or a :obj:`.zip` archive.
        names (list): The files within, in the order of the meshes.
        template (tuple, optional): Vertices and faces, or the first mesh. (default: :obj:`None`)
        scale (float, optional): The unit of the files in metres. (default: :obj:`1.0`)
        features (list, optional): As in :class:`RegisteredMeshes`. (default: :obj:`()`)

    Raises:
        ValueError: As of :class:`RegisteredMeshes`, also when blocks are read.
    """

    def __init__(
        self,
        path: Path,
        names: list[str],
        template: tuple[ndarray, ndarray] | None = None,
        scale: float = 1.0,
        features: Sequence[str] = (),
    ):
        self.path, self.names, self.scale, self.features = path, names, scale, tuple(features)
        self.first: Path | str = "the template"
        if template is None:
            with self._opened() as read:
                template, self.first = read(names[0]), path / names[0]
        if self.features:  # the first file tells how many channels they are
            further = self._further(path / names[0], len(template[0]))
            self.channels = 3 + further.shape[1]
        self.shape, self.faces = template[0].shape, template[1]
        self.template = scale * template[0], template[1]
        self.sizes = _sizes(len(names))
        self.labels = _labels(names)

    def blocks(self, start: int) -> Iterator[ndarray]:
        with self._opened() as read:
            for i in range(start * BLOCK, len(self.names), BLOCK):
                block = [self._checked(name, *read(name)) for name in self.names[i : i + BLOCK]]
                yield np.stack(block)

    def read(self) -> Tensor:
        r"""All meshes, in memory."""
        vertices = torch.empty(len(self.names), self.shape[0], self.channels)
        blocks = tqdm(
            self.blocks(0),
            desc=f"Reading {self.path.name}",
            total=len(self.sizes),
            disable=len(self.names) < 100,
        )
        for part, block in zip(vertices.split(BLOCK), blocks, strict=True):
            part.copy_(torch.from_numpy(block))
        return vertices

    def content(self) -> str:
        files = [self.path / name for name in self.names] if self.path.is_dir() else [self.path]
        states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return repr((self.names, self.scale, self.features, states, [_ends(f) for f in files]))

    @contextmanager
    def _opened(self) -> Iterator[Callable[[str], tuple[ndarray, ndarray]]]:
        if self.path.is_dir():
            yield lambda name: read_finite(self.path / name)
            return
        # One file at a time is unpacked: all of them would take the disk twice.
        with ZipFile(self.path) as archive, tempfile.TemporaryDirectory() as folder:

            def read(name: str) -> tuple[ndarray, ndarray]:
                try:
                    file = Path(archive.extract(name, folder))
                    mesh = read_finite(file)
                except (BadZipFile, EOFError, ValueError, zlib.error) as e:
                    raise ValueError(
                        f"Expected a whole mesh {name} in {self.path} (got: {e})"
                    ) from e
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
            raise ValueError(
                f"Expected the faces of {self.first} in {file} "
                f"(got {_difference(faces, self.faces)})"
            )
        coordinates = (self.scale * vertices).astype(np.float32)
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


class _MeshArray(_Meshes):
    def __init__(self, path: Path, template: tuple[ndarray, ndarray] | None, scale: float):
        self.path, self.scale = path, scale
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
        self.template = scale * template[0], template[1]
        self.sizes = _sizes(len(self.vertices))
        self.channels = self.vertices.size(2)
        self.labels = {}

    def blocks(self, start: int) -> Iterator[ndarray]:
        for block in self.vertices.split(BLOCK)[start:]:
            yield self._scaled(block.clone()).numpy()

    def read(self) -> Tensor:
        return self._scaled(self.vertices)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.scale != 1:
            x[..., :3] *= self.scale
        return x

    def content(self) -> str:
        status = self.path.stat()
        return repr((self.scale, status.st_size, status.st_mtime_ns, _ends(self.path)))


def _ends(path: Path) -> str:
    # A hash of the beginning and the end of a file.
    with open(path, "rb") as file:
        ends = file.read(1 << 12)
        file.seek(max(0, path.stat().st_size - (1 << 12)))
        return hashlib.sha256(ends + file.read()).hexdigest()[:16]


def _natural(name: str) -> list[tuple[int, str]]:
    # frame2 comes before frame10.
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


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


def mesh_names(folder: Path) -> list[str]:
    r"""The mesh files of a folder and the folders within, but for hidden ones. Sorted by folders,
    then names: what a file system lists first must not decide a split.

    Raises:
        ValueError: If there are none.
    """
    files = [
        f
        for f in folder.rglob("*")
        if f.suffix.lower() in SUFFIXES
        and f.is_file()
        and not any(part.startswith(".") for part in f.relative_to(folder).parts)
    ]
    if len(files) == 0:
        raise ValueError(f"Expected mesh files ending in one of {SUFFIXES} in {folder} (got none)")
    return ["/".join(parts) for parts in sorted(f.relative_to(folder).parts for f in files)]


def read_finite(path: Path) -> tuple[ndarray, ndarray]:
    r"""Reads a mesh file whose every coordinate is finite."""
    vertices, faces = read_mesh(path)
    if not np.isfinite(vertices).all():
        raise ValueError(f"Expected finite vertices in {path} (got NaN or infinity)")
    return vertices, faces


def _check_template(vertices: ndarray, faces: ndarray) -> tuple[ndarray, ndarray]:
    vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(
            f"Expected a 'template' of vertices [N, 3] and faces [F, 3] "
            f"(got {list(vertices.shape)} and {list(faces.shape)})"
        )
    if not np.issubdtype(faces.dtype, np.integer) or not (
        faces.size and 0 <= faces.min() and faces.max() < len(vertices)
    ):
        raise ValueError(
            f"Expected 'template' faces of vertices 0 to {len(vertices) - 1} (got others)"
        )
    return vertices, faces.astype(np.int64)


def _difference(faces: ndarray, expected: ndarray) -> str:
    if len(faces) != len(expected):
        return f"{len(faces)} instead of {len(expected)}"
    i = int((faces != expected).any(axis=1).argmax())
    return f"{faces[i].tolist()} instead of {expected[i].tolist()} at face {i}"


def _read_array(path: Path) -> Tensor:
    if path.suffix.lower() not in (".npz", ".npy"):
        raise ValueError(f"Expected a folder, a .npz or a .npy file (got {path})")
    if not path.is_file():
        raise FileNotFoundError(f"Expected meshes at {path} (got no such file or folder)")
    try:
        if path.suffix.lower() == ".npy":
            names: list[str] = []
            array: ndarray | None = mapped_array(path)
        else:
            with np.load(path, allow_pickle=False) as file:
                key = file.files[0] if len(file.files) == 1 else "vertices"
                names, array = file.files, file[key] if key in file.files else None
    except (BadZipFile, EOFError, OSError, ValueError) as e:
        raise ValueError(f"Expected a whole file of arrays in {path} (got: {e})") from e
    if array is None:
        raise ValueError(f"Expected an array 'vertices' in {path} (got {names})")
    if array.ndim != 3 or array.shape[2] < 3 or array.size == 0:
        raise ValueError(
            f"Expected vertices of shape [M, N, 3] in {path} (got {list(array.shape)})"
        )
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise ValueError(f"Expected vertices of numbers in {path} (got {array.dtype})")
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        vertices = torch.from_numpy(array.astype(np.float32, copy=False))
    for i, mesh in enumerate(vertices):
        if not torch.isfinite(mesh).all():
            raise ValueError(
                f"Expected finite vertices in {path} (got NaN or infinity in mesh {i})"
            )
    return vertices
