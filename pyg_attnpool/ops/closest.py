r"""The faces of a mesh that are closest to points, by a tree of boxes (csrc/closest.cpp)."""

import torch
from torch import Tensor

from pyg_attnpool.ops import _cpu


def available() -> bool:
    r"""Whether they can be found so: there is a compiled library."""
    return _cpu.AVAILABLE


def near_faces(
    points: Tensor, vertices: Tensor, faces: Tensor, room: int
) -> tuple[int, Tensor, Tensor]:
    r"""Pairs of a point and a face that is as close to it as any, up to rounding, of the first
    points, as far as there is room for them.

    Args:
        points (torch.Tensor): Points :obj:`[M, 3]`, finite and in double precision.
        vertices (torch.Tensor): Vertices :obj:`[N, 3]`, likewise.
        faces (torch.Tensor): Faces :obj:`[F, 3]`.
        room (int): The number of pairs at most, as many as there are faces at least.

    Returns:
        The number of these points, and of every pair the point, in ascending order, and the face.

    Raises:
        ValueError: If something is of another type, or a face has no such vertex.

    Example:
        >>> vertices = torch.eye(3).double()
        >>> near_faces(torch.ones(2, 3).double(), vertices, torch.tensor([[0, 1, 2]]), 8)
        (2, tensor([0, 1]), tensor([0, 0]))
    """
    row, face = (torch.empty(room, dtype=torch.long) for _ in range(2))
    found = torch.empty(2, dtype=torch.long)
    sizes = len(points), len(vertices), len(faces), room
    _cpu.call("near_faces", *sizes, points, vertices, faces, row, face, found)
    done, pairs = found.tolist()
    return done, row[:pairs], face[:pairs]
