from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 100  # at most; meshes of one class take a few


class Alignment(NamedTuple):
    r"""Meshes in one pose, and the motions that took them there:
    :math:`\mathbf{x}^{\prime} = s \, \mathbf{R} \mathbf{x} + \mathbf{t}`."""

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

    def undo(self, vertices: Tensor) -> Tensor:
        r"""Takes meshes :obj:`[M, N, C]` of the common pose back to where they were."""
        x = vertices[..., :3].double() - self.translation.unsqueeze(1)
        x = x @ self.rotation / self.scale.view(-1, 1, 1)
        return torch.cat([x.to(vertices.dtype), vertices[..., 3:]], dim=-1)


def align(meshes: Tensor, scale: bool = False, reference: Tensor | None = None) -> Alignment:
    r"""Turns and moves registered meshes into one pose by generalised Procrustes analysis (Gower,
    Psychometrika 1975): every mesh is fitted to the mean, by the rotation of least squared
    distance (no reflection), until the mean stays.

    Sequences with a motion of the whole body say little about shape until this is taken away.

    Args:
        meshes (torch.Tensor): Meshes :obj:`[M, N, C]`. Further features than the first three stay
            as they are, normals too.
        scale (bool, optional): If set to :obj:`True`, sizes are made equal as well.
            (default: :obj:`False`)
        reference (torch.Tensor, optional): Vertices :obj:`[N, 3]` in the pose that all shall have.
            If :obj:`None`, those of the first mesh. (default: :obj:`None`)

    Raises:
        ValueError: If the shapes do not fit or a coordinate is not finite.

    Example:
        >>> x = torch.randn(1, 50, 3)
        >>> turned = torch.cat([x, x @ torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])])
        >>> aligned = align(turned).vertices
        >>> torch.allclose(aligned[1], aligned[0], atol=1e-5)
        True
    """
    if meshes.dim() != 3 or meshes.size(2) < 3 or meshes.numel() == 0:
        raise ValueError(f"Expected meshes of shape [M, N, C] (got {list(meshes.shape)})")
    x = meshes[..., :3].double()
    pose = x[0] if reference is None else reference.double().to(x.device)
    if pose.shape != x.shape[1:]:
        raise ValueError(
            f"Expected a 'reference' of shape {list(x.shape[1:])} (got {list(pose.shape)})"
        )
    if not (torch.isfinite(x).all() and torch.isfinite(pose).all()):
        raise ValueError("Expected finite meshes and 'reference' (got NaN or infinity)")
    centre = x.mean(dim=1, keepdim=True)
    x = x - centre
    origin = pose.mean(dim=0)
    pose = pose - origin
    size = pose.norm()
    mean = pose
    for _ in range(ROUNDS):
        rotation = rotations(x, mean)
        fitted = x @ rotation.mT
        factor = x.new_ones(len(x))
        if scale:
            factor = (fitted * mean).sum(dim=(1, 2)) / x.square().sum(dim=(1, 2)).clamp(min=1e-300)
            fitted = factor.view(-1, 1, 1) * fitted
        before, mean = mean, fitted.mean(dim=0)
        # The mean may turn and shrink from round to round: the pose of all is the reference's.
        mean = mean @ rotations(mean.unsqueeze(0), pose)[0].mT
        mean = mean * (size / mean.norm()) if scale else mean
        if (mean - before).norm() <= 1e-12 * size:
            break
    translation = origin - factor.view(-1, 1) * (rotation @ centre.mT).squeeze(2)
    aligned = (fitted + origin).to(meshes.dtype)
    vertices = torch.cat([aligned, meshes[..., 3:]], dim=-1)
    return Alignment(vertices, rotation, translation, factor, fitted.mean(dim=0) + origin)


def rotations(x: Tensor, target: Tensor) -> Tensor:
    # The rotations of least squared distance from centred meshes to a centred one (Kabsch, Acta
    # Crystallographica 1976).
    u, _, vt = torch.linalg.svd(x.mT @ target)
    sign = torch.det(u @ vt).sign()
    u = torch.cat([u[..., :2], u[..., 2:] * sign.view(-1, 1, 1)], dim=-1)
    return (u @ vt).mT


def looks_unaligned(meshes: Tensor) -> bool:
    r"""Whether rigid motions are most of what sets meshes :obj:`[M, N, C]` apart, by some 64 of
    them: then they want :meth:`align`.

    Example:
        >>> x = torch.randn(1, 50, 3) + 0.01 * torch.randn(8, 50, 3)
        >>> looks_unaligned(x), looks_unaligned(x + 10 * torch.randn(8, 1, 3))
        (False, True)
    """
    x = meshes[:: max(1, len(meshes) // 64), :, :3].double()
    if len(x) < 2:
        return False
    spread = (x - x.mean(dim=0)).square().sum()
    aligned = align(x).vertices
    left = (aligned - aligned.mean(dim=0)).square().sum()
    return bool(left < 0.5 * spread)
