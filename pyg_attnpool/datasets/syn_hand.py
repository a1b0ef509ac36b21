from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from numpy import ndarray

from pyg_attnpool.datasets.registered_meshes import RegisteredMeshes


class SynHand(RegisteredMeshes):
    r"""Hands of SynHand5M, the data set of the `"DeepHPS: End-to-end Estimation of 3D Hand Pose
    and Shape by Learning from Synthetic Depth" <https://arxiv.org/abs/1808.09208>`_ paper, which
    the experiments call SYNHAND: 100,000 of its meshes of 1,193 vertices. They are given as a
    folder of mesh files or an array, as in :class:`RegisteredMeshes`. Every mesh is drawn for
    itself, so :meth:`split` keeps the first 10 of every 100 for test unless told otherwise. Files
    are in the plain order of their names, as in the data set.

    Args:
        root (str or Path): As in :class:`RegisteredMeshes`: a folder of mesh files, or an array of
            vertices :obj:`[M, 1193, 3]`.
        template (str, Path or tuple, optional): As in :class:`RegisteredMeshes`.
            (default: :obj:`None`)
        unit (str, optional): As in :class:`RegisteredMeshes`. (default: :obj:`"mm"`)
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)
        cache (str or Path, optional): As in :class:`RegisteredMeshes`. (default: :obj:`None`)

    Raises:
        FileNotFoundError: If there is no such folder or file; the message says whom to ask.
        ValueError: As in :class:`RegisteredMeshes`.

    Example:
        >>> from pyg_attnpool.datasets import SynHand
        >>> dataset = SynHand("data/SynHand")  # doctest: +SKIP
    """

    default_split = "independent"
    sorts_naturally = False

    def __init__(
        self,
        root: str | Path,
        template: str | Path | tuple[ndarray, ndarray] | None = None,
        unit: str = "mm",
        transform: Callable | None = None,
        cache: str | Path | None = None,
    ):
        path = Path(root).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"Expected meshes of SynHand5M at {path} (got no such file or folder): ask the "
                f"authors of https://arxiv.org/abs/1808.09208 for them, and put them there as "
                f"mesh files or as an array [M, 1193, 3] in a .npy file"
            )
        super().__init__(path, template, unit, transform, cache)
