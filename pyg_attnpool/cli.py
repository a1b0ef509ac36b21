r"""The command line :obj:`pyg-attnpool` (extra :obj:`cli`): from a folder of registered meshes to a
morphable model, and what one does with it. Every command imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import tyro
    from tyro.conf import Positional, arg
except ImportError as e:
    raise ImportError(
        "The command line requires 'tyro': install it with `pip install \"pyg_attnpool[cli]\"`"
    ) from e

if TYPE_CHECKING:
    from pyg_attnpool import MorphableModel
    from pyg_attnpool.datasets import RegisteredMeshes

app = tyro.extras.SubcommandApp()

Unit = Literal["m", "cm", "mm"]
Output = Annotated[Path, arg(aliases=["-o"])]


@app.command
def train(
    data: Positional[Path],
    *,
    output: Output,
    template: Path | None = None,
    unit: Unit = "m",
    align: bool = False,
    model: Literal["neural3dmm", "modal", "coma", "pca"] = "neural3dmm",
    latent: int = 8,
    steps: int = 5000,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
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
        model: neural3dmm (spiral convolutions), modal (bent principal components), coma or pca.
        latent: Size of the latent code.
        steps: Training steps, rounded up to whole epochs.
        batch_size: Meshes per step.
        seed: Seed of the start and of the order of the meshes.
        device: cpu, cuda, or whichever is there.
        resume: Go on where an earlier run into the same folder was cut off.
    """
    import torch

    from pyg_attnpool import MorphableModel
    from pyg_attnpool.datasets import looks_unaligned

    if steps < 1 or batch_size < 1:
        raise ValueError(f"Expected positive steps and batch size (got {steps} and {batch_size})")
    meshes = _read(data, template, unit, align)
    split = meshes.split()
    print(
        f"{len(meshes)} meshes of {len(meshes.template[0]):,} vertices: {len(split.train)} for "
        f"training, {len(split.val)} to choose the best epoch, {len(split.test)} for the test"
    )
    if not align and looks_unaligned(meshes.vertices):
        print("The meshes differ mostly by how they are turned and placed: --align takes it away.")
    torch.manual_seed(seed)
    make = getattr(MorphableModel, model)
    fitted = make(meshes.template, latent, unit=unit)
    if model == "pca":
        fitted.fit(meshes[split.train])
    else:
        from pyg_attnpool.training import quiet_lightning

        quiet_lightning()
        fitted.fit(
            meshes,
            output=output,
            epochs=-(-steps // -(-len(split.train) // batch_size)),
            batch_size=batch_size,
            seed=seed,
            resume=resume,
            freeze=True,
            accelerator=device,
        )
        fitted.cpu()
    errors = fitted.evaluate(meshes[split.test])
    fitted.summary["test error (mm)"] = {name: float(f"{errors[name]:.4g}") for name in SHOWN}
    fitted.save(output / "model")
    print(_table({model: errors}))
    if model != "pca":
        linear = MorphableModel.pca(meshes.template, latent, unit).fit(meshes[split.train])
        print(_table({"PCA": linear.evaluate(meshes[split.test])}, header=False))
    print(f"The model is {output / 'model'}")


@app.command
def evaluate(
    model: Positional[Path],
    data: Positional[Path],
    *,
    align: bool = False,
    json: bool = False,
) -> None:
    """Prints the error of a model on registered meshes, in millimetres.

    Example: pyg-attnpool evaluate faces/ unseen/

    Args:
        model: Folder of a model or of its run.
        data: Folder of mesh files, or an .npz or .npy file, in the unit of the model's files.
        align: Turn and move every mesh onto the template first.
        json: Print JSON.
    """
    found = _load(model)
    template = found.template.numpy(), found.faces.numpy()
    meshes = _read(data, template, found.unit, align)
    errors = found.evaluate(meshes)
    print(_json(errors) if json else _table({model.name: errors}))


@app.command
def info(model: Positional[Path], *, json: bool = False) -> None:
    """Says what a model is and how it was trained.

    Example: pyg-attnpool info faces/

    Args:
        model: Folder of a model or of its run.
        json: Print JSON.
    """
    found = _load(model)
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
        print(_json(known))
        return
    for name, value in known.items():
        print(f"{name:24} {value}")


@app.command
def export(model: Positional[Path], file: Positional[Path]) -> None:
    """Writes a model as one file that runs without this package.

    Example: pyg-attnpool export faces/ faces.onnx

    Args:
        model: Folder of a model or of its run.
        file: The file: .html (a page with sliders), .onnx or .pt2.
    """
    difference = _load(model).export(file)
    print(f"{file} gives what the model gives to {difference:.1e} of its largest coordinate")


@app.command
def repair(
    meshes: Positional[Path],
    *,
    output: Output,
    merge: float = 0.0,
    stitch: bool = True,
) -> None:
    """Makes a manifold of any triangles, as templates need it. No vertex moves. The meshes of a
    folder are repaired all alike, so that they stay registered.

    Example: pyg-attnpool repair scans/ -o whole/

    Args:
        meshes: Mesh file, or folder of mesh files with the same vertices in the same order.
        output: Mesh file or folder to write; beside the meshes of a folder index.npy, which has the
            vertex before that each vertex is.
        merge: Distance up to which the ends of edges at a seam are one vertex, in the unit of the
            files.
        stitch: Stitch seams at all.
    """
    from pyg_attnpool.datasets import repair_files

    mesh, count = repair_files(meshes, output, merge if stitch else None)
    for what, number in mesh.changes.items():
        print(f"{number:8,} {what}")
    print(
        f"{count} {'files' if count > 1 else 'file'} of {mesh.num_source:,} vertices, now "
        f"{len(mesh.vertices):,}, in {output}"
    )


# What commands share ##############################################################

SHOWN = ("mean", "std", "median")


def _read(data: Path, template: Any, unit: str, align: bool) -> RegisteredMeshes:
    from pyg_attnpool.datasets import RegisteredMeshes

    if unit != "m" and isinstance(template, tuple):  # of a model, in metres
        from pyg_attnpool.units import metres

        template = template[0] / metres(unit), template[1]
    return RegisteredMeshes(data, template, unit, align=align)


def _load(folder: Path) -> MorphableModel:
    from pyg_attnpool import MorphableModel

    inner = folder / "model"
    return MorphableModel.load(inner if (inner / "config.json").exists() else folder)


def _table(rows: dict[str, dict[str, Any]], header: bool = True) -> str:
    lines = ["mm per vertex      mean     std  median   latent channels alive"] if header else []
    for name, row in rows.items():
        errors = "".join(f"{row[key]:8.3f}" for key in SHOWN)
        lines.append(f"{name:15}{errors}{row['alive']:8}")
    return "\n".join(lines)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Runs a command. A mistake of the caller is one line and exit code 1, one in the arguments
    themselves exit code 2.

    Args:
        arguments (list, optional): By default those of the process. (default: :obj:`None`)

    Returns:
        The exit code.
    """
    try:
        app.cli(
            prog="pyg-attnpool",
            description="Morphable models of registered meshes: train, test, send.",
            args=arguments,
        )
    except (ImportError, OSError, TypeError, ValueError) as e:
        print(f"pyg-attnpool: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "pyg-attnpool: stopped; every file is whole. train --resume goes on.", file=sys.stderr
        )
        return 130
    return 0


def entry() -> None:
    r"""The process's own entry point."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
