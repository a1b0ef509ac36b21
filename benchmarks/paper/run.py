r"""One training: its settings, how it is done, and what it measures."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.paper.data import Meshes
from benchmarks.report import machine
from pyg_attnpool import MorphableModel
from pyg_attnpool.metrics import error_quantiles

BATCH_SIZE = 16

# What decides the result of a run; a sweep goes on with runs that differ in nothing but the seed.
SETTINGS = (
    *("data", "scale", "variant", "split", "model", "optimizer"),
    *("epochs", "batch_size", "meshes", "template"),
)
# Errors are in millimetres; "quantiles" are the percentiles of the error from 0 to 100.
MEASURED = (
    *("steps", "mean", "std", "median", "quantiles", "alive", "trained", "shipped"),
    *("seconds", "device", "versions"),
)


class Family(NamedTuple):
    r"""Models that differ in their arguments."""

    make: Callable[..., MorphableModel]
    optimizer: str
    r"""The published one, as :func:`~pyg_attnpool.training.fit` knows it."""
    epochs: int
    r"""The published number; 0 where nothing is trained step by step."""


FAMILIES = {
    "coma": Family(MorphableModel.coma, "sgd", 300),
    "neural3dmm": Family(MorphableModel.neural3dmm, "adam", 200),
    "pca": Family(MorphableModel.pca, "", 0),
}


@dataclass(frozen=True)
class Run:
    r"""One training: its settings, as they stand in the file of results."""

    settings: tuple[str, ...]
    seed: int

    @property
    def key(self) -> str:
        r"""The same for the same settings and seed, on any machine."""
        text = json.dumps([*self.settings, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getitem__(self, name: str) -> str:
        return self.settings[SETTINGS.index(name)]

    def model(self, meshes: Meshes) -> MorphableModel:
        r"""The model as it starts."""
        arguments = json.loads(self["model"])
        family = FAMILIES[arguments.pop("family")]
        fixed = arguments.pop("fixed", False)
        if family.epochs:
            arguments["variant"] = self["variant"]
        torch.manual_seed(self.seed)
        model = family.make(meshes.hierarchy, **arguments)
        return model.freeze() if fixed else model


def fitted(
    run: Run,
    model: MorphableModel,
    parts: Sequence[Any],
    folder: Path | None,
    device: str,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
) -> MorphableModel:
    r"""Trains the model of a run. Attention is a fixed mapping then, and the model as small as its
    QEM twin.

    Args:
        run (Run): The settings.
        model (MorphableModel): The model as it starts.
        parts (list): Training and validation meshes, and others.
        folder (Path, optional): Where it keeps what it needs to go on.
        device (str): cpu or cuda.
        resume (bool, optional): If set to :obj:`True`, it goes on where it was cut off.
            (default: :obj:`False`)
        callbacks (list, optional): Callbacks of Lightning. (default: :obj:`()`)
    """
    train, val, *_ = parts
    epochs = int(run["epochs"])
    if epochs == 0:
        return model.fit(train)
    return model.fit(
        train,
        val,
        output=folder,
        optimizer=run["optimizer"],
        epochs=epochs,
        batch_size=BATCH_SIZE,
        seed=run.seed,
        accelerator=device,
        resume=resume,
        callbacks=callbacks,
        freeze=True,
    )


def train(run: Run, meshes: Meshes, folder: Path, device: str, resume: bool) -> dict[str, Any]:
    r"""Trains a model and tests it.

    Args:
        run (Run): The settings.
        meshes (Meshes): Its data set.
        folder (Path): Where it keeps what it needs to go on.
        device (str): cpu or cuda.
        resume (bool): If set to :obj:`True`, it goes on where it was cut off.

    Returns:
        The values of :obj:`MEASURED`.
    """
    start = time.perf_counter()
    parts = meshes.split(**json.loads(run["split"]))
    train, _, test = parts
    model = run.model(meshes)
    trained = model.num_parameters
    epochs = int(run["epochs"])
    fitted(run, model, parts, folder, device, resume)
    model.to(device)
    quantiles = error_quantiles(model, test, np.linspace(0, 1, 101).tolist())
    about = machine(device)
    versions = ("python", "torch", "torch_geometric")
    return {
        "steps": epochs * -(-len(train) // BATCH_SIZE),
        **model.evaluate(test),
        "quantiles": json.dumps([float(f"{q:.4g}") for q in quantiles]),
        "trained": trained,
        "shipped": model.num_parameters,
        "seconds": float(f"{time.perf_counter() - start:.3g}"),
        "device": about.get("gpu", about["processor"]),
        "versions": ", ".join(f"{name} {about[name]}" for name in versions),
    }
