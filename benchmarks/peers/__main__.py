r"""Models of other papers and of this package, at equal latent size and equal steps:

    python -m benchmarks.peers --data faces hands --latent 8 32 --steps 425 --seeds 0 1 2

Rates are those that :mod:`benchmarks.peers.tune` has found, on other seeds and by validation
meshes alone; so is the epoch whose weights a run keeps.

With `--as-long-as modal` every peer makes as many steps as fit into the time of that one's, by the
costs that :mod:`benchmarks.peers.costs` has measured.

Finished runs are lines of :obj:`peers.csv` in the folder of results, on the disk before the next
run begins. A call into the same folder goes on where the last one ended, and writes the table
:obj:`peers.md` of all that is there, and their picture."""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.costs import as_long_as, read_costs
from benchmarks.peers.data import SETS, load, measured_on
from benchmarks.peers.registry import PEERS, linear_peer, steps_of, train_peer
from benchmarks.peers.rows import append_row, read_rows, rounded
from benchmarks.peers.surface import edge_error, normal_angle, roughness
from benchmarks.peers.table import COLUMNS, KEYS, draw, write_table
from benchmarks.peers.tune import best_rate
from pyg_attnpool import MorphableModel
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.models import PCA
from pyg_attnpool.training import quiet_lightning

RESULTS = Path(__file__).parents[1] / "results" / "peers"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--data", nargs="+", choices=SETS, default=["faces"])
    add("--latent", nargs="+", type=int, default=[8])
    add("--steps", type=int, default=425, help="at least so many, in whole epochs")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--meshes", type=int, help="so many training meshes, evenly spread; fewer latent channels")
    add("--root", type=Path, default=Path("data"), help="folder of the data sets")
    add("--output", type=Path, default=Path("runs/peers"))
    add("--rates", type=Path, default=RESULTS / "rates.csv", help="the file that tune has written")
    add("--costs", type=Path, default=RESULTS / "costs.csv", help="the file of costs")
    add("--as-long-as", choices=PEERS, metavar="PEER", help="equal time, as of its --steps")
    options = parser.parse_args(arguments)
    quiet_lightning()
    path = options.output / "peers.csv"
    costs = read_costs(options.costs)
    done = {tuple(row[name] for name in KEYS) for row in read_rows(path, COLUMNS)}
    for data in options.data:
        hierarchy, (train, val, test), subjects = load(data, options.root)
        if options.meshes is not None:
            few = torch.linspace(0, len(train) - 1, options.meshes).round().long()
            train = train[few]
            subjects = None if subjects is None else [subjects[i] for i in few.tolist()]
        for seed, latent, name in product(options.seeds, options.latent, options.peers):
            if latent >= len(train):
                print(f"No principal components of {len(train)} meshes for {latent} channels")
                continue
            peer = PEERS[name]
            epochs, steps = steps_of(len(train), options.steps)
            if options.as_long_as is not None and peer.trained:
                same = (measured_on(data), str(latent))
                steps = as_long_as(costs, *same, options.as_long_as, name, steps)
                epochs, steps = steps_of(len(train), steps)
            if not peer.trained:
                epochs = steps = seed = 0
            key = tuple(map(str, (data, len(train), latent, name, steps, seed)))
            if key in done:
                continue
            lr = 0.0
            model: MorphableModel | None
            if peer.trained:
                lr = best_rate(options.rates, data, latent, peer.rate_of or name)
                model = train_peer(peer, hierarchy, latent, train, val, epochs, lr, seed)
            else:
                model = linear_peer(name, hierarchy, latent, train, val, subjects)
            if model is None:
                continue
            row = {"lr": lr, **_measured(model, train, test)}
            append_row(path, COLUMNS, dict(zip(KEYS, key, strict=True)) | row)
            done.add(key)
            print(", ".join(key), json.dumps(row), flush=True)
    rows = read_rows(path, COLUMNS)
    if not rows:
        return
    print(write_table(options.output / "peers.md", rows, costs))
    draw(options.output / "peers.png", rows, costs)


def _measured(model: MorphableModel, train: Tensor, test: Tensor) -> dict[str, Any]:
    model.freeze().eval()
    with torch.no_grad():
        outs = [model(block) for block in test.split(64)]
        pairs = zip(outs, test.split(64), strict=True)
        distance = torch.cat([vertex_distances(out, x).flatten() for out, x in pairs]).sort().values
        # The surface of some meshes, evenly spread.
        few = slice(None, None, max(1, len(test) // 64))
        out, x, faces = torch.cat(outs)[few], test[few], model.faces
        found = {
            "mean": distance.mean(),
            "median": distance[(len(distance) - 1) // 2],
            "p95": distance[int(0.95 * (len(distance) - 1))],
            "train": model.evaluate(train[:: max(1, len(train) // 256)])["mean"],
            "normals": normal_angle(out, x, faces),
            "edges": 100 * edge_error(out, x, faces),
            "roughness": roughness(out, x, faces),
            "parameters": _shipped(model),
        }
    return {name: rounded(float(value)) for name, value in found.items()}


def _shipped(model: MorphableModel) -> int:
    # Learned numbers and principal components; mean and scale of vertices have all models.
    linear = [m.components for m in model.modules() if isinstance(m, PCA)]
    return sum(p.numel() for p in [*model.parameters(), *linear])


if __name__ == "__main__":
    main()
