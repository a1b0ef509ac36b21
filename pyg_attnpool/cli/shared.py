r"""What commands share: their arguments, how they read models and meshes, and how they report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from torch import Tensor

    from pyg_attnpool import MorphableModel
    from pyg_attnpool.datasets import MeshDataset, RegisteredMeshes

Model = Annotated[
    Positional[str],
    arg(
        metavar="MODEL",
        help="Folder of a model or of its run. Where there is none, the name of a model that comes "
        "with the package: faces, bodies, hands, faces-32, bodies-32 or hands-32.",
    ),
]
Output = Annotated[Path, arg(aliases=["-o"])]
MaybeOutput = Annotated[Path | None, arg(aliases=["-o"])]
Unit = Literal["m", "cm", "mm"]

ALIGNED = "aligned"  # in the summary of a model: its meshes were turned and moved onto the template


def read_model(model: str | Path) -> MorphableModel:
    from pyg_attnpool import MorphableModel
    from pyg_attnpool.files import whole_folder
    from pyg_attnpool.models.hub import own_models

    if whole_folder(model).exists():
        return MorphableModel.load(model)
    if model not in own_models():  # "faces/" is a folder
        raise FileNotFoundError(
            f"Expected the folder of a model, or the name of one that comes with the package, one "
            f"of {', '.join(own_models())} (got {model})"
        )
    note(f"{model} is the model that comes with the package.")
    return MorphableModel.from_pretrained(model)


def read_meshes(
    data: Path, template: Any, unit: str, align: bool, features: Sequence[str] = ()
) -> RegisteredMeshes:
    from pyg_attnpool.datasets import RegisteredMeshes

    return RegisteredMeshes(data, template, unit, align=align, features=features)


def read_meshes_of(model: MorphableModel, data: Path) -> RegisteredMeshes:
    r"""Meshes of the model's template, in its unit and in the pose that it knows."""
    array = data.suffix.lower() in (".npz", ".npy")
    features = () if array else model.features  # an array has them in its order
    align = model.summary.get(ALIGNED, False)
    meshes = read_meshes(data, _template(model), model.unit, align, features)
    _look_at_size(model, data, meshes.vertices)
    return meshes


def _look_at_size(model: MorphableModel, path: Path, meshes: Tensor) -> None:
    size, own = (
        float((x.amax(dim=-2) - x.amin(dim=-2)).amax(dim=-1).median())
        for x in (meshes[..., :3], model.template)
    )
    if not own / 5 < size < 5 * own:
        note(
            f"What {path} holds is {size / own:.3g} times as large as the model: is its unit "
            f"{model.unit}?"
        )


def read_training_meshes(runs: Collection[Path]) -> MeshDataset:
    r"""The meshes that runs were trained on, which must be the same for all."""
    from pyg_attnpool.datasets import recorded_dataset
    from pyg_attnpool.datasets.recorded import RECORD

    paths = [run / RECORD for run in runs]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected --data, the test meshes (got none, and no {path} that names those of "
                f"the training)"
            )
    if any(path.read_bytes() != paths[0].read_bytes() for path in paths):
        raise ValueError("Expected --data, as the models were trained on different meshes")
    return recorded_dataset(paths[0].parent)


def read_shape(model: MorphableModel, path: Path) -> Tensor:
    r"""A mesh :obj:`[N, 3]` of the model's template in metres, in the pose that the model knows; or
    of a JSON file the latent code."""
    import torch

    from pyg_attnpool.datasets.align import align
    from pyg_attnpool.datasets.sources import MeshFiles

    if path.suffix.lower() == ".json":
        return _read_code(model, path)
    if model.in_channels > 3:
        raise ValueError(
            f"Expected a model of coordinates alone to take a mesh file (got one of "
            f"{model.in_channels} features a vertex): give codes, as files of JSON"
        )
    if not path.is_file():
        raise FileNotFoundError(f"Expected a mesh or a code in {path} (got no such file)")
    mesh = MeshFiles(
        path.parent, [path.name], _template(model), model.unit, same_surface=True
    ).read()
    _look_at_size(model, path, mesh)
    if model.summary.get(ALIGNED, False):
        with torch.no_grad():
            mean = model.decode(model.latent_mean.unsqueeze(0))[0]
        mesh = align(mesh, reference=mean).vertices
    return mesh[0].to(torch.float)


def _template(model: MorphableModel) -> tuple[Any, Any]:
    from pyg_attnpool.units import metres

    return model.template.double().numpy() / metres(model.unit), model.faces.numpy()


def _read_code(model: MorphableModel, path: Path) -> Tensor:
    import torch

    code = read_json(path)
    code = code.get("code") if isinstance(code, dict) else code
    size = None
    if isinstance(code, list) and all(type(value) in (int, float) for value in code):
        size = len(code)
    if size != model.latent_channels:
        got = "something else" if size is None else f"{size} numbers"
        raise ValueError(
            f"Expected a code of {model.latent_channels} numbers, or an entry 'code' that has them,"
            f" in {path} (got {got})"
        )
    return torch.tensor(code, dtype=torch.float)


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of JSON at {path} (got none)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"Expected a whole file of JSON in {path} (got: {e})") from e


def check_output(output: Path, suffixes: Collection[str] = (), folder: bool = False) -> None:
    r"""Refuses an output that a command would not know how to write, before anything is read: a
    file of another ending, and a new folder whose name ends as that of a file."""
    suffix = output.suffix.lower()
    if suffix in suffixes:
        fits = not output.is_dir()
    else:
        named = not suffix.strip(".0123456789")  # "noise0.5" has no ending of a file
        fits = folder and (output.is_dir() or (named and not output.is_file()))
    if not fits:
        files = [f"a file ending in {' or '.join(suffixes)}"] if suffixes else []
        known = " or ".join(["a folder"] * folder + files)
        raise ValueError(f"Expected {known} to write to (got {output})")


def as_json(value: Any) -> str:
    r"""Text of JSON, which has no NaN and no infinity: what has no value is null."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [known(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(value), indent=2, allow_nan=False)


def decimal(value: float) -> str:
    r"""A number to read, or a dash where it has no value."""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def write_meshes(model: MorphableModel, folder: Path, names: list[str], meshes: Tensor) -> None:
    r"""Writes meshes :obj:`[M, N, C]` to files of these names."""
    from pyg_attnpool.datasets.cache import progress

    for name, mesh in zip(progress(names, f"Writing {folder}"), meshes, strict=True):
        model.write_mesh(folder / name, mesh)


def note(line: str) -> None:
    r"""Says something beside the result, which standard output has alone."""
    print(line, file=sys.stderr)
