r"""Trains the models that come with the package, of faces, bodies and hands made here:
``python -m benchmarks.pretrained``. A call goes on where an earlier one was cut off."""

from pathlib import Path

import torch
import tyro

from benchmarks.peers.data import load
from pyg_attnpool import MorphableModel
from pyg_attnpool.models.hub import OWN
from pyg_attnpool.training import epochs_for, quiet_lightning

LICENSE = "cc0-1.0"  # as the data of MakeHuman that Anny makes the meshes of
SHOWN = ("mean", "std", "median")


def main(
    data: tuple[str, ...] = ("faces", "bodies", "hands"),
    latent: tuple[int, ...] = (8, 32),
    steps: int = 1700,
    hidden_channels: int = 256,
    seed: int = 0,
    root: Path = Path("data"),
    runs: Path = Path("runs/pretrained"),
    output: Path = OWN,
):
    r"""Trains and tests the models, and writes them with what they were made of.

    Args:
        data: Sets, as in benchmarks.peers.
        latent: Latent sizes.
        steps: Training steps, rounded up to whole epochs.
        hidden_channels: Of the perceptrons: half as many as usual, for small files.
        seed: Of weights and of the order of the meshes.
        root: Folder of the sets.
        runs: Folder of what a run needs to go on.
        output: Folder of the models.
    """
    quiet_lightning()
    for kind in data:
        hierarchy, (train, val, test), _ = load(kind, root)
        for size in latent:
            name = kind if size == 8 else f"{kind}-{size}"
            torch.manual_seed(seed)
            model = MorphableModel.modal(hierarchy, size, hidden_channels=hidden_channels).fit(
                train,
                val,
                output=runs / name,
                epochs=epochs_for(steps, len(train)),
                seed=seed,
                resume=True,
                freeze=True,
                accelerator="cpu",
            )
            linear = MorphableModel.pca(hierarchy, size).fit(train).evaluate(test)
            model.save(runs / name / "model", compact=True)
            found = MorphableModel.load(runs / name / "model").evaluate(test)
            tested = {
                "test error (mm)": {key: float(f"{found[key]:.4g}") for key in SHOWN},
                "test error of PCA (mm)": {key: float(f"{linear[key]:.4g}") for key in SHOWN},
            }
            model.summary |= {
                "data": f"Anny{kind.capitalize()}, made by this package; {len(test)} test meshes",
                "license": LICENSE,
                "made by": f"python -m benchmarks.pretrained --data {kind} --latent {size}",
                **tested,
            }
            model.save(output / name, compact=True)
            print(name, tested)


if __name__ == "__main__":
    tyro.cli(main)
