r"""How a training step grows with the template, in time and memory: the attention layers alone, the
whole autoencoder, and attention by dense matrices as far as these fit.

Templates are bent spheres. Between levels every edge is halved, so a level is exactly the first
vertices of the finer one, and a new vertex lies halfway between its two parents: mappings as sparse
as those of mesh simplification, at any size, for nothing. Every size has its own coarsest level, so
that all have the same number of levels.
"""

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import Module, Sequential

from benchmarks import report
from benchmarks.speed import measure
from benchmarks.speed.plain import PlainAttention
from benchmarks.speed.templates import blob
from pyg_attnpool import AttentionPool, AttentionUnpool, Mapping, MeshHierarchy
from pyg_attnpool.models import coma
from pyg_attnpool.ops import reference

STEPS_DOWN = 4
OPTIMIZERS = {  # of pyg_attnpool.training
    "sgd": partial(torch.optim.SGD, lr=8e-3, momentum=0.9, weight_decay=5e-4, fused=True),
    "adam": partial(torch.optim.Adam, lr=3e-3, fused=True),
}
CHANNELS = 16  # of the features between attention layers
WARM_UP = 3  # steps before the steady state
NOTES = (
    f"The first step searches in full. A step is the median after the first {WARM_UP}.",
    "Rows searched are those of all layers and all steps after the first; the others were proved.",
    "Peak memory is that of model, optimizer and steps, above the state with the template made.",
    "Exponents are those of powers of the number of vertices, by least squares on logarithms.",
)


# Templates ########################################################################


def subdivided(faces: ndarray, num_vertices: int) -> tuple[ndarray, ndarray]:
    r"""Halves every edge of a mesh. New vertices are numbered after the old ones.

    Returns:
        Faces, and the two parents :obj:`[E, 2]` of every new vertex.
    """
    edge = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    code, middle = np.unique(edge[:, 0] * num_vertices + edge[:, 1], return_inverse=True)
    a, b, c = faces.T
    ab, bc, ca = middle.reshape(3, -1) + num_vertices
    corners = [(a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca)]
    faces = np.concatenate([np.stack(corner, axis=1) for corner in corners])
    return faces, np.stack(np.divmod(code, num_vertices), axis=1)


def sphere(num_vertices: int) -> tuple[list[ndarray], list[ndarray], list[ndarray]]:
    r"""A unit sphere of about so many vertices in levels from fine to coarse.

    Returns:
        Vertices and faces of every level, and the parents of what each level adds to the next
        coarser one.
    """
    # Halving takes V vertices of a closed surface to 4 (V - 2) + 2.
    coarsest = max(4, round((num_vertices - 2) / 4**STEPS_DOWN) + 2)
    vertices, faces = blob(coarsest)
    levels = [(normalized(vertices / [1.0, 1.3, 0.8]), faces)]  # a blob is scaled after it is bent
    parents = []
    for _ in range(STEPS_DOWN):
        coarse, faces = levels[0]
        faces, pairs = subdivided(faces, len(coarse))
        middles = normalized(coarse[pairs].mean(axis=1))
        levels.insert(0, (np.concatenate([coarse, middles]), faces))
        parents.insert(0, pairs)
    return [v for v, _ in levels], [f for _, f in levels], parents


def normalized(vertices: ndarray) -> ndarray:
    return vertices / np.linalg.norm(vertices, axis=1, keepdims=True)


class Waves:
    r"""Smooth random fields over space, for templates and their deformations."""

    def __init__(self, points: ndarray, seed: int, num_waves: int = 8):
        self.generator = torch.Generator().manual_seed(seed)
        direction = 2 * torch.randn(3, num_waves, generator=self.generator)
        phase = 6.28 * torch.rand(num_waves, generator=self.generator)
        self.basis = torch.sin(torch.from_numpy(points).float() @ direction + phase)

    def sample(self, batch_size: int, channels: int) -> Tensor:
        r"""Fields :obj:`[B, N, F]`."""
        size = (batch_size, self.basis.size(1), channels)
        return 0.1 * self.basis @ torch.randn(size, generator=self.generator)


def hierarchy(num_vertices: int, seed: int) -> MeshHierarchy:
    r"""A bent sphere of about so many vertices."""
    vertices, faces, parents = sphere(num_vertices)
    bend = 1 + Waves(vertices[0], seed).sample(1, 1)[0].double().numpy()
    down, up = [], []
    for fine, coarse, pairs in zip(vertices, vertices[1:], parents, strict=False):
        kept = torch.arange(len(coarse)).unsqueeze(1)
        down.append(Mapping(kept, torch.ones_like(kept, dtype=torch.float64), len(fine)))
        index = torch.cat([kept.expand(-1, 2), torch.from_numpy(pairs)])
        weight = torch.full(index.shape, 0.5, dtype=torch.float64)
        weight[: len(coarse)] = torch.tensor([1.0, 0.0])
        up.append(Mapping(index, weight, len(coarse)))
    return MeshHierarchy([v * bend[: len(v)] for v in vertices], faces, down, up)


# What is trained ##################################################################


def attention_layers(levels: MeshHierarchy) -> Sequential:
    r"""All poolings and unpoolings of an autoencoder, with nothing between them."""
    steps = range(len(levels.down))
    ends = [(AttentionPool, 2, n, n + 1, levels.down[n]) for n in steps]
    ends += [(AttentionUnpool, 32, n + 1, n, levels.up[n]) for n in reversed(steps)]
    return Sequential(
        *(
            kind.published(
                levels.num_vertices[source],
                levels.num_vertices[target],
                k=min(k, levels.num_vertices[source]),
                prior=prior.to(torch.float32),
                source_pos=levels.positions(source),
                target_pos=levels.positions(target),
            )
            for kind, k, source, target, prior in ends
        )
    )


def dense_layers(levels: MeshHierarchy) -> Sequential:
    return Sequential(*(PlainAttention(layer) for layer in attention_layers(levels)))


def autoencoder(levels: MeshHierarchy) -> Module:
    return coma(levels, "attention", variant="published")


SUBJECTS: dict[str, tuple[Callable[[MeshHierarchy], Module], int]] = {  # and their channels
    "layers": (attention_layers, CHANNELS),
    "autoencoder": (autoencoder, 3),
    "dense": (dense_layers, CHANNELS),
}


def dense_bytes(num_vertices: int) -> int:
    r"""What training with dense matrices holds: eight of them, pooling and unpooling, four levels,
    each a sixteenth of the one before."""
    return int(8 * 2 * 16 / 15 * 4 * num_vertices**2 / 4)


@torch.no_grad()
def check(model: Module):
    r"""Compares every attention layer with the dense reference."""
    for name, layer in model.named_modules():
        if not isinstance(layer, AttentionPool | AttentionUnpool | PlainAttention):
            continue
        x = torch.randn(2, layer.num_source, 5, device=layer.key.device)
        exact = copy.deepcopy(layer).double()  # no two scores are equal within its rounding
        if isinstance(layer, PlainAttention):
            prior = exact.prior
        else:
            prior = Mapping(exact.prior_index, exact.prior_weight, layer.num_source).to_dense()
            measure.equal_topk(name, layer.attention().index, layer.query, layer.key)
            dense = layer.mapping().to_dense()
            measure.equal(f"layer {name}", layer(x), reference.apply(dense, x), rtol=1e-5)
        dense = reference.attention(exact.query, exact.key, layer.k)
        dense = reference.fuse(dense, prior, exact.fusion_weight)
        expected = reference.apply(dense, x.double())
        measure.equal(f"layer {name} in double", exact(x.double()), expected, rtol=1e-12)


def rows_searched(model: Module) -> list[int]:
    r"""How many rows all layers have searched so far, and how many they were asked for."""
    layers = [m for m in model.modules() if isinstance(m, AttentionPool | AttentionUnpool)]
    return sum((layer.search.searched for layer in layers), torch.zeros(2, dtype=int)).tolist()


# The run ##########################################################################


class Trainer:
    r"""A subject on a template, ready for steps."""

    def __init__(
        self,
        subject: str,
        levels: MeshHierarchy,
        optimizer: str,
        batch_size: int,
        device: str,
        seed: int,
    ):
        make, self.channels = SUBJECTS[subject]
        torch.manual_seed(seed)
        self.model = make(levels).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.waves = Waves(levels.vertices[0], seed)
        self.positions = levels.positions(0)
        self.batch_size = batch_size
        self.device = device

    def step(self) -> float:
        r"""The seconds of one step, on deformations of the template made before."""
        x = self.waves.sample(self.batch_size, self.channels)
        x[..., :3] += self.positions
        x = x.to(self.device)

        def step():
            self.optimizer.zero_grad()
            (self.model(x) - x).abs().mean().backward()
            self.optimizer.step()

        return measure.seconds(step)


def train(
    pipe: Connection,
    subject: str,
    num_vertices: int,
    checked: bool,
    optimizer: str,
    batch_size: int,
    steps: int,
    device: str,
    threads: int,
    seed: int,
):
    r"""Runs in a process of its own, so that its memory is that of this size alone, and tells what
    it knows after every step."""
    torch.set_num_threads(threads)
    pipe.send({"state": "making the template"})
    levels = hierarchy(num_vertices, seed)
    # Libraries load and kernels compile at first use.
    Trainer(subject, hierarchy(0, seed), optimizer, batch_size, device, seed).step()

    memory = measure.Memory(device)
    pipe.send({"state": "making the model", "num_vertices": levels.num_vertices[0]})
    trainer = Trainer(subject, levels, optimizer, batch_size, device, seed)
    if checked:
        check(copy.deepcopy(trainer.model))  # a copy, as a layer remembers its last search
    memory.reset()
    pipe.send({"state": "taking the first step"})
    times: list[float] = []
    counts: list[list[int]] = []
    try:
        for _ in range(steps):
            times.append(trainer.step())
            counts.append(rows_searched(trainer.model))
            steady = times[WARM_UP:]
            found, asked = (now - first for now, first in zip(counts[-1], counts[0], strict=True))
            pipe.send(
                {
                    "state": f"after step {len(times)}",
                    "steps": len(times),
                    "first_seconds": times[0],
                    "step_seconds": statistics.median(steady) if steady else None,
                    "peak_bytes": memory.peak(),
                    "share_searched": found / asked if asked else None,
                }
            )
    except torch.OutOfMemoryError:
        pipe.send({"note": "out of memory"})
    if checked:
        check(trainer.model)
    pipe.close()


def measured(
    context: BaseContext, subject: str, num_vertices: int, budget: float, *options: Any
) -> dict[str, Any]:
    r"""The row of a subject at a size, as far as it came within the budget."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(sender, subject, num_vertices, *options))
    process.start()
    sender.close()
    row: dict[str, Any] = {"subject": subject, "num_vertices": num_vertices, "note": None}
    start = printed = time.monotonic()
    try:
        while receiver.poll(max(0.0, start + budget - time.monotonic())):
            row |= receiver.recv()
            if time.monotonic() - printed > 10:
                printed = time.monotonic()
                print(f"  {subject}, {row['num_vertices']:,} vertices: {row['state']}", flush=True)
        row["note"] = f"stopped at {budget:.0f} s, {row.pop('state', 'starting')}"
        process.kill()
    except EOFError:  # it has ended
        row.pop("state", None)
    process.join()
    if process.exitcode > 0:
        raise RuntimeError(f"Training {subject} at {num_vertices} vertices failed, see above")
    if process.exitcode < 0 and row["note"] is None:
        row["note"] = f"ended by signal {-process.exitcode}, as for want of memory"
    return row


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    r"""The power of its size that a value grows with, by least squares on logarithms."""
    known = [(s, v) for s, v in zip(sizes, values, strict=True) if v]
    if len({s for s, _ in known}) < 2:
        return None
    x, y = np.log(known).T
    return float(np.polyfit(x, y, 1)[0])


def line(row: dict[str, Any]) -> dict[str, Any]:
    r"""A row as the table shows it."""

    def scaled(name: str, scale: float) -> float | None:
        return row[name] * scale if row.get(name) is not None else None

    return {
        "what": row["subject"],
        "vertices": row["num_vertices"],
        "first step ms": scaled("first_seconds", 1000),
        "step ms": scaled("step_seconds", 1000),
        "peak MiB": scaled("peak_bytes", 2**-20),
        "rows searched %": scaled("share_searched", 100),
        "steps": row.get("steps"),
        "note": row["note"],
    }


def main(
    sizes: tuple[int, ...] = (5_000, 20_000, 80_000, 320_000, 1_000_000),
    subjects: tuple[str, ...] = tuple(SUBJECTS),
    optimizer: str = "sgd",
    batch_size: int = 2,
    steps: int = 15,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: int = torch.get_num_threads(),
    budget: float = 900.0,
    memory: float = 8.0,
    seed: int = 0,
    output: Path = measure.RESULTS,
):
    r"""Checks, times and writes scaling.json and scaling.md.

    Args:
        sizes: About how many vertices the templates have; the nearest that halving edges reaches
            are taken and shown.
        subjects: What to train: the attention layers alone, the whole autoencoder, the layers with
            dense matrices.
        optimizer: "sgd" with momentum, as published, or "adam" at the highest rate of one_cycle.
        batch_size: Meshes in a step, the same at all sizes.
        steps: Training steps.
        device: Where to run.
        threads: CPU threads.
        budget: Seconds for one subject at one size, its template included.
        memory: GiB that dense matrices may take.
        seed: Of template, data and parameters.
        output: The folder of the results.
    """
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyg_attnpool.models"])  # imported once for all processes
    rows: list[dict[str, Any]] = []
    for size in sorted(sizes):
        for subject in subjects:
            needed = dense_bytes(size)
            if subject == "dense" and needed > memory * 2**30:
                note = f"left out, needs {needed / 2**30:,.0f} GiB"
                rows.append({"subject": subject, "num_vertices": size, "note": note})
            else:
                options = (size == min(sizes), optimizer, batch_size, steps, device, threads, seed)
                rows.append(measured(context, subject, size, budget, *options))
            print(" ".join(f"{k} {report.cell(v)}" for k, v in line(rows[-1]).items()), flush=True)
    growth = []
    for subject in subjects:
        own = [row for row in rows if row["subject"] == subject]
        counts = [row["num_vertices"] for row in own]
        fits = {
            name: exponent(counts, [row.get(key) for row in own])
            for name, key in (
                ("first step", "first_seconds"),
                ("step", "step_seconds"),
                ("peak memory", "peak_bytes"),
            )
        }
        growth.append({"what": subject} | fits)
    about = report.machine(device) | {
        "optimizer": optimizer,
        "batch size": batch_size,
        "levels": STEPS_DOWN + 1,
    }
    about |= {"layer channels": CHANNELS, "seed": seed}
    tables = {"Training steps": [line(row) for row in rows], "Exponents": growth}
    rows_and_fits = [*rows, *({"exponents": row} for row in growth)]
    name = "scaling" if optimizer == "sgd" else f"scaling_{optimizer}"
    print(report.write(output, name, report.command(), rows_and_fits, tables, about, NOTES))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
