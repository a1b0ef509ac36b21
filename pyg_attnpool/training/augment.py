r"""Augmentations of a batch of meshes, as functions for :obj:`transform` of
:func:`~pyg_attnpool.training.fit`. They draw from torch's global generator."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def rigid_motion(angle: float = 10.0, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    r"""Turns every mesh about its own centre, and moves it. Features beyond coordinates stay as
    they are, so normals among them are not turned along.

    Args:
        angle (float, optional): The largest angle in degrees, about a random axis.
            (default: :obj:`10.0`)
        shift (float, optional): The standard deviation of the move along every axis, in metres.
            (default: :obj:`0.0`)

    Example:
        >>> x = torch.randn(2, 100, 3)
        >>> y = rigid_motion(angle=30.0)(x)
        >>> torch.allclose(torch.pdist(y[0]), torch.pdist(x[0]), atol=1e-4)
        True
    """
    _check("angle", angle)
    _check("shift", shift)
    return partial(_move, angle=angle, shift=shift)


def _move(x: Tensor, angle: float, shift: float) -> Tensor:
    axis = torch.nn.functional.normalize(torch.randn(len(x), 3), dim=1)
    turn = torch.deg2rad(angle * torch.rand(len(x), 1)) * axis
    zero = torch.zeros(len(x))
    a, b, c = turn.unbind(dim=1)
    skew = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], dim=1).view(-1, 3, 3)
    rotation = torch.linalg.matrix_exp(skew).to(x)
    move = shift * torch.randn(len(x), 1, 3).to(x)
    centre = x[..., :3].mean(dim=1, keepdim=True)
    moved = (x[..., :3] - centre) @ rotation.mT + centre + move
    return torch.cat([moved, x[..., 3:]], dim=-1)


def jitter(std: float = 0.001) -> Callable[[Tensor], Tensor]:
    r"""Adds normal noise of standard deviation :obj:`std`, in metres, to every coordinate.

    Args:
        std (float, optional): The standard deviation. (default: :obj:`0.001`)

    Example:
        >>> from pyg_attnpool.training import jitter
        >>> jitter(std=0.001)(meshes).shape  # a millimetre on every coordinate
        torch.Size([24, 642, 3])
    """
    _check("std", std)
    return partial(_shake, std=std)


def _shake(x: Tensor, std: float) -> Tensor:
    noise = std * torch.randn(*x.shape[:-1], 3).to(x)
    return torch.cat([x[..., :3] + noise, x[..., 3:]], dim=-1)


def _check(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"Expected '{name}' of at least 0 (got {value!r})")
