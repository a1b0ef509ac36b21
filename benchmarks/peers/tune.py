r"""The rate of every peer that is trained, for each set and latent size, from one grid and by the
error on validation meshes:

    python -m benchmarks.peers.tune --data faces hands --latent 8 32

Its seeds are never those of the table. Every run is a line of :obj:`rates.csv` in the folder of
results; a call goes on where the last one ended."""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.data import SETS, load, measured_on
from benchmarks.peers.registry import PEERS, steps_of, train_peer
from benchmarks.peers.rows import append_row, read_rows
from pyg_attnpool.training import quiet_lightning

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (100, 101)  # never those of the table

KEYS = ("data", "latent", "peer", "steps", "seed", "lr")
COLUMNS = (*KEYS, "val")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.tune", description=__doc__)
    add = parser.add_argument
    add("--data", nargs="+", choices=SETS, default=["faces"])
    add("--latent", nargs="+", type=int, default=[8])
    add("--steps", type=int, default=425, help="at least so many, in whole epochs")
    add("--seeds", nargs="+", type=int, default=SEEDS[:1], choices=SEEDS)
    add("--rates", nargs="+", type=float, default=GRID, choices=GRID, help="a part of the grid")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--root", type=Path, default=Path("data"), help="folder of the data sets")
    add("--output", type=Path, default=Path("runs/peers"))
    options = parser.parse_args(arguments)
    quiet_lightning()
    path = options.output / "rates.csv"
    done = {tuple(row[name] for name in KEYS) for row in read_rows(path, COLUMNS)}
    for data in options.data:
        hierarchy, parts, _ = load(data, options.root)
        epochs, steps = steps_of(len(parts[0]), options.steps)
        runs = [
            (latent, name, seed, lr)
            for latent in options.latent
            for name in options.peers
            for seed in options.seeds
            for lr in options.rates
            if PEERS[name].trained and PEERS[name].rate_of is None
        ]
        for latent, name, seed, lr in runs:
            key = tuple(map(str, (data, latent, name, steps, seed, lr)))
            if key in done:
                continue
            try:
                model = train_peer(PEERS[name], hierarchy, latent, *parts[:2], epochs, lr, seed)
                val = model.evaluate(parts[1])["mean"]
            except ValueError as e:  # a loss that is no longer finite
                print(f"{name} at {lr}: {e}")
                val = float("inf")
            append_row(path, COLUMNS, dict(zip(COLUMNS, (*key, f"{val:.5g}"), strict=True)))
            print(", ".join(key), f"{val:.4f} mm", flush=True)


def best_rate(path: Path, data: str, latent: int, peer: str) -> float:
    r"""The rate with the least mean error on validation meshes, at the latent size or else at the
    nearest one by ratio at which it has been looked for.

    Raises:
        ValueError: If it has not been looked for.
    """
    by_latent: dict[int, dict[float, list[float]]] = {}
    for row in read_rows(path, COLUMNS):
        if (row["data"], row["peer"]) == (measured_on(data), peer):
            of_latent = by_latent.setdefault(int(row["latent"]), {})
            of_latent.setdefault(float(row["lr"]), []).append(float(row["val"]))
    nearest = min(by_latent, key=lambda size: abs(math.log(size / latent)), default=latent)
    found = by_latent.get(nearest, {})
    if len(found) < len(GRID):
        raise ValueError(
            f"Expected errors of all rates of {peer!r} on {data} at latent size {latent} in {path} "
            f"(got {sorted(found)}): run `python -m benchmarks.peers.tune` first"
        )
    return min(found, key=lambda lr: statistics.mean(found[lr]))


if __name__ == "__main__":
    main()
