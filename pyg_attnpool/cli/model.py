r"""Commands on a model as a whole: train, evaluate, info, export."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pyg_attnpool.cli.shared import (
    ALIGNED,
    Model,
    Output,
    Unit,
    as_json,
    check_output,
    decimal,
    note,
    read_meshes,
    read_meshes_of,
    read_model,
)

RUN = ("model", "best.ckpt", "last.ckpt")  # what a run leaves in its folder
SHOWN = ("mean", "std", "median")
MEANINGS = {
    "generalisation": "mm from an unseen mesh to the closest that the model has",
    "specificity": "mm from a sample of the model to the closest real mesh",
    "compactness": "of the variance lies along the first direction",
    "diversity": "mm between two samples",
    "diversity of test meshes": "mm between two real meshes",
    "coverage": "of the real meshes are the closest to some sample",
    "nearest neighbor accuracy": "of samples and real meshes told apart; one half is best",
}


def train(
    data: Annotated[Positional[Path], arg(metavar="DATA")],
    *,
    output: Output,
    template: Path | None = None,
    unit: Unit = "m",
    align: bool = False,
    model: Literal["modal", "neural3dmm", "coma", "pca"] = "modal",
    latent: int = 8,
    steps: int = 5000,
    batch_size: int = 16,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains a morphable model of registered meshes, tests it on meshes that it has not seen and
    saves it.

    Example: pyg-attnpool train scans/ -o faces/ --unit mm

    Args:
        data: Folder of mesh files with the same vertices in the same order, or an .npz or .npy.
        output: Folder of the run: the model is output/model, and checkpoints lie beside it.
        template: Mesh file of the template; by default the first mesh.
        unit: Unit of the files.
        align: Turn and move every mesh onto the template first.
        model: modal (principal components, bent), neural3dmm (spiral convolutions), coma or pca.
        latent: Size of the latent code.
        steps: Training steps, rounded up to whole epochs.
        batch_size: Meshes per step.
        seed: Seed of the start and of the order of the meshes.
        device: What trains; by default the fastest that is there.
        resume: Go on where an earlier run into the same folder was cut off.
        overwrite: Replace an earlier run in the same folder.
    """
    import torch

    from pyg_attnpool import MorphableModel
    from pyg_attnpool.arguments import as_integer
    from pyg_attnpool.datasets import looks_unaligned, record_dataset
    from pyg_attnpool.datasets.sources import mesh_names
    from pyg_attnpool.training import epochs_for, quiet_lightning

    counts = {"--latent": latent, "--steps": steps, "--batch-size": batch_size}
    for name, number in counts.items():
        as_integer(name, number, least=1)
    as_integer("--seed", seed, least=0)
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(device, True):
        raise ValueError(f"Expected a --device that PyTorch finds here (got {device})")
    check_output(output, folder=True)
    if not (resume or overwrite) and any((output / name).exists() for name in RUN):
        raise FileExistsError(
            f"Expected a folder without a run (got {output}): go on with it by --resume, replace "
            f"it by --overwrite, or take another folder"
        )
    if model != "pca":
        quiet_lightning()
        import_module("pyg_attnpool.training.lightning")  # which says if it is missing
    if data.is_dir():  # too few files are refused before they are read
        _check_number(len(mesh_names(data)), model, latent)
    meshes = read_meshes(data, template, unit, align)
    _check_number(len(meshes), model, latent)
    split = meshes.split()
    print(
        f"{len(meshes)} meshes of {len(meshes.template[0]):,} vertices: {len(split.train)} for "
        f"training, {len(split.val)} to choose the best epoch, {len(split.test)} for the test"
    )
    if not align and looks_unaligned(meshes.vertices):
        print("The meshes differ mostly by how they are turned and placed: --align takes it away.")
    torch.manual_seed(seed)
    if model != "pca":
        note("Simplifying the template and finding the start: some seconds up to a minute.")
    fitted = getattr(MorphableModel, model)(meshes.template, latent, unit=unit)
    if model == "pca":
        fitted.fit(meshes[split.train])
    else:
        fitted.fit(
            meshes,
            output=output,
            epochs=epochs_for(steps, len(split.train), batch_size),
            batch_size=batch_size,
            seed=seed,
            resume=resume,
            freeze=True,
            accelerator=device,
        )
        fitted.cpu()
    errors = fitted.evaluate(meshes[split.test])
    fitted.summary["test error (mm)"] = {name: float(f"{errors[name]:.4g}") for name in SHOWN}
    fitted.summary[ALIGNED] = align
    fitted.save(output / "model")
    where = {"root": data, "template": template, "unit": unit, "align": align}
    record_dataset(output, "RegisteredMeshes", **where)
    print(_table({model: errors}))
    if model != "pca":
        linear = MorphableModel.pca(meshes.template, latent, unit).fit(meshes[split.train])
        print(_table({"PCA": linear.evaluate(meshes[split.test])}, header=False))
    print(f"The model is {output / 'model'}. Look at it: pyg-attnpool view {output}")
    print(f"How it learned, and where it errs: pyg-attnpool report {output}")


def evaluate(
    model: Model,
    data: Annotated[Positional[Path], arg(metavar="DATA")],
    *,
    train: Path | None = None,
    samples: int = 100,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Prints how far a model is from registered meshes that it has not seen, and what its own
    meshes are like: how close to real ones (specificity), how different from each other
    (diversity), how much few directions hold (compactness).

    Example: pyg-attnpool evaluate faces/ unseen/ --train scans/

    Args:
        data: Folder of mesh files, a single one, or an .npz or .npy file, in the unit of the
            model's files.
        train: Those that the model was trained on, which specificity and compactness are of; by
            default data.
        samples: Meshes that the model makes.
        seed: Seed of these.
        json: Print JSON.
    """
    import torch

    from pyg_attnpool.arguments import as_integer
    from pyg_attnpool.metrics import generation

    as_integer("--samples", samples, least=2)
    as_integer("--seed", seed, least=0)
    found = read_model(model)
    meshes = read_meshes_of(found, data)
    known = meshes if train is None else read_meshes_of(found, train)
    values: dict[str, Any] = found.evaluate(meshes)
    table = _table({Path(model).name: values})
    if len(meshes) > 1:
        note(f"Comparing {samples} meshes of the model with {len(meshes)}: up to a minute.")
        generator = torch.Generator().manual_seed(seed)
        values |= generation(found, known, meshes, samples, generator)
        table += "\n\n" + "\n".join(
            f"{name:26}{decimal(values[name]):>8}  {meaning}" for name, meaning in MEANINGS.items()
        )
    else:
        values |= dict.fromkeys(MEANINGS) | {"generalisation": values["mean"]}
        note("Two meshes or more tell what the model's own meshes are like; there is one.")
    print(as_json(values) if json else table)


def info(model: Model, *, json: bool = False) -> None:
    """Says what a model is and how it was trained.

    Example: pyg-attnpool info faces/

    Args:
        json: Print JSON.
    """
    found = read_model(model)
    known = {
        "network": type(found.autoencoder).__name__,
        "vertices": found.num_vertices,
        "features of a vertex": found.in_channels,
        "latent channels": found.latent_channels,
        "parameters": found.num_parameters,
        "unit of files": found.unit,
        **found.summary,
    }
    if json:
        print(as_json(known))
        return
    for name, value in known.items():
        print(f"{name:24} {value}")


def export(model: Model, file: Annotated[Positional[Path], arg(metavar="FILE")]) -> None:
    """Writes a model as one file that runs without this package.

    Example: pyg-attnpool export faces/ faces.onnx

    Args:
        file: The file: .html (a page with sliders), .onnx or .pt2.
    """
    check_output(file, (".html", ".onnx", ".pt2"))
    found = read_model(model)
    if file.suffix.lower() != ".html":
        note(f"Writing {file}: some seconds up to a minute.")
    difference = found.export(file)
    print(f"{file} gives what the model gives to {difference:.1e} of its largest coordinate")


def _check_number(meshes: int, model: str, latent: int) -> None:
    from pyg_attnpool.datasets import RegisteredMeshes
    from pyg_attnpool.datasets.splits import split_meshes

    most = len(split_meshes(RegisteredMeshes.default_split, meshes, {}).train) - 1
    if model in ("modal", "pca") and latent > most:
        raise ValueError(
            f"Expected --latent of at most {most}, fewer than the {most + 1} meshes for training "
            f"(got {latent})"
        )


def _table(rows: dict[str, dict[str, Any]], header: bool = True) -> str:
    lines = ["mm per vertex      mean     std  median   latent channels alive"] if header else []
    for name, row in rows.items():
        errors = "".join(f"{decimal(row[key]):>8}" for key in SHOWN)
        lines.append(f"{name:15}{errors}{row['alive']:8}")
    return "\n".join(lines)
