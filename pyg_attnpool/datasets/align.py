from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numpy import ndarray
from torch import Tensor

from pyg_attnpool.datasets.inputs import as_tensor
from pyg_attnpool.datasets.mesh_dataset import MeshDataset

ROUNDS = 100  # at most; meshes of one class take a few

BLOCK = 64  # meshes in double precision at a time

# Meshes look unaligned where the motion of their stillest part is more than a half of the squared
# distances between them, and more than a twentieth of their size.
STILL, SHARE, LEAST = 0.01, 0.55, 0.05


class Alignment(NamedTuple):
    r"""Meshes in one pose, and the motions that took them there:
    :math:`\mathbf{x}^{\prime} = s \, \mathbf{R} \mathbf{x} + \mathbf{t}`.

    Example:
        >>> aligned = align(torch.randn(8, 50, 3))
        >>> scan = torch.randn(1, 50, 3)
        >>> brought = aligned.bring(scan)  # into the pose of the eight
        >>> torch.allclose(brought.undo(brought.vertices), scan, atol=1e-5)
        True
    """

    vertices: Tensor
    r"""The aligned meshes :obj:`[M, N, C]`."""
    rotation: Tensor
    r"""Rotations :math:`\mathbf{R}` :obj:`[M, 3, 3]` (float64)."""
    translation: Tensor
    r"""Translations :math:`\mathbf{t}` :obj:`[M, 3]` (float64)."""
    scale: Tensor
    r"""Scales :math:`s` :obj:`[M]` (float64)."""
    mean: Tensor
    r"""The mean of the aligned coordinates :obj:`[N, 3]` (float64)."""
    scaled: bool = False
    r"""Whether sizes were made equal."""

    def bring(self, meshes: Any) -> Alignment:
        r"""Brings further meshes :obj:`[B, N, C]`, in the forms that :func:`align` takes, into this
        pose: each for itself is fitted to :attr:`mean`.

        Returns:
            Their own alignment, whose :meth:`undo` takes them, or what a model has made of them,
            back to where they were.

        Raises:
            TypeError: As :func:`align` does.
            ValueError: If the shapes do not fit or a coordinate is not finite.
        """
        meshes = as_tensor(meshes)
        _check(meshes, self.mean)
        mean = self.mean.to(meshes.device)
        rotation, factor, centre, _ = _fitted(meshes, mean, self.scaled)
        translation = mean.mean(dim=0) - factor.view(-1, 1) * _turned(rotation, centre)
        vertices = _moved(meshes, rotation, factor, translation)
        return Alignment(vertices, rotation, translation, factor, mean, self.scaled)

    def undo(self, vertices: Any) -> Tensor:
        r"""Takes meshes :obj:`[M, N, C]` of the common pose back to where they were. If the motion
        is that of a single mesh, there may be any number of meshes, which all go there.

        Raises:
            TypeError: As :func:`align` does.
            ValueError: If there are not as many meshes as motions.
        """
        vertices = as_tensor(vertices)
        num = len(vertices)
        if vertices.dim() != 3 or len(self.scale) not in (1, num):
            raise ValueError(
                f"Expected meshes of shape [{len(self.scale)}, N, C] (got {list(vertices.shape)})"
            )
        rotation, translation = self.rotation.expand(num, -1, -1), self.translation.expand(num, -1)
        scale = self.scale.expand(num)

        def back(x: Tensor, part: slice) -> Tensor:
            x = x - translation[part].unsqueeze(1)
            return x @ rotation[part] / scale[part].view(-1, 1, 1)

        return _blockwise(vertices, back)

    def select(self, index: Tensor) -> Alignment:
        r"""Some of the meshes and their motions; the mean stays that of all."""
        names = ("vertices", "rotation", "translation", "scale")
        return self._replace(**{name: getattr(self, name)[index] for name in names})


def align(meshes: Any, scale: bool = False, reference: Tensor | ndarray | None = None) -> Alignment:
    r"""Turns and moves registered meshes into one pose by generalised Procrustes analysis (Gower,
    Psychometrika 1975): every mesh is fitted to the mean, by the rotation of least squared
    distance (no reflection), until the mean stays.

    Sequences with a motion of the whole body say little about shape until this is taken away.

    Args:
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Floating point meshes
            :obj:`[M, N, C]`, or :class:`~torch_geometric.data.Data` objects. The aligned ones are a
            tensor of their type. Further features than the first three stay as they are, so
            normals are not turned.
        scale (bool, optional): If set to :obj:`True`, sizes are made equal as well.
            (default: :obj:`False`)
        reference (torch.Tensor or numpy.ndarray, optional): Vertices :obj:`[N, 3]` in the pose that
            all shall have. If :obj:`None`, those of the first mesh. (default: :obj:`None`)

    Raises:
        TypeError: If the meshes are in another form, or not floating point.
        ValueError: If the shapes do not fit or a coordinate is not finite.

    Example:
        >>> x = torch.randn(1, 50, 3)
        >>> turned = torch.cat([x, x @ torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])])
        >>> aligned = align(turned).vertices
        >>> torch.allclose(aligned[1], aligned[0], atol=1e-5)
        True
    """
    meshes = as_tensor(meshes)
    if isinstance(reference, ndarray):
        reference = torch.from_numpy(reference)
    if reference is not None and not isinstance(reference, Tensor):
        raise TypeError(
            f"Expected 'reference' as a tensor or array (got {type(reference).__name__})"
        )
    _check(meshes, reference)
    pose = meshes[0, :, :3].double() if reference is None else reference.double()
    pose = pose.to(meshes.device)
    origin = pose.mean(dim=0)
    pose = pose - origin
    size = pose.norm()
    mean = pose
    for _ in range(ROUNDS):
        rotation, factor, centre, fitted = _fitted(meshes, mean, scale)
        before, mean = mean, fitted
        # The mean may turn and shrink from round to round: the pose of all is the reference's.
        mean = mean @ rotations(mean.unsqueeze(0), pose)[0].mT
        mean = mean * (size / mean.norm()) if scale else mean
        if (mean - before).norm() <= 1e-12 * size:
            break
    translation = origin - factor.view(-1, 1) * _turned(rotation, centre)
    vertices = _moved(meshes, rotation, factor, translation)
    return Alignment(vertices, rotation, translation, factor, fitted + origin, scale)


def rotations(x: Tensor, target: Tensor) -> Tensor:
    r"""The rotations :obj:`[M, 3, 3]` of least squared distance from centred meshes
    :obj:`[M, N, 3]` to a centred one :obj:`[N, 3]` (Kabsch, Acta Crystallographica 1976)."""
    u, _, vt = torch.linalg.svd(x.mT @ target)
    sign = torch.det(u @ vt).sign()
    u = torch.cat([u[..., :2], u[..., 2:] * sign.view(-1, 1, 1)], dim=-1)
    return (u @ vt).mT


def looks_unaligned(meshes: Any) -> bool:
    r"""Whether meshes :obj:`[M, N, C]`, in the forms that :meth:`align` takes, are turned and
    placed so differently that they want it, by some 64 of them.

    Meshes that bend, too, come closer to each other by a motion of the whole. But a part of them
    keeps its place, as the wrist of hands does. So it is the hundredth of the vertices that moves
    least by which the meshes are aligned here: where that takes away more than a half of the
    squared distances to the mean, and more than a twentieth of the size of a mesh, they look
    unaligned.

    Raises:
        TypeError: As :func:`align` does.
        ValueError: If the shape does not fit or a coordinate is not finite.

    Example:
        >>> x = torch.randn(1, 50, 3) + 0.01 * torch.randn(8, 50, 3)
        >>> looks_unaligned(x), looks_unaligned(x + 10 * torch.randn(8, 1, 3))
        (False, True)
    """
    meshes = meshes if isinstance(meshes, MeshDataset) else as_tensor(meshes)
    x = as_tensor(meshes[:: max(1, len(meshes) // 64)])
    _check(x, None)
    x = x[..., :3].double()
    if len(x) < 2:
        return False
    moves = (x - x.mean(dim=0)).square().sum(dim=-1).mean(dim=0)
    still = moves.argsort(stable=True)[: max(8, math.ceil(STILL * len(moves)))]
    by_part = align(x[:, still])
    x = _moved(x, by_part.rotation, by_part.scale, by_part.translation)
    left = (x - x.mean(dim=0)).square().sum(dim=-1).mean()
    size = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=-1).mean()
    taken = moves.mean() - left
    return bool(taken > SHARE * moves.mean() and taken > LEAST**2 * size)


def _check(meshes: Tensor, reference: Tensor | None) -> None:
    if meshes.dim() != 3 or meshes.size(2) < 3 or meshes.numel() == 0:
        raise ValueError(f"Expected meshes of shape [M, N, C] (got {list(meshes.shape)})")
    if reference is not None and reference.shape != (meshes.size(1), 3):
        raise ValueError(
            f"Expected a 'reference' of shape {[meshes.size(1), 3]} (got {list(reference.shape)})"
        )
    finite = all(torch.isfinite(block[..., :3]).all() for block in meshes.split(BLOCK))
    if not finite or (reference is not None and not torch.isfinite(reference).all()):
        raise ValueError("Expected finite meshes and 'reference' (got NaN or infinity)")


def _fitted(meshes: Tensor, mean: Tensor, scale: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Rotations, factors and centres of meshes that are fitted to one, and the mean of what comes
    # out, about the origin.
    mean = mean - mean.mean(dim=0)
    parts, total = [], torch.zeros_like(mean)
    for block in meshes.split(BLOCK):
        x = block[..., :3].double()
        centre = x.mean(dim=1)
        x = x - centre.unsqueeze(1)
        rotation = rotations(x, mean)
        fitted = x @ rotation.mT
        factor = x.new_ones(len(x))
        if scale:
            factor = (fitted * mean).sum(dim=(1, 2)) / x.square().sum(dim=(1, 2)).clamp(min=1e-300)
            fitted = factor.view(-1, 1, 1) * fitted
        total += fitted.sum(dim=0)
        parts.append((rotation, factor, centre))
    rotation, factor, centre = (torch.cat(part) for part in zip(*parts, strict=True))
    return rotation, factor, centre, total / len(meshes)


def _turned(rotation: Tensor, points: Tensor) -> Tensor:
    return (rotation @ points.unsqueeze(2)).squeeze(2)


def _moved(meshes: Tensor, rotation: Tensor, factor: Tensor, translation: Tensor) -> Tensor:
    def move(x: Tensor, part: slice) -> Tensor:
        x = factor[part].view(-1, 1, 1) * (x @ rotation[part].mT)
        return x + translation[part].unsqueeze(1)

    return _blockwise(meshes, move)


def _blockwise(meshes: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    # A new tensor, whose coordinates a function has changed in double precision. No more than a
    # block of meshes is held twice.
    out = meshes.clone()
    for start in range(0, len(meshes), BLOCK):
        part = slice(start, start + BLOCK)
        out[part, :, :3] = function(meshes[part, :, :3].double(), part).to(meshes.dtype)
    return out
