r"""The data set of a training, told in the folder of its run."""

import inspect
import json
from pathlib import Path
from typing import Any

from pyg_attnpool.datasets.anny.bodies import AnnyBodies
from pyg_attnpool.datasets.anny.faces import AnnyFaces
from pyg_attnpool.datasets.anny.hands import AnnyHands
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.datasets.registered_meshes import RegisteredMeshes
from pyg_attnpool.files import write_bytes

RECORD = "data.json"
KNOWN: dict[str, type[MeshDataset]] = {
    kind.__name__: kind for kind in (AnnyBodies, AnnyFaces, AnnyHands, RegisteredMeshes)
}


def record_dataset(folder: str | Path, dataset: str, **arguments: Any) -> None:
    r"""Says in the folder of a run which meshes it is of, for :func:`recorded_dataset` and
    :obj:`pyg-attnpool report`.

    Args:
        folder (str or Path): The folder that :obj:`output` of :func:`pyg_attnpool.training.fit`
            was.
        dataset (str): The name of the class: :obj:`"AnnyBodies"`, :obj:`"AnnyFaces"`,
            :obj:`"AnnyHands"` or :obj:`"RegisteredMeshes"`.
        **arguments (optional): Its arguments that are no default, of kinds that JSON knows.

    Raises:
        ValueError: If the name is another one.

    Example:
        >>> from pyg_attnpool.datasets import record_dataset
        >>> record_dataset("runs/mine", "RegisteredMeshes", root="my_scans", unit="mm")
    """
    if dataset not in KNOWN:
        raise ValueError(f"Expected 'dataset' to be one of {list(KNOWN)} (got {dataset!r})")
    places = ("root", "template")  # wherever the run is looked at from
    known = {
        name: str(Path(value).expanduser().resolve()) if name in places and value else value
        for name, value in arguments.items()
    }
    content = json.dumps({"dataset": dataset, "arguments": known}, indent=2) + "\n"
    write_bytes(Path(folder) / RECORD, content.encode())


def recorded_dataset(folder: str | Path) -> MeshDataset:
    r"""The data set that :func:`record_dataset` has told.

    Raises:
        FileNotFoundError: If the folder does not tell it, or the files of its meshes are gone.
        ValueError: If what it tells is something else.

    Example:
        >>> from pyg_attnpool.datasets import recorded_dataset, record_dataset
        >>> from pyg_attnpool.mesh import write_mesh
        >>> for i, mesh in enumerate(meshes):
        ...     write_mesh(f"my_scans/{i}.ply", mesh.numpy(), template[1])
        >>> record_dataset("runs/mine", "RegisteredMeshes", root="my_scans", unit="mm")
        >>> len(recorded_dataset("runs/mine"))
        24
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"Expected the meshes of a training in {path} (got no such file)")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kind, arguments = KNOWN[told["dataset"]], dict(told["arguments"])
        inspect.signature(kind).bind(**arguments)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"Expected the meshes of a training in {path} (got something else)") from e
    return kind(**arguments)
