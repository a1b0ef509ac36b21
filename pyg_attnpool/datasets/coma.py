from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import torch
from numpy import ndarray

from pyg_attnpool.datasets.cache import load
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.sources import GENERATOR, MeshFiles
from pyg_attnpool.files import damage_named

URL = "https://coma.is.tue.mpg.de"

LABELS = ("name", "subject", "expression", "frame")

EXPRESSIONS = (
    "bareteeth",
    "cheeks_in",
    "eyebrow",
    "high_smile",
    "lips_back",
    "lips_up",
    "mouth_down",
    "mouth_extreme",
    "mouth_middle",
    "mouth_open",
    "mouth_side",
    "mouth_up",
)


class CoMA(MeshDataset):
    r"""Unlike :class:`torch_geometric.datasets.CoMA`, all meshes in sorted order as one tensor,
    with their labels and the splits of the published experiments.

    The COMA data set of the `"Generating 3D faces using Convolutional Mesh Autoencoders"
    <https://arxiv.org/abs/1807.10267>`_ paper: 20,466 faces of 5,023 vertices, 12 subjects in
    12 extreme expressions, ordered by subject, expression and frame, in metres. The files are
    read once, to :obj:`processed/coma.npz` and :obj:`.npy`, and the vertices then mapped.

    They lie where :class:`torch_geometric.datasets.CoMA` expects them, so that both can share a
    folder. Its split is none of those of :meth:`split`: it tests on the last 10 of every 100
    frames within a sequence and validates on nothing, where the paper takes the first 11 and the
    next 10 of every 100 meshes of the whole data set, or holds out an expression or a subject.

    Args:
        root (str or Path): The folder with :obj:`raw/COMA_data.zip`, or with the
            :obj:`FaceTalk_*` folders unpacked from it, in :obj:`raw` or itself.
        transform (callable, optional): As in :class:`MeshDataset`. (default: :obj:`None`)

    Raises:
        FileNotFoundError: If there are no meshes; the message says where to ask for them.
        ValueError: If a subject lacks an expression, a file cannot be read, a mesh has another
            topology than the first, a coordinate is not finite, or the disk is full.

    Example:
        >>> from pyg_attnpool.datasets import CoMA
        >>> dataset = CoMA("data/CoMA")  # doctest: +SKIP
        >>> split = dataset.split("interpolation")  # doctest: +SKIP
    """

    def __init__(self, root: str | Path, transform: Callable | None = None):
        root = Path(root).expanduser()
        path = root / "processed" / "coma.npz"
        files = _files(root)
        if files is not None:
            arrays: dict[str, ndarray] | None = files.stored(path)
        else:
            arrays = load(path, {"generator": GENERATOR}, LABELS)
        if arrays is None:
            raise FileNotFoundError(
                f"Expected the COMA data set in {root} (got none): ask for it at {URL} and put "
                f"'COMA_data.zip' into {root / 'raw'}"
            )
        labels = {key: arrays[key].tolist() for key in LABELS}
        vertices = torch.from_numpy(arrays["vertices"])
        super().__init__(
            vertices, (arrays["template"], arrays["faces"]), labels, str(root), transform
        )


def _files(root: Path) -> MeshFiles | None:
    for folder in (root / "raw", root):
        names = sorted(
            file.relative_to(folder).as_posix().split("/")
            for expression in EXPRESSIONS
            for file in folder.glob(f"FaceTalk_*/{expression}/*.ply")
        )
        if names:
            return _checked(folder, names)
    archive = root / "raw" / "COMA_data.zip"
    if not archive.exists():
        return None
    with damage_named(archive, "a whole archive"), ZipFile(archive) as file:
        names = [name.split("/") for name in file.namelist()]
    names = sorted(
        name
        for name in names
        if len(name) == 3
        and name[0].startswith("FaceTalk_")
        and name[1] in EXPRESSIONS
        and name[2].endswith(".ply")
        and not name[2].startswith(".")
    )
    if not names:
        raise ValueError(f"Expected FaceTalk_*/expression/*.ply in {archive} (got none)")
    return _checked(archive, names)


def _checked(path: Path, names: list[list[str]]) -> MeshFiles:
    for subject in sorted({name[0] for name in names}):
        missing = set(EXPRESSIONS).difference(name[1] for name in names if name[0] == subject)
        if missing:
            raise ValueError(
                f"Expected {len(EXPRESSIONS)} expressions of {subject} in {path} "
                f"(got none of {', '.join(sorted(missing))})"
            )
    return MeshFiles(path, ["/".join(name) for name in names])
