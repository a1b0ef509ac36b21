from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.mesh.io import SUFFIXES, read_mesh


class RegisteredMeshes(MeshDataset):
    r"""Your own registered meshes: a folder of mesh files of one topology, or an array of vertices
    beside a template.

    Of a folder, all :obj:`.obj`, :obj:`.ply`, :obj:`.off` and :obj:`.stl` files are read, also in
    folders within, in the order of their relative paths. Where every file lies two folders deep, as
    COMA's do (:obj:`subject/expression/mesh.ply`), these folders name subject and expression, and
    the place of a file among those of its folder is the frame.

    Args:
        path (str or Path): A folder of mesh files, or a :obj:`.npz` or :obj:`.npy` file with an
            array of vertices :obj:`[M, N, 3]`. A :obj:`.npz` file names it :obj:`"vertices"` or
            has no other array.
        template (str, Path or tuple, optional): A mesh file, or vertices :obj:`[N, 3]` and faces
            :obj:`[F, 3]`, in the unit of the meshes. If :obj:`None`, the first mesh of a folder.
            (default: :obj:`None`)
        scale (float, optional): What takes the unit of the meshes to metres, such as
            :obj:`0.001` for millimetres. (default: :obj:`1.0`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If there are no meshes, a file cannot be read, a mesh has another number of
            vertices or other faces than the template, or a coordinate is not finite. The message
            names the file.
    """

    def __init__(
        self,
        path: str | Path,
        template: str | Path | tuple[ndarray, ndarray] | None = None,
        scale: float = 1.0,
        transform: Callable | None = None,
    ):
        if not (np.isfinite(scale) and scale > 0):
            raise ValueError(f"Expected a positive 'scale' (got {scale})")
        path = Path(path).expanduser()
        if isinstance(template, str | Path):
            template = _read_mesh(Path(template).expanduser())
        elif template is not None:
            template = _check_template(*template)
        if path.is_dir():
            vertices, template, labels = _read_folder(path, template)
        else:
            vertices, labels = _read_array(path), {}
            if template is None:
                raise ValueError(
                    f"Expected a 'template' with the faces of the meshes in {path} (got None)"
                )
            if vertices.size(1) != len(template[0]):
                raise ValueError(
                    f"Expected meshes of {len(template[0])} vertices as the template has in "
                    f"{path} (got {vertices.size(1)})"
                )
        if scale != 1:
            vertices *= scale
        super().__init__(vertices, (scale * template[0], template[1]), labels, str(path), transform)


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


def _read_mesh(path: Path) -> tuple[ndarray, ndarray]:
    vertices, faces = read_mesh(path)
    if not np.isfinite(vertices).all():
        raise ValueError(f"Expected finite vertices in {path} (got NaN or infinity)")
    return vertices, faces


def _read_folder(
    folder: Path, template: tuple[ndarray, ndarray] | None
) -> tuple[Tensor, tuple[ndarray, ndarray], dict[str, list]]:
    # Sorted by folders, then names: what a file system lists first must not decide a split.
    files = sorted(
        (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()),
        key=lambda f: f.relative_to(folder).parts,
    )
    if len(files) == 0:
        raise ValueError(f"Expected mesh files ending in one of {SUFFIXES} in {folder} (got none)")
    first = "the template"
    if template is None:
        first, template = files[0], _read_mesh(files[0])
    shape, faces = template[0].shape, template[1]

    vertices = torch.empty(len(files), *shape, dtype=torch.float32)
    for i, file in enumerate(tqdm(files, desc=f"Reading {folder.name}", disable=len(files) < 100)):
        v, f = _read_mesh(file)
        if v.shape != shape:
            raise ValueError(
                f"Expected {shape[0]} vertices in {file} as {first} has (got {v.shape[0]})"
            )
        if not np.array_equal(f, faces):
            raise ValueError(
                f"Expected the faces of {first} in {file} (got {_difference(f, faces)})"
            )
        vertices[i] = torch.from_numpy(v)

    parts = [file.relative_to(folder).parts for file in files]
    labels = {"name": ["/".join(p) for p in parts]}
    if all(len(p) == 3 for p in parts):
        labels["subject"] = [p[0] for p in parts]
        labels["expression"] = [p[1] for p in parts]
        seen = Counter()
        labels["frame"] = []
        for p in parts:
            labels["frame"].append(seen[p[:2]])
            seen[p[:2]] += 1
    return vertices, template, labels


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
        array = np.load(path, allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array as file:
                key = file.files[0] if len(file.files) == 1 else "vertices"
                names, array = file.files, file[key] if key in file.files else None
    except (BadZipFile, EOFError, OSError, ValueError) as e:
        raise ValueError(f"Expected a whole file of arrays in {path} (got: {e})") from e
    if array is None:
        raise ValueError(f"Expected an array 'vertices' in {path} (got {names})")
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"Expected vertices of shape [M, N, 3] in {path} (got {list(array.shape)})"
        )
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise ValueError(f"Expected vertices of numbers in {path} (got {array.dtype})")
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        vertices = torch.from_numpy(array.astype(np.float32, copy=False))
    finite = torch.isfinite(vertices).flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"Expected finite vertices in {path} "
            f"(got NaN or infinity in mesh {int((~finite).nonzero()[0])})"
        )
    return vertices
