r"""Arguments in the forms in which people have them, as the one that the package computes with."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

KINDS = {0: "non-negative", 1: "positive"}


def as_integer(name: str, value: Any, least: int) -> int:
    r"""An integer of Python or NumPy, from :obj:`least` to below 2**32, as one of Python.

    Raises:
        TypeError: If it is no integer; a bool is none.
        ValueError: If it is out of range.

    Example:
        >>> from pyg_attnpool.arguments import as_integer
        >>> as_integer("steps", np.int64(3), least=2)
        3
    """
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"Expected an integer '{name}' (got {value!r})") from None
    if number < least:
        raise ValueError(
            f"Expected {KINDS.get(least, f'at least {least}')} '{name}' (got {number})"
        )
    if number >= 2**32:
        raise ValueError(f"Expected '{name}' below 2**32 (got a larger one)")
    return number


def as_floats(name: str, x: Any) -> Tensor:
    r"""Floating point numbers, a tensor or an array of any layout, as a tensor of their type.

    Raises:
        TypeError: If they are none.

    Example:
        >>> from pyg_attnpool.arguments import as_floats
        >>> as_floats("meshes", np.zeros((2, 642, 3))[:, ::-1]).shape
        torch.Size([2, 642, 3])
    """
    if isinstance(x, ndarray) and x.dtype.kind == "f":
        # Of the byte order and strides that PyTorch knows, and of at most its double precision.
        x = torch.from_numpy(np.asarray(x, f"f{min(x.itemsize, 8)}", order="C"))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"Expected {name} as a floating point tensor or array (got {got})")
    return x
