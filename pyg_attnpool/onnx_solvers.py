r"""Equations in ONNX, which knows no solver."""

# mypy: ignore-errors
# The functions are read as ONNX and never run by Python, whose types they do not follow.

from collections.abc import Callable
from typing import Any, TypeVar, Union

import onnxscript
import torch
from onnxscript import opset18 as op

Real = TypeVar("Real", bound=Union[onnxscript.FLOAT, onnxscript.DOUBLE])  # noqa: UP007


@onnxscript.script()
def solve(matrix: Real, right: Real, left: bool = True) -> Real:
    r"""As :func:`torch.linalg.solve` for matrices on both sides, by elimination.

    It needs no other pivots where matrices are positive definite, as those of least squares are,
    and goes over what is left once more. An export compares what it has written with the model,
    and refuses where they differ."""
    size = op.Shape(matrix, start=-1)
    square = op.Concat(size, size, axis=0)
    identity = op.CastLike(op.EyeLike(op.ConstantOfShape(square)), matrix)
    found = right - right
    for _ in range(2):
        both = op.Concat(matrix, right - op.MatMul(matrix, found), axis=-1)
        for i in range(op.Squeeze(size)):
            at = op.Reshape(i, [1])
            column = op.Gather(both, at, axis=-1)
            row = op.Gather(both, at, axis=-2) / op.Gather(column, at, axis=-2)
            both = both - (column - op.Gather(identity, at, axis=-1)) * row
        found = found + op.Slice(both, size, op.Shape(both, start=-1), [-1])
    return found


SOLVERS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.linalg_solve.default: solve}
