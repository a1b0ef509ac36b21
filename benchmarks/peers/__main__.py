r"""Models of other papers and of this package, at equal latent size and equal steps:

    python -m benchmarks.peers --data faces hands --latent 8 32 --steps 425 --seeds 0 1 2

Finished runs are lines of :obj:`peers.csv` in the folder of results, on the disk before the next
run begins. A call into the same folder goes on where the last one ended, and writes the table
:obj:`peers.md` of all that is there."""

import argparse
import csv
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts its threads

import torch
from torch import Tensor
from torch.nn import Module

from benchmarks.peers.data import SETS
from benchmarks.peers.networks import MLP, TokenMixer
from benchmarks.peers.surface import edge_error, normal_angle, roughness
from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.models import PCA, coma, modal, neural3dmm
from pyg_attnpool.training import quiet_lightning

BATCH_SIZE = 16


class Peer(NamedTuple):
    r"""How a network is made of hierarchy and latent size, and trained."""

    build: Callable[[MeshHierarchy, int], Module]
    lr: float | None = None
    r"""Of the one-cycle schedule; of PCA none."""
    millimetres: bool = True
    r"""Whether the loss is the mean distance, or else the L1 loss of standardised coordinates."""


def _pca(hierarchy: MeshHierarchy, latent: int) -> Module:
    return PCA.empty(hierarchy.num_vertices[0], latent)


# Rates and losses of MLP and token mixer are the best of 3e-4 and 1e-3, each with both losses at
# 1e-3, on faces with seed 100; those of modal the better of 3e-3 and 6e-3 on faces and hands with
# seeds 100 and 101, but for its rate on hands at latent size 32, where seed 0 was looked at too.
PEERS = {
    "PCA": Peer(_pca),
    "MLP": Peer(MLP, 1e-3),
    "token mixer": Peer(TokenMixer, 1e-3),
    "CoMA, QEM": Peer(lambda h, n: coma(h, "qem", n), 3e-3, False),
    "CoMA, attention": Peer(lambda h, n: coma(h, "attention", n), 3e-3, False),
    "Neural3DMM, QEM": Peer(lambda h, n: neural3dmm(h, "qem", n), 3e-3, False),
    "Neural3DMM, attention": Peer(lambda h, n: neural3dmm(h, "attention", n), 3e-3, False),
    "modal": Peer(lambda h, n: modal(h, latent_channels=n), 3e-3),
    "modal, QEM": Peer(lambda h, n: modal(h, "qem", n), 3e-3),
    "modal, modes of all vertices": Peer(lambda h, n: modal(h, "qem", n, level=0), 3e-3),
    "modal, no further modes": Peer(lambda h, n: modal(h, "qem", n, modes=0, level=0), 3e-3),
}

KEYS = ("data", "meshes", "latent", "peer", "steps", "seed")
MEASURED = {
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
    options = parser.parse_args(arguments)
    quiet_lightning()
    path = options.output / "peers.csv"
    done = {tuple(row[name] for name in KEYS) for row in _read(path)}
    for data in options.data:
        dataset = SETS[data](options.root)
        hierarchy = MeshHierarchy.from_template(
            dataset.template, cache=options.root / "hierarchies"
        )
        train, val, test = (dataset.read(part) for part in dataset.split())
        if options.meshes is not None:
            train = train[torch.linspace(0, len(train) - 1, options.meshes).round().long()]
        for seed in options.seeds:
            for latent in options.latent:
                for name in options.peers:
                    peer = PEERS[name]
                    of_epoch = -(-len(train) // BATCH_SIZE)
                    epochs = 0 if peer.lr is None else -(-options.steps // of_epoch)
                    steps = epochs * of_epoch
                    values = data, len(train), latent, name, steps, seed if epochs else 0
                    key = tuple(map(str, values))
                    if key in done:
                        continue
                    parts = (train, val, test)
                    row = _run(peer, hierarchy, latent, epochs, steps, seed, parts)
                    _append(path, dict(zip(KEYS, key, strict=True)) | row)
                    done.add(key)
                    print(", ".join(key), json.dumps(row), flush=True)
    print(_write(options.output, _read(path)))


def _run(
    peer: Peer,
    hierarchy: MeshHierarchy,
    latent: int,
    epochs: int,
    steps: int,
    seed: int,
    parts: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    train, val, test = parts
    torch.manual_seed(seed)
    model = MorphableModel(peer.build(hierarchy, latent), hierarchy)

    def distance_loss(out: Tensor, x: Tensor) -> Tensor:
        return ((out - x) * model.std).norm(dim=-1).mean()

    start = time.perf_counter()
    if peer.lr is None:
        model.fit(train)
    else:
        model.fit(
            train,
            val,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            lr=peer.lr,
            loss=distance_loss if peer.millimetres else None,
            seed=seed,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
        )
    seconds = time.perf_counter() - start
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
            "step_ms": 1000 * seconds / steps if steps else 0.0,
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


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f"Expected results of this script in {path} (got other columns)")
    return [row for row in rows if None not in row.values()]  # a torn last line is run again


def _append(path: Path, row: dict[str, Any]) -> None:
    # The whole file anew: a torn line of a crash goes with it.
    rows = [*_read(path), row]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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
    if name.endswith("_ms"):
        return f"{min(values):.1f}"
    digits = 3 if mean < 10 else 2
    text = f"{mean:.{digits}f}"
    if name == "mean" and len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


if __name__ == "__main__":
    main()
