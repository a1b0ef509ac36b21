r"""Models of other papers and of this package, at equal latent size and equal steps:

    python -m benchmarks.peers --data faces hands --latent 8 32 --steps 425 --seeds 0 1 2

Rates are those that :mod:`benchmarks.peers.tune` has found, on other seeds and by validation
meshes alone; so is the epoch whose weights a run keeps.

Finished runs are lines of :obj:`peers.csv` in the folder of results, on the disk before the next
run begins. A call into the same folder goes on where the last one ended, and writes the table
:obj:`peers.md` of all that is there."""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.data import SETS, load
from benchmarks.peers.registry import PEERS, linear_peer, steps_of, train_peer
from benchmarks.peers.rows import append_row, read_rows
from benchmarks.peers.surface import edge_error, normal_angle, roughness
from benchmarks.peers.tune import best_rate
from pyg_attnpool import MorphableModel
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.models import PCA
from pyg_attnpool.training import quiet_lightning

RATES = Path(__file__).parents[1] / "results" / "peers" / "rates.csv"

KEYS = ("data", "meshes", "latent", "peer", "steps", "seed")
MEASURED = {
    "lr": "rate",
    "mean": "mean error (mm)",
    "median": "median",
    "p95": "95th percentile",
    "train": "mean on training meshes",
    "normals": "angle of normals (degrees)",
    "edges": "error of edges (%)",
    "roughness": "roughness, of the true one",
    "parameters": "parameters shipped",
    "step_ms": "training step (ms)",
    "decode_ms": "decoding a mesh (ms)",
}
COLUMNS = (*KEYS, *MEASURED)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--data", nargs="+", choices=SETS, default=["faces"])
    add("--latent", nargs="+", type=int, default=[8])
    add("--steps", type=int, default=425, help="at least so many, in whole epochs")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--meshes", type=int, help="so many training meshes, evenly spread")
    add("--root", type=Path, default=Path("data"), help="folder of the data sets")
    add("--output", type=Path, default=Path("runs/peers"))
    add("--rates", type=Path, default=RATES, help="the file that tune has written")
    options = parser.parse_args(arguments)
    quiet_lightning()
    path = options.output / "peers.csv"
    done = {tuple(row[name] for name in KEYS) for row in read_rows(path, COLUMNS)}
    for data in options.data:
        hierarchy, (train, val, test), subjects = load(data, options.root)
        if options.meshes is not None:
            few = torch.linspace(0, len(train) - 1, options.meshes).round().long()
            train = train[few]
            subjects = None if subjects is None else [subjects[i] for i in few.tolist()]
        for seed, latent, name in product(options.seeds, options.latent, options.peers):
            peer = PEERS[name]
            epochs, steps = steps_of(len(train), options.steps)
            if not peer.trained:
                epochs = steps = seed = 0
            key = tuple(map(str, (data, len(train), latent, name, steps, seed)))
            if key in done:
                continue
            start, lr = time.perf_counter(), 0.0
            model: MorphableModel | None
            if peer.trained:
                lr = best_rate(options.rates, data, latent, name)
                model = train_peer(peer, hierarchy, latent, train, val, epochs, lr, seed)
            else:
                model = linear_peer(name, hierarchy, latent, train, val, subjects)
            if model is None:
                continue
            seconds = time.perf_counter() - start
            row = _measured(model, train, test, 1000 * seconds / steps if steps else 0.0)
            row = {"lr": lr, **row}
            append_row(path, COLUMNS, dict(zip(KEYS, key, strict=True)) | row)
            done.add(key)
            print(", ".join(key), json.dumps(row), flush=True)
    print(_write(options.output, read_rows(path, COLUMNS)))


def _measured(model: MorphableModel, train: Tensor, test: Tensor, step_ms: float) -> dict[str, Any]:
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
            "step_ms": step_ms,
            "decode_ms": _decode_ms(model),
        }
    return {name: float(f"{float(value):.5g}") for name, value in found.items()}


def _shipped(model: MorphableModel) -> int:
    # Learned numbers and principal components; mean and scale of vertices have all models.
    linear = [m.components for m in model.modules() if isinstance(m, PCA)]
    return sum(p.numel() for p in [*model.parameters(), *linear])


def _decode_ms(model: MorphableModel, repeats: int = 30) -> float:
    # The fastest of several on one thread: others may use the machine meanwhile.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    z, times = model.latent_mean.unsqueeze(0), []
    for _ in range(repeats):
        start = time.perf_counter()
        model.decode(z)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 1000 * min(times)


def _write(output: Path, rows: list[dict[str, str]]) -> str:
    about = f"python {platform.python_version()}, torch {torch.__version__}"
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    lines = [
        "# Peers",
        "",
        f"    {command}",
        "",
        f"{os.cpu_count()} cores that other work shared, {torch.get_num_threads()} thread a run, "
        f"{about}. Mean ± standard error over seeds; errors are of test meshes. Times are of a "
        f"busy machine.",
        "",
    ]
    groups: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        steps = row["steps"] if row["steps"] != "0" else None
        group = (row["data"], row["meshes"], row["latent"])
        label = row["peer"] if steps is None else f"{row['peer']}, {int(steps):,} steps"
        groups.setdefault(group, {}).setdefault(label, []).append(row)
    for (data, meshes, latent), of_peers in groups.items():
        lines += [f"## {data}, {meshes} training meshes, latent size {latent}", ""]
        lines += ["| | seeds | " + " | ".join(MEASURED.values()) + " |"]
        lines += ["|---" * (len(MEASURED) + 2) + "|"]
        for label, found in of_peers.items():
            cells = [_cell(name, [float(r[name]) for r in found]) for name in MEASURED]
            seeds = " ".join(row["seed"] for row in found)
            lines.append(f"| {label} | {seeds} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    with replacing(output / "peers.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _cell(name: str, values: list[float]) -> str:
    mean = statistics.mean(values)
    if name == "parameters":
        return f"{int(mean):,}"
    if name == "lr":
        return f"{mean:g}" if mean else ""
    if name.endswith("_ms"):
        return f"{min(values):.1f}"
    digits = 3 if mean < 10 else 2
    text = f"{mean:.{digits}f}"
    if name == "mean" and len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


if __name__ == "__main__":
    main()
