r"""Units of length. Meshes are held in metres, files in the unit that their maker chose."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}

LARGEST = 20.0  # metres about the centre, beyond which coordinates look like millimetres

# In a call that warns once: whether it has.
_warned: ContextVar[list[bool] | None] = ContextVar("warned", default=None)


def metres(unit: str) -> float:
    r"""The length of a unit in metres.

    Raises:
        ValueError: If the unit is none of :obj:`"m"`, :obj:`"cm"` and :obj:`"mm"`.

    Example:
        >>> metres("mm")
        0.001
    """
    if unit not in METRES:
        raise ValueError(f"Expected 'unit' to be one of {list(METRES)} (got {unit!r})")
    return METRES[unit]


@contextmanager
def one_warning() -> Iterator[None]:
    r"""Within it, :func:`warn_millimetres` warns once, in whichever call of the package it is that
    looks at meshes first. Decorates what users call and what calls others."""
    token = _warned.set([False]) if _warned.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _warned.reset(token)


def warn_millimetres(name: str, x: Tensor) -> bool:
    r"""Says in one warning line where coordinates :obj:`[..., N, C]` of a model of metres look like
    millimetres."""
    warned = _warned.get() or [False]
    if warned[0] or x.numel() == 0:
        return warned[0]
    if x.abs().amax().item() <= LARGEST / 2:  # no point is further from the centre than twice that
        return False
    largest = (x[..., :3] - x[..., :3].mean(dim=-2, keepdim=True)).abs().amax().item()
    if not largest > LARGEST:  # nor where it is NaN
        return False
    warned[0] = True
    warnings.warn(
        f"Expected {name} in metres (got coordinates {largest:.0f} away from their centre, "
        f"which look like millimetres: divide by 1000, or read files with unit='mm')",
        stacklevel=_user_level(),
    )
    return True


def _user_level() -> int:
    # Of the line that has called the package, whatever lies between, as trainers do; decorators are
    # none of it.
    found, level = 1, 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "").partition(".")[0]
        if name == __package__ or (level == found and name in ("torch", "contextlib")):
            found = level + 1
        frame, level = frame.f_back, level + 1
    return found
