r"""Registered meshes in files, repaired all alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy import ndarray

from pyg_attnpool.datasets.cache import progress_bar
from pyg_attnpool.datasets.sources import mesh_names, natural_order
from pyg_attnpool.files import replacing
from pyg_attnpool.mesh.io import read_features, read_mesh, write_mesh
from pyg_attnpool.mesh.repair import RepairedMesh, repair

INDEX = "index.npy"  # beside the repaired meshes of a folder


def repair_files(
    path: str | Path, output: str | Path, merge: float | None = 0.0
) -> tuple[RepairedMesh, int]:
    r"""Repairs a mesh file, or the first of a folder of registered meshes, and takes the others
    along by the same map of vertices: they stay registered. The files of a folder are written under
    their names, and the map beside them as :obj:`index.npy`. What PLY files say of vertices beyond
    coordinates comes along.

    Args:
        path (str or Path): A mesh file or a folder, as in
            :class:`~pyg_attnpool.datasets.RegisteredMeshes`.
        output (str or Path): The file or the folder to write.
        merge (float, optional): As in :func:`~pyg_attnpool.mesh.repair`. (default: :obj:`0.0`)

    Returns:
        The first mesh as it is after the repair, with its map, and the number of files.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file cannot be read, the meshes are of other faces than the first, or the
            folder to write to holds anything.

    Example:
        >>> from pyg_attnpool.datasets import repair_files
        >>> from pyg_attnpool.mesh import write_mesh
        >>> for i, mesh in enumerate(meshes[:3]):
        ...     write_mesh(f"raw/{i}.ply", mesh.numpy(), template[1])
        >>> repaired, count = repair_files("raw", "whole")
        >>> any(repaired.changes.values()), count  # they were whole
        (False, 3)
    """
    path, output = Path(path).expanduser(), Path(output).expanduser()
    if not path.is_dir():
        mesh = repair(*read_mesh(path), merge)
        _write(output, mesh, mesh.vertices, path)
        return mesh, 1
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Expected an empty folder to write repaired meshes to (got {output})")
    names = sorted(mesh_names(path), key=natural_order)
    vertices, faces = read_mesh(path / names[0])
    mesh = repair(vertices, faces, merge)
    with progress_bar(f"Repairing {path.name}", len(names)) as progress:
        for name in names:
            vertices, others = read_mesh(path / name)
            if len(vertices) != mesh.num_source or not np.array_equal(others, faces):
                raise ValueError(
                    f"Expected the vertices and faces of {path / names[0]} in {path / name} "
                    f"(got others): they are not registered"
                )
            _write(output / name, mesh, mesh.apply(vertices), path / name)
            progress.update()
    with replacing(output / INDEX) as temporary:
        np.save(temporary, mesh.index)
    return mesh, len(names)


def _write(target: Path, mesh: RepairedMesh, vertices: ndarray, source: Path) -> None:
    features = None
    if source.suffix.lower() == target.suffix.lower() == ".ply":
        features = {name: mesh.apply(value) for name, value in read_features(source).items()}
    write_mesh(target, vertices, mesh.faces, features)
