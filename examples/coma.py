r"""CoMA, the spectral mesh autoencoder, with quadric (QEM) pooling and with learned aggregation:
the same size, the same steps, the same seed.

Reported by "Learning Feature Aggregation for Deep 3D Morphable Models" (CVPR 2021, table 2) on the
COMA faces, 8 latent channels, 300 epochs, interpolation split, mean error per vertex:

    QEM 0.939 mm    learned 0.519 mm        wider: QEM 0.682 mm    learned 0.441 mm

Reproduced on AnnyFaces (4,538 vertices, 2,271 training and 319 test meshes; at 20 frames a
sequence the test part is whole sequences that training never sees), 12 epochs of one cycle, two
threads on an Intel Xeon, seed 0, all 8 latent channels alive:

    QEM 1.667 mm    learned 1.315 mm    PCA 1.600 mm
"""

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tyro

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import AnnyFaces, RegisteredMeshes, looks_unaligned, record_dataset
from pyg_attnpool.files import replacing
from pyg_attnpool.training import epochs_for, quiet_lightning
from pyg_attnpool.visualize import plot_reconstructions, write_report

Pooling = Literal["qem", "attention", "full", "diffpool", "average", "variant"]


@dataclass
class Options:
    data: Path | None = None
    """Folder of registered meshes (COMA's own subject/expression/*.ply among them), or an .npz or
    .npy file of vertices; by default faces made here, AnnyFaces."""
    template: Path | None = None
    """Mesh file of the template; needed for .npz and .npy, otherwise the first mesh."""
    unit: Literal["m", "cm", "mm"] = "m"
    """Unit of the data."""
    align: bool = False
    """Turn and move every mesh onto the template first, by Procrustes analysis."""
    frames: int = 20
    """Frames of each of AnnyFaces' 144 sequences."""
    pool: tuple[Pooling, ...] = ("qem", "attention")
    """The poolings to train, one after another."""
    variant: Literal["default", "published"] = "default"
    """published: keys from positions, scores divided by their sum, w_a from 0.2, and CoMA's ReLU on
    the latent. default: the start that wins, and a linear latent, for every pooling."""
    latent: int = 8
    """Latent channels."""
    wider: bool = False
    """The paper's wider setting."""
    optimizer: Literal["one_cycle", "sgd", "adam"] = "one_cycle"
    """Adam with a one-cycle learning rate; or as published, sgd for CoMA and adam for
    Neural3DMM."""
    epochs: int | None = None
    """By default as many as 1,700 steps take with one_cycle, else 300."""
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    output: Path | None = None
    """Folder for everything written; by default runs/ and the name of the script."""
    resume: bool = False
    """Go on where an earlier run into the same folder was cut off."""


def compare(build: Callable[[MeshHierarchy, str], MorphableModel], options: Options, name: str):
    r"""Trains a model per pooling and writes models, a table, a picture and a report."""
    quiet_lightning()
    output = Path("runs") / name if options.output is None else options.output
    if options.data is None:
        known = {"root": Path("data") / "AnnyFaces", "frames": options.frames}
        dataset = AnnyFaces(**known)
    else:
        known = {"root": options.data, "template": options.template}
        known |= {"unit": options.unit, "align": options.align}
        dataset = RegisteredMeshes(**known)
    split = dataset.split("interpolation")
    train, val, test = (dataset.vertices[part] for part in split)
    print(f"{dataset}: {len(train)} training, {len(val)} validation and {len(test)} test meshes")
    if looks_unaligned(train):
        print("The meshes differ mostly by rigid motion: --align takes it away.")
    hierarchy = MeshHierarchy.from_template(dataset.template)
    print(hierarchy)

    epochs = options.epochs
    if epochs is None:
        short = options.optimizer == "one_cycle"
        epochs = epochs_for(1700, len(train), options.batch_size) if short else 300
    shown = test[torch.linspace(0, len(test) - 1, min(5, len(test))).long()]
    rows, pictures, models = [], {}, {}
    for pool in (*options.pool, "pca"):
        torch.manual_seed(options.seed)
        if pool == "pca":
            model = MorphableModel.pca(hierarchy, options.latent, options.unit)
        else:
            model = build(hierarchy, pool)
        trained = model.num_parameters
        model.fit(
            train,
            val,
            output=output / pool,
            epochs=epochs,
            batch_size=options.batch_size,
            optimizer=options.optimizer,
            seed=options.seed,
            resume=options.resume,
            accelerator=options.device,
            freeze=True,  # attention becomes a fixed mapping, the model as small as its QEM twin
        ).cpu()
        model.save(output / pool / "model")
        record_dataset(output / pool, type(dataset).__name__, **known)  # for `pyg-attnpool report`
        sizes = {"trained": trained, "shipped": model.num_parameters}
        rows.append({"model": pool, **sizes, **model.evaluate(test)})
        with torch.no_grad():
            pictures[pool] = model(shown)
        models[pool] = model

    print("\nError per vertex on unseen meshes in mm, parameters, latent channels that vary:\n")
    print("model          mean     std  median     trained     shipped  alive")
    for row in rows:
        print(
            f"{row['model']:10} {row['mean']:8.3f}{row['std']:8.3f}{row['median']:8.3f}"
            f"{row['trained']:12,}{row['shipped']:12,}{row['alive']:7}"
        )
    with replacing(output / "results.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot_reconstructions(output / "errors.png", hierarchy.faces[0], shown, pictures)
    folders = {pool: output / pool for pool in models}
    write_report(output / "report.html", models, dataset[split.test], folders)
    print(f"Models, checkpoints, results.csv and errors.png are in {output}")
    print(f"open {output / 'report.html'}")


def main(options: Options):
    def build(hierarchy: MeshHierarchy, pool: str) -> MorphableModel:
        return MorphableModel.coma(
            hierarchy,
            options.latent,
            pool,
            options.unit,
            wider=options.wider,
            variant=options.variant,
        )

    compare(build, options, "coma")


if __name__ == "__main__":
    main(tyro.cli(Options, description="CoMA with QEM pooling and with learned aggregation."))
