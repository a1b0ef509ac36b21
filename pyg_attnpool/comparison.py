r"""What the example scripts share: autoencoders of one kind with different poolings, trained on the
same meshes for the same steps from the same seed, and compared on meshes they have not seen
(extras :obj:`train` and :obj:`viz`)."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pyg_attnpool.datasets import AnnyFaces, RegisteredMeshes
from pyg_attnpool.export import freeze_attention
from pyg_attnpool.files import replacing
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models import PCA, MeshAutoencoder
from pyg_attnpool.training import evaluate, fit, quiet_lightning
from pyg_attnpool.visualize import plot_reconstructions

# The attention of the fast recipe. The first receptive fields are the nearest vertices, and their
# average is subtracted, so that a mapping starts as 3 P - 2 A and sharpens what convolutions and
# interpolation blur; both its signs, and gradients twice as large, are what keys learn from.
SHARPENING = dict(init="lifted", normalization="softmax", fusion_weight=-2.0)


@dataclass
class Options:
    data: Path | None = None
    """Folder of registered meshes (COMA's own subject/expression/*.ply among them), or an .npz or
    .npy file of vertices; by default faces made here, AnnyFaces."""
    template: Path | None = None
    """Mesh file of the template; needed for .npz and .npy, otherwise the first mesh."""
    scale: float = 1.0
    """What turns the unit of the data into metres: 0.001 for millimetres."""
    frames: int = 20
    """Frames of each of AnnyFaces' 144 sequences."""
    pool: tuple[Literal["qem", "attention", "full", "diffpool", "average", "variant"], ...] = (
        "qem",
        "attention",
    )
    """The poolings to train, one after another."""
    published: bool = False
    """The published variant: keys from positions, scores divided by their sum, w_a from 0.2, and
    CoMA's ReLU on the latent. By default keys are lifted to the sphere, scores go through a
    softmax, w_a starts from -2 and the latent is linear, for every pooling."""
    latent: int = 8
    """Latent channels."""
    wider: bool = False
    """The paper's wider setting."""
    recipe: Literal["fast", "paper"] = "fast"
    """Adam with a one-cycle learning rate, or the published recipe."""
    epochs: int | None = None
    """By default as many as 1,700 steps take with the fast recipe, or as published."""
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    output: Path | None = None
    """Folder for everything written; by default runs/ and the name of the script."""
    resume: bool = False
    """Go on where an earlier run into the same folder was cut off."""

    def attention(self, pool: str) -> dict[str, Any]:
        r"""The arguments of :class:`MeshAutoencoder` for the attention of the fast recipe."""
        if pool != "attention" or self.published:
            return {}
        return {"down_kwargs": SHARPENING, "up_kwargs": SHARPENING}


def compare(
    build: Callable[[MeshHierarchy, str], MeshAutoencoder],
    options: Options,
    name: str,
    recipe: str,
    epochs: int,
):
    r"""Trains a model per pooling, writes checkpoints, frozen models, a table and a picture to
    :obj:`options.output`, and prints the table.

    Args:
        build (callable): Makes the model of a hierarchy and a pooling.
        options (Options): What to do.
        name (str): The name of the folder of runs.
        recipe (str): The published recipe of this kind of model.
        epochs (int): The published number of epochs.
    """
    quiet_lightning()

    output = Path("runs") / name if options.output is None else options.output
    if options.data is None:
        dataset = AnnyFaces(Path("data") / "AnnyFaces", frames=options.frames)
    else:
        dataset = RegisteredMeshes(options.data, options.template, options.scale)
    split = dataset.split("interpolation")
    train, val, test = (dataset.vertices[index] for index in split)
    print(f"{dataset}: {len(train)} training, {len(val)} validation and {len(test)} test meshes")

    hierarchy = MeshHierarchy.from_template(dataset.template)
    hierarchy.save(output / "hierarchy.npz")
    print(hierarchy)

    if options.recipe == "fast":
        recipe, epochs = "fast", -(-1700 * options.batch_size // len(train))
    shown = test[torch.linspace(0, len(test) - 1, min(5, len(test))).long()]
    rows, pictures = [], {}
    for pool in options.pool:
        torch.manual_seed(options.seed)
        model = build(hierarchy, pool)
        trained = sum(p.numel() for p in model.parameters())
        model = fit(
            model,
            hierarchy,
            train,
            val,
            output=output / pool,
            recipe=recipe,
            epochs=options.epochs or epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            device=options.device,
            resume=options.resume,
        )
        # From here on attention is a fixed mapping, and the model as small as its QEM twin.
        model = freeze_attention(model).cpu()
        with replacing(output / pool / "frozen.pt") as path:
            torch.save(model.state_dict(), path)
        sizes = {"trained": trained, "shipped": sum(p.numel() for p in model.parameters())}
        rows.append({"model": pool, **sizes, **evaluate(model, test)})
        with torch.no_grad():
            pictures[pool] = model(shown)

    pca = PCA(train, options.latent)
    numbers = pca.mean.numel() + pca.components.numel()
    sizes = {"trained": numbers, "shipped": numbers}
    rows.append({"model": "pca", **sizes, **evaluate(pca, test)})

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
    print(f"Checkpoints, frozen models, results.csv and errors.png are in {output}")
