r"""What peers cost: the time until the first training step, which is the fit of components, of a
step, of decoding a mesh, and the size on disk:

    python -m benchmarks.peers.costs --data faces hands --latent 8 32

Times are the shortest of several on one thread, since others may use the machine meanwhile. Every
peer is a line of :obj:`costs.csv` in the folder of results; a call measures what is not there."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.peers.data import SETS, load
from benchmarks.peers.registry import PEERS, linear_peer, train_peer
from benchmarks.peers.rows import append_row, read_rows
from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.training import quiet_lightning

STEPS = 20

KEYS = ("data", "latent", "peer")
MEASURED = ("start_s", "step_ms", "decode_ms", "disk_mb")
COLUMNS = (*KEYS, *MEASURED)


class _Watch(pl.Callback):
    def __init__(self) -> None:
        self.first: float | None = None
        self.steps: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.start = time.perf_counter()
        self.first = self.start if self.first is None else self.first

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.steps.append(time.perf_counter() - self.start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.costs", description=__doc__)
    add = parser.add_argument
    add("--data", nargs="+", choices=SETS, default=["faces"])
    add("--latent", nargs="+", type=int, default=[8])
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--root", type=Path, default=Path("data"), help="folder of the data sets")
    add("--output", type=Path, default=Path("runs/peers"))
    options = parser.parse_args(arguments)
    quiet_lightning()
    torch.set_num_threads(1)
    path = options.output / "costs.csv"
    done = {tuple(row[name] for name in KEYS) for row in read_rows(path, COLUMNS)}
    for data in options.data:
        meshes = load(data, options.root)
        for latent, name in product(options.latent, options.peers):
            key = (data, str(latent), name)
            found = None if key in done else _measured(name, latent, *meshes)
            if found is not None:
                row = (*key, *(f"{value:.4g}" for value in found))
                append_row(path, COLUMNS, dict(zip(COLUMNS, row, strict=True)))
                print(", ".join(row), flush=True)


def _measured(
    name: str,
    latent: int,
    hierarchy: MeshHierarchy,
    parts: tuple[Tensor, Tensor, Tensor],
    subjects: list[str] | None,
) -> tuple[float, ...] | None:
    train, val, _ = parts
    watch, start = _Watch(), time.perf_counter()
    model: MorphableModel | None
    if PEERS[name].trained:
        few = dict(callbacks=[watch], limit_train_batches=STEPS)
        model = train_peer(PEERS[name], hierarchy, latent, train, val[:16], 1, 1e-4, 0, **few)
    else:
        model = linear_peer(name, hierarchy, latent, train, val, subjects)
    if model is None:
        return None
    first = time.perf_counter() if watch.first is None else watch.first
    step_ms = 1000 * min(watch.steps, default=0.0)
    return first - start, step_ms, _decode_ms(model), _disk_mb(model)


def read_costs(path: Path) -> dict[tuple[str, ...], dict[str, float]]:
    r"""What has been measured, by set, latent size and peer."""
    return {
        tuple(row[name] for name in KEYS): {name: float(row[name]) for name in MEASURED}
        for row in read_rows(path, COLUMNS)
    }


def seconds_of(cost: dict[str, float], steps: int) -> float:
    r"""The time of a training."""
    return cost["start_s"] + steps * cost["step_ms"] / 1000


def as_long_as(
    costs: dict[tuple[str, ...], dict[str, float]],
    data: str,
    latent: str,
    other: str,
    name: str,
    steps: int,
) -> int:
    r"""The steps of a peer that take as long as those of another one.

    Raises:
        ValueError: If the costs of one of them have not been measured.
    """
    if missing := [n for n in (name, other) if (data, latent, n) not in costs]:
        raise ValueError(
            f"Expected costs of {missing} on {data} at latent size {latent}: run "
            f"`python -m benchmarks.peers.costs` first"
        )
    if name == other:
        return steps
    cost = costs[data, latent, name]
    left = seconds_of(costs[data, latent, other], steps) - cost["start_s"]
    return max(1, round(1000 * left / cost["step_ms"]))


def _decode_ms(model: MorphableModel, repeats: int = 30) -> float:
    model.freeze().eval()
    z, times = model.latent_mean.unsqueeze(0), []
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            model.decode(z)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _disk_mb(model: MorphableModel) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6


if __name__ == "__main__":
    main()
