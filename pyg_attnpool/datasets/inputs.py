r"""Meshes in the forms in which people have them: one form of them, checks, and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor
from torch_geometric.data import Data

from pyg_attnpool.arguments import as_floats, as_integer
from pyg_attnpool.datasets.mesh_dataset import MeshDataset, stacked
from pyg_attnpool.mesh.io import in_single_precision


def as_meshes(meshes: Any) -> Tensor | MeshDataset:
    r"""Meshes in any form as one tensor :obj:`[M, N, C]` of single precision, or as the data set
    that they are.

    Args:
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Floating point meshes
            :obj:`[M, N, C]`, or :class:`~torch_geometric.data.Data` objects of the same vertices
            and faces, with coordinates :obj:`pos` and further features :obj:`x`.

    Raises:
        TypeError: If they are in another form, or not floating point.
        ValueError: If a :class:`~torch_geometric.data.Data` object differs from the first, or
            coordinates are too far from the origin for single precision.
    """
    if isinstance(meshes, MeshDataset):
        return meshes
    meshes = as_tensor(meshes)
    if meshes.dtype == torch.float64 and meshes.dim() == 3:
        for i, mesh in enumerate(meshes[..., :3]):
            in_single_precision(f"mesh {i}", mesh.numpy(force=True))
    return meshes.float()


def as_tensor(meshes: Any) -> Tensor:
    r"""Meshes in any form that :func:`as_meshes` takes as one tensor :obj:`[M, N, C]` of the type
    that they have; a data set is read as a whole.

    Raises:
        TypeError: As :func:`as_meshes` does.
        ValueError: If a :class:`~torch_geometric.data.Data` object differs from the first.
    """
    if isinstance(meshes, MeshDataset):
        meshes = meshes.read(torch.arange(len(meshes)))
    if isinstance(meshes, ndarray):
        meshes = as_floats("meshes", meshes)
    if isinstance(meshes, list | tuple) and meshes and all(isinstance(m, Data) for m in meshes):
        meshes = stacked(meshes)
    if not isinstance(meshes, Tensor):
        raise TypeError(
            f"Expected meshes as a tensor, an array, a MeshDataset or a list of Data "
            f"(got {type(meshes).__name__})"
        )
    if not meshes.is_floating_point():
        raise TypeError(f"Expected floating point meshes (got {meshes.dtype})")
    return meshes


def check_meshes(
    name: str,
    x: Tensor | MeshDataset,
    num_vertices: int | None = None,
    in_channels: int | None = None,
) -> None:
    r"""Checks the shape of meshes and that they are finite; those of a data set are checked when
    they are read.

    Raises:
        ValueError: If the meshes are not of shape :obj:`[M, N, C]`, or not finite.
    """
    shape = list(x.vertices_shape if isinstance(x, MeshDataset) else x.shape)
    if len(shape) != 3 or shape[2] < 3 or 0 in shape:
        raise ValueError(f"Expected {name} of shape [M, N, 3] (got {shape})")
    if num_vertices not in (None, shape[1]):
        raise ValueError(
            f"Expected {name} of {num_vertices} vertices as the template has (got {shape[1]})"
        )
    if in_channels not in (None, shape[2]):
        raise ValueError(
            f"Expected {name} of {in_channels} features a vertex as the model has (got {shape[2]})"
        )
    if isinstance(x, Tensor):
        check_finite(name, x, torch.arange(len(x)))


def check_finite(name: str, x: Tensor, index: Tensor) -> Tensor:
    r"""Meshes that are all finite; :obj:`index` are their numbers for the message."""
    # Part by part: what is asked of all meshes at once would take as much memory as they.
    finite = torch.cat([torch.isfinite(part).flatten(1).all(dim=1) for part in x.split(64)]).cpu()
    if not finite.all():
        first = int(index[~finite].min())
        raise ValueError(f"Expected finite {name} (got NaN or infinity in mesh {first})")
    return x


def blocks(x: Tensor | MeshDataset, size: int) -> Iterator[Tensor]:
    r"""Meshes in blocks of a size, in order."""
    size = as_integer("batch_size", size, least=1)
    for index in torch.arange(len(x)).split(size):
        yield x.read(index) if isinstance(x, MeshDataset) else x[index[0] : index[-1] + 1]
