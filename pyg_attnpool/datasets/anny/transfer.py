r"""Deformation transfer with a known truth."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.datasets.anny.bodies import MOTIONS, _Bodies
from pyg_attnpool.datasets.anny.faces import EXPRESSIONS, _Faces

SOURCES: dict[str, tuple[type[_Faces] | type[_Bodies], Iterable[str]]] = {
    "faces": (_Faces, EXPRESSIONS),
    "bodies": (_Bodies, MOTIONS),
}


def transferred(
    data: Literal["faces", "bodies"],
    transfers: Iterable[tuple[int, int, str]],
    frames: int = 20,
    seed: int = 0,
) -> Tensor:
    r"""The sequence of an expression exactly as one subject makes it, on the shape of another. In
    the data set every subject has its own time and strength; here the truth of a transfer from the
    source to the target is known.

    Args:
        data (str): :obj:`"faces"` of :class:`~pyg_attnpool.datasets.AnnyFaces` or :obj:`"bodies"`
            of :class:`~pyg_attnpool.datasets.AnnyBodies`.
        transfers (list): For each sequence the numbers of the source and the target subject, and
            the expression.
        frames (int, optional): Meshes per sequence, as in the data set. (default: :obj:`20`)
        seed (int, optional): The seed of the data set. (default: :obj:`0`)

    Returns:
        Meshes :obj:`[len(transfers), frames, N, 3]` in metres.

    Raises:
        ImportError: If :obj:`anny` is not installed.
        ValueError: If the data set or an expression is unknown, :obj:`frames` is not positive or
            :obj:`seed` negative.
    """
    if data not in SOURCES:
        raise ValueError(f"Expected 'data' to be one of {list(SOURCES)} (got {data!r})")
    frames, seed = as_integer("frames", frames, least=1), as_integer("seed", seed, least=0)
    make, expressions = SOURCES[data]
    transfers, names = list(transfers), list(expressions)
    unknown = [name for _, _, name in transfers if name not in names]
    if unknown:
        raise ValueError(f"Expected expressions of {names} (got {unknown[0]!r})")
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder), frames, seed)
        meshes = [source.transferred(s, t, names.index(name)) for s, t, name in transfers]
    return torch.from_numpy(np.stack(meshes)).float()
