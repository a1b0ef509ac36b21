from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from pyg_attnpool.datasets.align import Alignment
from pyg_attnpool.datasets.align import align as align_meshes
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.sources import (
    MeshArray,
    MeshFiles,
    MeshSource,
    mesh_names,
    natural_order,
)
from pyg_attnpool.mesh.io import SUFFIXES, as_template


class RegisteredMeshes(MeshDataset):
    r"""Your own registered meshes: a folder of mesh files of one topology, or an array of vertices
    beside a template.

    All :obj:`.obj`, :obj:`.ply`, :obj:`.off` and :obj:`.stl` files of a folder and of the folders
    within are read, but for hidden and temporary ones: folder by folder in the order of their
    names, numbers by their size. Where every file lies two folders deep, as COMA's do
    (:obj:`subject/expression/mesh.ply`), these folders name subject and expression, and the place
    of a file among those of its folder is the frame.

    More meshes than memory holds are mapped rather than read: with :obj:`cache`, or those of a
    :obj:`.npy` file of float32 in metres.

    Args:
        root (str or Path): A folder of mesh files, a single one, or a :obj:`.npz` or :obj:`.npy`
            file with an array of meshes :obj:`[M, N, C]`, of which the first three features are
            coordinates. A :obj:`.npz` file names it :obj:`"vertices"` or has no other array.
        template (str, Path or tuple, optional): A mesh file, or vertices :obj:`[N, 3]` and faces
            :obj:`[F, 3]`, in the unit of the meshes. If :obj:`None`, the first mesh of a folder.
            (default: :obj:`None`)
        unit (str, optional): The unit of the files, :obj:`"m"`, :obj:`"cm"` or :obj:`"mm"`. The
            meshes are held in metres. (default: :obj:`"m"`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        cache (str or Path, optional): A folder to store the meshes in, as :obj:`{name}-{hash}.npz`
            and :obj:`.npy`; files are then read once, and again when their place, names or content
            change, or what is stored is damaged. (default: :obj:`None`)
        features (list, optional): The features of vertices in PLY files beyond coordinates, as
            further features in this order: :obj:`"color"`, :obj:`"normal"` or the name of a
            property (:meth:`~pyg_attnpool.mesh.read_features`). (default: :obj:`()`)
        align (bool, optional): If set to :obj:`True`, turns and moves every mesh onto the template
            (:func:`~pyg_attnpool.datasets.align`); :attr:`alignment` has the motions. Features
            beyond coordinates stay as they are in the files, so normals are not turned along.
            (default: :obj:`False`)
        same_surface (bool, optional): If set to :obj:`True`, the files of a folder may list the
            faces of the template in another order, and begin each at another corner.
            (default: :obj:`False`)
        origin (list, optional): The point :obj:`[x, y, z]`, in the unit of the files, that becomes
            the origin: files with coordinates of maps need one close to their meshes, since models
            compute in single precision. (default: :obj:`None`)

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If there are no meshes, a file cannot be read, a mesh has another number of
            vertices or other faces than the template, a coordinate is not finite or too far from
            the origin for single precision, or the disk is full. The message names the file.

    Example:
        >>> from pyg_attnpool.datasets import RegisteredMeshes
        >>> from pyg_attnpool.mesh import write_mesh
        >>> for i, mesh in enumerate(meshes):
        ...     write_mesh(f"scans/{i}.ply", 1000 * mesh.numpy(), template[1])
        >>> scans = RegisteredMeshes("scans", unit="mm")
        >>> scans.vertices.shape, torch.allclose(scans.vertices, meshes)
        (torch.Size([24, 642, 3]), True)
    """

    sorts_naturally = True
    r"""Whether numbers in the names of files are sorted by their size."""

    def __init__(
        self,
        root: str | Path,
        template: str | Path | tuple[ndarray, ndarray] | None = None,
        unit: str = "m",
        transform: Callable | None = None,
        cache: str | Path | None = None,
        features: Sequence[str] = (),
        align: bool = False,
        same_surface: bool = False,
        origin: Sequence[float] | None = None,
    ):
        path = Path(root).expanduser()
        if template is not None:
            template = as_template(template)
        single = path.suffix.lower() in SUFFIXES and not path.is_dir()
        if single or path.is_dir():
            names = [path.name] if single else mesh_names(path)
            if self.sorts_naturally:
                names.sort(key=natural_order)
            folder = path.parent if single else path
            origin = _point([0.0, 0.0, 0.0] if origin is None else origin)
            source: MeshSource = MeshFiles(
                folder, names, template, unit, features, same_surface, origin
            )
        elif features or origin is not None:
            raise ValueError(f"Expected 'features' or 'origin' of mesh files (got {path})")
        else:
            source = MeshArray(path, template, unit)
        if cache is None:
            vertices = source.read()
        else:
            place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
            file = Path(cache).expanduser() / f"{path.stem}-{place}.npz"
            vertices = torch.from_numpy(source.stored(file)["vertices"])
        self._alignment: Alignment | None = None
        if align:
            reference = torch.from_numpy(source.template[0])
            self._alignment = align_meshes(vertices, reference=reference)
            vertices = self._alignment.vertices
        super().__init__(vertices, source.template, source.labels, str(path), transform)
        self.unit = unit
        self.features = tuple(features)

    @property
    def alignment(self) -> Alignment | None:
        r"""The motions that :obj:`align=True` has taken away, in metres, or :obj:`None`: a new scan
        is brought into the pose of these meshes by
        :meth:`~pyg_attnpool.datasets.Alignment.bring`, a result back by
        :meth:`~pyg_attnpool.datasets.Alignment.undo`."""
        if self._alignment is None or self._indices is None:
            return self._alignment
        return self._alignment.select(torch.tensor(list(self._indices), dtype=torch.long))


def _point(origin: Any) -> list[float]:
    point = np.asarray(origin)
    real = np.issubdtype(point.dtype, np.integer) or np.issubdtype(point.dtype, np.floating)
    if not real or point.shape != (3,) or not np.isfinite(point).all():
        raise ValueError(f"Expected 'origin' to be a point of three finite numbers (got {origin})")
    return [float(x) for x in point]
