r"""Observations of a shape as the solver takes them: checked, in metres and in double
precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch_geometric.data import Data

from pyg_attnpool.mapping import Mapping
from pyg_attnpool.mesh import read_scan
from pyg_attnpool.mesh.normals import vertex_normals
from pyg_attnpool.units import metres

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel


class Points(NamedTuple):
    r"""Points of the template's surface and where they were observed."""

    mapping: Mapping  # from vertices to points
    position: Tensor  # [B, P, 3]
    weight: Tensor  # [B, P]
    single: bool


class Scan(NamedTuple):
    r"""A surface of any topology, or the points of one."""

    points: ndarray  # [P, 3] in metres
    faces: ndarray | None  # [F, 3]
    normals: ndarray | None  # [P, 3], unit vectors
    boundary: ndarray  # [P], whether a point lies at an open boundary


def _tensor(name: str, x: Any, model: MorphableModel) -> Tensor:
    if isinstance(x, list | tuple):
        x = torch.stack([torch.as_tensor(row) for row in x]) if len(x) else torch.empty(0)
    x = torch.from_numpy(x) if isinstance(x, ndarray) else x
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"Expected {name} as a tensor or array (got {type(x).__name__})")
    return x.to(model.mean.device, torch.double)


def observed_vertices(
    model: MorphableModel, observations: Any, weight: Any, name: str = "weight"
) -> Points:
    r"""Meshes of the template, each vertex with its weight, an argument called :obj:`name`."""
    x = _tensor("observations", observations, model)
    n, c = model.mean.shape
    if x.dim() not in (2, 3) or x.size(-2) != n or x.size(-1) not in (3, c) or 0 in x.shape:
        raise ValueError(
            f"Expected a mesh [{n}, 3] or [B, {n}, 3] of the model's template (got "
            f"{list(x.shape)}): a point cloud is Data(pos=points), a scan (vertices, faces)"
        )
    position = x[..., :3].view(-1, n, 3)
    w = x.new_ones(n) if weight is None else _tensor(f"'{name}'", weight, model)
    if w.shape not in ((n,), position.shape[:2]):
        raise ValueError(
            f"Expected '{name}' of shape [{n}] or {list(position.shape[:2])} (got {list(w.shape)})"
        )
    w = w.expand(position.shape[:2])
    if not torch.isfinite(w).all() or (w < 0).any() or not (w > 0).any(dim=1).all():
        raise ValueError(
            f"Expected finite '{name}' of at least zero, some of each mesh above (got others)"
        )
    if not torch.isfinite(position[w > 0]).all():
        raise ValueError(
            f"Expected finite vertices (got NaN or infinity): those that are unknown need a "
            f"'{name}' of zero"
        )
    every = torch.arange(n, device=x.device).view(-1, 1)
    mapping = Mapping(every, torch.ones_like(every, dtype=torch.double), n)
    return Points(mapping, position.masked_fill(w.unsqueeze(2) == 0, 0), w, x.dim() == 2)


def observed_landmarks(model: MorphableModel, landmarks: Any) -> Points:
    r"""Landmarks by vertex, or by a mapping from vertices to them."""
    if isinstance(landmarks, dict):
        landmarks = list(landmarks), list(landmarks.values())
    if not isinstance(landmarks, tuple) or len(landmarks) != 2:
        raise TypeError(
            f"Expected landmarks as positions by vertex or a tuple of vertices and positions (got "
            f"{type(landmarks).__name__})"
        )
    where, position = landmarks
    n = model.num_vertices
    position = _tensor("positions of landmarks", position, model)
    if isinstance(where, Mapping):
        mapping = where.to(model.mean.device, torch.double)
    else:
        index = torch.as_tensor(where, dtype=None if len(where) else torch.long)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"Expected landmarks at vertices by number (got {index.dtype})")
        if index.dim() != 1 or len(index) == 0 or index.min() < 0 or index.max() >= n:
            raise ValueError(f"Expected landmarks at vertices from 0 to {n - 1} (got {where!r})")
        index = index.view(-1, 1).to(model.mean.device, torch.long)
        mapping = Mapping(index, torch.ones_like(index, dtype=torch.double), n)
    if mapping.num_source != n:
        raise ValueError(f"Expected landmarks on {n} vertices (got on {mapping.num_source})")
    shape = mapping.num_target, 3
    if position.dim() not in (2, 3) or position.shape[-2:] != shape or 0 in position.shape:
        raise ValueError(
            f"Expected positions of shape {list(shape)} of landmarks (got {list(position.shape)})"
        )
    if not torch.isfinite(position).all():
        raise ValueError("Expected finite positions of landmarks (got NaN or infinity)")
    batch = position.view(-1, *shape)
    return Points(mapping, batch, torch.ones_like(batch[..., 0]), position.dim() == 2)


def observed_scan(model: MorphableModel, scan: Any, any_size: bool) -> Scan:
    r"""A scan or point cloud in one of its forms. One that is much larger or smaller than the model
    is refused, unless it may be of any size."""
    normals = None
    if isinstance(scan, str | Path):
        found, face, normals = read_scan(scan)
        scan = metres(model.unit) * found, face
    if isinstance(scan, Data):
        if scan.pos is None:
            raise ValueError("Expected the points 'pos' of a scan (got none)")
        normals = scan.norm if "norm" in scan else None
        scan = scan.pos, None if scan.face is None else scan.face.t()
    if len(scan) != 2:
        raise TypeError(f"Expected a scan of vertices and faces (got a tuple of {len(scan)})")
    points: ndarray = as_array(scan[0])
    faces: ndarray | None = None if scan[1] is None else as_array(scan[1])
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < 3 or points.dtype.kind != "f":
        raise ValueError(
            f"Expected at least three points [P, 3] of a scan in floating point (got "
            f"{list(points.shape)} of {points.dtype})"
        )
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("Expected finite points of a scan (got NaN or infinity)")
    size = np.ptp(points, axis=0).max()
    if not 1e-12 < size < 1e12:
        raise ValueError(f"Expected points of a scan at different places (got a size of {size:g})")
    boundary = np.zeros(len(points), dtype=bool)
    if faces is not None:
        if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu" or not len(faces):
            raise ValueError(
                f"Expected faces [F, 3] of vertices by number (got {faces.dtype} {faces.shape})"
            )
        if faces.min() < 0 or faces.max() >= len(points):
            raise ValueError(
                f"Expected faces of vertices from 0 to {len(points) - 1} (got {faces.min()} to "
                f"{faces.max()})"
            )
        faces = faces.astype(np.int64)
        a, b, c = points[faces].swapaxes(0, 1)
        if not np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() > 1e-12 * size**2:
            raise ValueError("Expected faces of a scan with an area (got none)")
        boundary = at_open_edges(faces, len(points))
    if normals is not None:
        normals = as_array(normals).astype(np.float64)
        if normals.shape != points.shape or not np.isfinite(normals).all():
            raise ValueError(f"Expected finite normals {list(points.shape)} (got others)")
        normals = unit_vectors(normals)
    elif faces is not None:
        normals = vertex_normals(points, faces)
    if not any_size:
        own = np.ptp(as_array(model.template), axis=0).max()
        if not own / 50 < size < 50 * own:
            raise ValueError(
                f"Expected a scan in metres of about the size of the model, {own:.3g} (got "
                f"{size:.3g}, which looks like another unit)"
            )
    return Scan(points, faces, normals, boundary)


def as_array(x: Any) -> ndarray:
    return x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x)


def at_open_edges(faces: ndarray, num_vertices: int) -> ndarray:
    r"""Which vertices lie at an edge of a single face."""
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    edges, count = np.unique(edges, axis=0, return_counts=True)
    found = np.zeros(num_vertices, dtype=bool)
    found[edges[count == 1]] = True
    return found


def unit_vectors(x: ndarray) -> ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)
