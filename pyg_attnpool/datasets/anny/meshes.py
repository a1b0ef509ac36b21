from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from pyg_attnpool.arguments import as_integer
from pyg_attnpool.datasets.anny.detail import DETAIL_GENERATOR, Detail
from pyg_attnpool.datasets.cache import Source, stored
from pyg_attnpool.datasets.mesh_dataset import MeshDataset


class AnnyMeshes(MeshDataset):
    r"""What the data sets made from the `Anny <https://arxiv.org/abs/2511.03589>`_ model have in
    common: they are made on this computer, block after block, and stored for the next time.

    Args:
        root (str or Path): The folder to store the data set in.
        size (dict): The number of meshes, or of meshes per sequence, by its name.
        seed (int): Seed of everything random.
        labels (dict): As in :class:`MeshDataset`.
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        detail (bool or Detail, optional): What scans have beside smooth shapes, see
            :class:`~pyg_attnpool.datasets.anny.Detail`. (default: :obj:`False`)

    Raises:
        ValueError: If :obj:`size` is not positive or :obj:`seed` negative.
        TypeError: If :obj:`detail` is neither a flag nor a :class:`Detail`.
    """

    kind: str
    r"""The meshes in one word, of which the names of files are made."""

    generator: int
    r"""The version of what makes the meshes, part of every stored file."""

    mapped = True
    r"""Whether vertices are mapped, as in :meth:`~pyg_attnpool.datasets.cache.stored`."""

    def __init__(
        self,
        root: str | Path,
        size: dict[str, int],
        seed: int,
        labels: Mapping[str, Sequence[Any]],
        transform: Callable | None = None,
        detail: bool | Detail = False,
    ):
        size = {name: as_integer(name, number, least=1) for name, number in size.items()}
        seed = as_integer("seed", seed, least=0)
        if not isinstance(detail, bool | Detail):
            raise TypeError(f"Expected 'detail' as a flag or a Detail (got {detail!r})")
        settings: dict[str, int | str] = {"generator": self.generator, **size, "seed": seed}
        numbers = "_".join(f"{name}{number}" for name, number in size.items())
        stem = f"anny_{self.kind}_{numbers}_seed{seed}"
        if detail:
            detail = Detail() if detail is True else detail
            stem += f"_detail{detail}"
            settings |= {"detail": str(detail), "detail_generator": DETAIL_GENERATOR}
        root = Path(root).expanduser()
        path = root / "processed" / f"{stem}.npz"
        # A block is little work: where cores are shared, more threads take three times as long.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            arrays = stored(
                path,
                settings,
                lambda: self.source(path.parent, size, seed, detail or None),
                f"Making {self.kind}",
                mapped=self.mapped,
            )
        finally:
            torch.set_num_threads(num_threads)
        vertices = torch.from_numpy(arrays["vertices"])
        super().__init__(
            vertices, (arrays["template"], arrays["faces"]), labels, str(root), transform
        )

    @staticmethod
    def source(folder: Path, size: Mapping[str, int], seed: int, detail: Detail | None) -> Source:
        r"""What makes the blocks, given a folder for temporary files."""
        raise NotImplementedError


class AnnySequences(AnnyMeshes):
    r"""What those of them have in common in which every subject has a sequence of every expression.

    Args:
        root (str or Path): The folder to store the data set in.
        frames (int, optional): Meshes per sequence. (default: :obj:`20`)
        seed (int, optional): Seed of everything random. (default: :obj:`0`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        detail (bool or Detail, optional): As in :class:`AnnyMeshes`. (default: :obj:`False`)
    """

    subjects: Sequence[str]
    expressions: Sequence[str]

    def __init__(
        self,
        root: str | Path,
        frames: int = 20,
        seed: int = 0,
        transform: Callable | None = None,
        detail: bool | Detail = False,
        **size: int,
    ):
        every = [(s, e, i) for s in self.subjects for e in self.expressions for i in range(frames)]
        labels: dict[str, list[Any]] = {
            "subject": [s for s, _, _ in every],
            "expression": [e for _, e, _ in every],
            "frame": [i for _, _, i in every],
        }
        super().__init__(root, {"frames": frames, **size}, seed, labels, transform, detail)


def smoothstep(x: ndarray) -> ndarray:
    r"""From 0 to 1, with two derivatives that vanish at both."""
    x = np.clip(x, 0, 1)
    return x**3 * (10 + x * (6 * x - 15))
