r"""How many rows of the attention layers' score matrices a real training run searches: those whose
largest cosines the candidates of earlier steps do not prove."""

from pathlib import Path

import torch

from benchmarks import report
from benchmarks.speed import measure
from pyg_attnpool import MeshHierarchy
from pyg_attnpool.datasets import AnnyFaces
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.training import quiet_lightning

# The paper's layer and optimizer, and the ones that start better. Variant and optimizer.
RUNS = (("published", "sgd"), ("default", "one_cycle"))
NOTES = (
    "Percent of the rows of all steps, the first step's among them, which are all searched.",
    "Layers are named by the vertices that they map from and to.",
)


def main(
    epochs: int = 12,
    frames: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    output: Path = measure.RESULTS,
):
    r"""Trains CoMA with attention on AnnyFaces and prints the share of rows searched.

    Args:
        epochs: Epochs of each run.
        frames: Frames of each sequence.
        batch_size: Meshes per step.
        seed: Of parameters and the order of the meshes.
        output: Folder of the results.
    """
    quiet_lightning()
    dataset = AnnyFaces(Path("data") / "AnnyFaces", frames=frames)
    train, val, _ = (dataset.vertices[index] for index in dataset.split("interpolation"))
    hierarchy = MeshHierarchy.from_template(dataset.template)
    rows = []
    for variant, optimizer in RUNS:
        torch.manual_seed(seed)
        model = MorphableModel.coma(hierarchy, variant=variant)
        options = dict(optimizer=optimizer, epochs=epochs, batch_size=batch_size, seed=seed)
        model.fit(train, val, accelerator="cpu", **options)
        layers = [*model.autoencoder.pools, *model.autoencoder.unpools]
        share = {f"{p.num_source} > {p.num_target}": 100 * p.search.share for p in layers}
        searched, asked = sum(p.search.searched for p in layers).tolist()
        row = {"variant": variant, "optimizer": optimizer, "all": 100 * searched / asked}
        rows.append(row | share)
    about = report.machine("cpu") | {
        "steps": epochs * -(-len(train) // batch_size),
        "levels": " ".join(map(str, hierarchy.num_vertices)),
        "batch": batch_size,
        "seed": seed,
    }
    tables = {"Rows searched, percent": rows}
    print(report.write(output, "reuse", report.command(), rows, tables, about, NOTES))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
