r"""CoMA, the spectral mesh autoencoder, with quadric (QEM) pooling and with learned aggregation:
the same size, the same steps, the same seed.

Reported by "Learning Feature Aggregation for Deep 3D Morphable Models" (CVPR 2021, table 2) on the
COMA faces, 8 latent channels, 300 epochs, interpolation split, mean error per vertex:

    QEM 0.939 mm    learned 0.519 mm        wider: QEM 0.682 mm    learned 0.441 mm

REPRODUCED
"""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from pyg_attnpool import freeze_attention
from pyg_attnpool.datasets import AnnyFaces, RegisteredMeshes
from pyg_attnpool.files import replacing
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models import PCA, coma
from pyg_attnpool.training import evaluate, fit
from pyg_attnpool.visualize import plot_reconstructions


@dataclass
class Args:
    """Train CoMA with QEM pooling and with learned aggregation, and compare them."""

    data: Path | None = None
    """Folder of registered meshes (COMA's own subject/expression/*.ply among them), or an .npz or
    .npy file of vertices; by default faces made here, AnnyFaces."""
    template: Path | None = None
    """Mesh file of the template; needed for .npz and .npy, otherwise the first mesh."""
    scale: float = 1.0
    """What turns the unit of the data into metres: 0.001 for millimetres."""
    frames: int = 20
    """Frames of each of AnnyFaces' 144 sequences."""
    pool: tuple[Literal["qem", "attention"], ...] = ("qem", "attention")
    """The poolings to train, one after another."""
    published: bool = False
    """The published variant: keys from positions, scores divided by their sum, w_a from 0.2, a
    ReLU on the latent. By default keys are lifted to the sphere, scores go through a softmax, w_a
    starts from 0 and the latent is linear, for both poolings."""
    latent: int = 8
    """Latent channels."""
    wider: bool = False
    """The paper's wider setting."""
    recipe: Literal["fast", "paper"] = "fast"
    """Adam with a one-cycle learning rate, or the paper's SGD."""
    epochs: int | None = None
    """By default as many as 1,700 steps take with the fast recipe, 300 with the paper's."""
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    output: Path = Path("runs/coma")
    resume: bool = False
    """Go on where an earlier run into the same folder was cut off."""


LIFTED = dict(init="lifted", normalization="softmax", fusion_weight=0.0)


def main(args: Args):
    # Which devices there are and what else Lightning sells is not what this run is about.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    if args.data is None:
        root = Path(__file__).resolve().parents[1] / "data" / "AnnyFaces"
        dataset = AnnyFaces(root, frames=args.frames)
    else:
        dataset = RegisteredMeshes(args.data, template=args.template, scale=args.scale)
    split = dataset.split("interpolation")
    train, val, test = (dataset.vertices[index] for index in split)
    print(f"{dataset}: {len(train)} training, {len(val)} validation and {len(test)} test meshes")

    hierarchy = MeshHierarchy.from_template(dataset.template)
    hierarchy.save(args.output / "hierarchy.npz")
    print(hierarchy)

    epochs = args.epochs
    if epochs is None:
        epochs = 300 if args.recipe == "paper" else -(-1700 * args.batch_size // len(train))

    shown = test[torch.linspace(0, len(test) - 1, min(5, len(test))).long()]
    rows, pictures = [], {}
    for pool in args.pool:
        options = {}
        if pool == "attention" and not args.published:
            options = dict(down_kwargs=LIFTED, up_kwargs=LIFTED)
        torch.manual_seed(args.seed)
        model = coma(
            hierarchy,
            pool,
            args.latent,
            args.wider,
            latent_activation="relu" if args.published else None,
            **options,
        )
        trained = sum(p.numel() for p in model.parameters())
        model = fit(
            model,
            hierarchy,
            train,
            val,
            output=args.output / pool,
            recipe=args.recipe,
            epochs=epochs,
            batch_size=args.batch_size,
            seed=args.seed,
            device=args.device,
            resume=args.resume,
        )
        # From here on attention is a fixed mapping, and the model as small as its QEM twin.
        model = freeze_attention(model).cpu()
        with replacing(args.output / pool / "frozen.pt") as path:
            torch.save(model.state_dict(), path)
        shipped = sum(p.numel() for p in model.parameters())
        rows.append(
            {"model": pool, "trained": trained, "shipped": shipped, **evaluate(model, test)}
        )
        with torch.no_grad():
            pictures[pool] = model(shown)

    pca = PCA(train, args.latent)
    numbers = pca.mean.numel() + pca.components.numel()
    sizes = {"trained": numbers, "shipped": numbers}
    rows.append({"model": "pca", **sizes, **evaluate(pca, test)})

    print_table(rows)
    with replacing(args.output / "results.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot_reconstructions(args.output / "errors.png", hierarchy.faces[0], shown, pictures)
    print(f"Checkpoints, frozen models, results.csv and errors.png are in {args.output}")


def print_table(rows: list[dict]):
    print("\nError per vertex on unseen meshes in mm, parameters, latent channels that vary:\n")
    print("model          mean     std  median   trained   shipped  alive")
    for row in rows:
        print(
            f"{row['model']:10} {row['mean']:8.3f}{row['std']:8.3f}{row['median']:8.3f}"
            f"{row['trained']:10,}{row['shipped']:10,}{row['alive']:7}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
