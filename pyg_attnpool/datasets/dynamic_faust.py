from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from pyg_attnpool.datasets.cache import load, stored
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.splits import Split
from pyg_attnpool.files import damage_named, file_hash

# Part of every stored file: raised with every change of how meshes are read.
GENERATOR = 1

URL = "https://dfaust.is.tue.mpg.de"
LABELS = ("name", "subject", "expression", "frame")
FILES = ("registrations_m.hdf5", "registrations_f.hdf5")


class DynamicFAUST(MeshDataset):
    r"""Unlike :class:`torch_geometric.datasets.DynamicFAUST`, all meshes in sorted order as one
    tensor, with their labels and the splits of the published experiments.

    The Dynamic FAUST data set of the `"Dynamic FAUST: Registering Human Bodies in Motion"
    <http://files.is.tue.mpg.de/black/papers/dfaust2017.pdf>`_ paper: some 41,000 bodies of
    6,890 vertices, 10 subjects in up to 14 motions each, ordered by subject, motion and frame,
    in metres. The files are read once, to :obj:`processed/dynamic_faust.npz` and :obj:`.npy`,
    and the vertices then mapped. A mesh is named by its sequence and frame, as in
    :obj:`"50002_hips/00013"`; the template is the first mesh.

    The files lie where :class:`torch_geometric.datasets.DynamicFAUST` expects them, so that both
    can share a folder; there, one object holds a whole sequence.

    Args:
        root (str or Path): The folder with :obj:`raw/registrations_m.hdf5` and
            :obj:`raw/registrations_f.hdf5`.
        test_list (str or Path, optional): A text file with the names of the test meshes, one a
            line, for the split of `Neural3DMM <https://arxiv.org/abs/1905.02876>`_, which drew them
            at random. :meth:`split` holds them out unless told otherwise. If :obj:`None`, it holds
            out whole sequences. (default: :obj:`None`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)

    Raises:
        ImportError: If :obj:`h5py` is not installed and the files have not been read yet.
        FileNotFoundError: If a file is missing; the message says where to ask for it.
        ValueError: If a file is damaged, a sequence has another topology than the first, a
            coordinate is not finite, or the disk is full.

    Example:
        >>> from pyg_attnpool.datasets import DynamicFAUST
        >>> dataset = DynamicFAUST("data/DynamicFAUST")  # doctest: +SKIP
    """

    default_split = "sequence"

    def __init__(
        self,
        root: str | Path,
        test_list: str | Path | None = None,
        transform: Callable | None = None,
    ):
        root = Path(root).expanduser()
        files = [root / "raw" / name for name in FILES]
        missing = [str(file) for file in files if not file.is_file()]
        path = root / "processed" / "dynamic_faust.npz"
        if not missing:
            # By their content: sizes and times may be those of other files. What is stored lies
            # in the same folder, so that its place says nothing more.
            with ThreadPoolExecutor() as threads:
                known = list(threads.map(file_hash, files))
            source = hashlib.sha256(repr(known).encode()).hexdigest()
            settings: dict[str, int | str] = {"generator": GENERATOR, "source": source}
            arrays: dict[str, ndarray] | None = stored(
                path, settings, lambda: _Registrations(files), "Reading Dynamic FAUST"
            )
        else:
            arrays = load(path, {"generator": GENERATOR}, LABELS)
        if arrays is None:
            raise FileNotFoundError(
                f"Expected registrations of Dynamic FAUST at {' and '.join(missing)} (got no such "
                f"file): ask for them at {URL} and put them there"
            )
        self.test_names = None if test_list is None else _read_list(Path(test_list).expanduser())
        labels = {key: arrays[key].tolist() for key in LABELS}
        vertices = torch.from_numpy(arrays["vertices"])
        super().__init__(
            vertices, (arrays["template"], arrays["faces"]), labels, str(root), transform
        )

    def split(
        self,
        kind: str | None = None,
        *,
        expression: str | None = None,
        subject: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Split:
        r"""As :meth:`MeshDataset.split`, by default with the test meshes of :obj:`test_names` where
        they were given."""
        if kind is None and self.test_names is not None:
            kind, names = "listed", self.test_names
        return super().split(kind, expression=expression, subject=subject, names=names)


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected the names of test meshes at {path} (got no such file)")
    return path.read_text(encoding="utf-8").split()


class _Registrations:
    # A data set [N, 3, frames] for each sequence, named subject_motion, and one of faces.
    def __init__(self, files: list[Path]):
        self.file, self.lengths, faces = {}, {}, {}
        for path in files:
            with _opened(path) as file:
                if "faces" not in file:
                    raise ValueError(f"Expected a data set 'faces' in {path} (got {list(file)})")
                faces[path] = file["faces"][()].astype(np.int64)
                for name in file:
                    if re.fullmatch(r"\d+_\w+", name):
                        self.file[name], self.lengths[name] = path, file[name].shape[-1]
        if not self.lengths:
            raise ValueError(
                f"Expected sequences such as '50002_hips' in {files[0].parent} (got none)"
            )
        first = faces[files[0]]
        for path, other in faces.items():
            if not np.array_equal(other, first):
                raise ValueError(f"Expected the faces of {files[0]} in {path} (got others)")
        self.lengths = dict(sorted(self.lengths.items()))
        self.sizes = list(self.lengths.values())
        frames = [(name, i) for name, length in self.lengths.items() for i in range(length)]
        self.labels = {
            "name": [f"{name}/{i:05d}" for name, i in frames],
            "subject": [name.partition("_")[0] for name, _ in frames],
            "expression": [name.partition("_")[2] for name, _ in frames],
            "frame": [i for _, i in frames],
        }
        self.num_vertices = int(first.max()) + 1
        name = next(iter(self.lengths))
        self.template = self._sequence(name)[0].astype(np.float64), first

    def blocks(self, start: int) -> Iterator[ndarray]:
        for name in list(self.lengths)[start:]:
            yield self._sequence(name)

    def _sequence(self, name: str) -> ndarray:
        path = self.file[name]
        with _opened(path) as file, damage_named(path, f"a whole sequence {name}"):
            vertices = file[name][()].astype(np.float32)
        if vertices.shape != (self.num_vertices, 3, self.lengths[name]):
            raise ValueError(
                f"Expected {name} of shape [{self.num_vertices}, 3, frames] in {path} "
                f"(got {list(vertices.shape)})"
            )
        finite = np.isfinite(vertices).all(axis=(0, 1))
        if not finite.all():
            raise ValueError(
                f"Expected finite vertices in {path} "
                f"(got NaN or infinity in frame {int(finite.argmin())} of {name})"
            )
        return vertices.transpose(2, 0, 1)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as e:
        raise ImportError(
            "Reading Dynamic FAUST requires 'h5py': install it with `pip install \"h5py>=3.10\"`"
        ) from e
    with damage_named(path, "a whole HDF5 file"), h5py.File(path, "r") as file:
        yield file
