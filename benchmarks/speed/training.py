r"""A training step and an inference of CoMA and Neural3DMM, with QEM and with attention: ours
against the published formulas written plainly (plain.py), after the same run has shown in double
precision that both compute the same."""

import copy
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from benchmarks import report
from benchmarks.speed import measure
from benchmarks.speed.plain import PlainAutoencoder
from benchmarks.speed.templates import blob
from pyg_attnpool import MeshHierarchy, freeze
from pyg_attnpool.models import coma, neural3dmm
from pyg_attnpool.ops import _cpu
from pyg_attnpool.training import keep_freed_memory

MODELS = {"CoMA": coma, "Neural3DMM": neural3dmm}
POOLS = ("qem", "attention")
NOTES = (
    "A step is forward, L1 loss, backward and Adam (fused for ours, as `fit` has it; the default "
    "for plain), on random meshes. Inference is that of the frozen model for ours.",
    "Times are medians of interleaved rounds; ratios are of these.",
    "Peak memory is that of model, optimizer and steps in a process of its own, above the "
    "interpreter with its libraries and the template.",
    "Difference: the largest relative one of output, loss and any gradient, in double precision.",
    "Where the time goes: milliseconds of a mean step of ours in every compiled operation.",
)


def loss(model: Module, x: Tensor) -> Tensor:
    return (model(x) - x).abs().mean()


def check(model: Module, plain: Module, x: Tensor) -> float:
    r"""The largest difference of output, loss and gradients, in double precision."""
    ours, theirs, x = copy.deepcopy(model).double(), copy.deepcopy(plain).double(), x.double()
    for each in (ours, theirs):
        each.zero_grad()
    differences = [measure.equal("output", ours(x), theirs(x), 1e-9)]
    losses = [loss(each, x) for each in (ours, theirs)]
    differences.append(measure.equal("loss", losses[0], losses[1], 1e-9))
    for each in losses:
        each.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        # The gradient of a fusion weight is the difference of sums that nearly cancel.
        rtol = 1e-6 if name.endswith("fusion_weight") else 1e-9
        differences.append(measure.equal(f"gradient of {name}", p.grad, expected[name], rtol))
    return max(differences)


class Step:
    r"""A training step, ready to be called."""

    def __init__(self, model: Module, x: Tensor):
        self.model, self.x = model, x
        self.loss = loss
        plain = isinstance(model, PlainAutoencoder)
        if x.device.type == "cuda" and not plain:  # as `fit` does
            self.loss = torch.compile(loss, mode="reduce-overhead")
        fused = None if plain else True
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)

    def __call__(self):
        self.optimizer.zero_grad()
        self.loss(self.model, self.x).backward()
        self.optimizer.step()


def make(name: str, pool: str, plain: bool, hierarchy: MeshHierarchy, seed: int) -> Module:
    torch.manual_seed(seed)
    model = MODELS[name](hierarchy, pool, variant="published")
    return PlainAutoencoder(model) if plain else model


def operations(step: Step, rounds: int) -> dict[str, float]:
    r"""Milliseconds of a step in every compiled operation and in all else."""
    call, spent = _cpu.call, Counter()

    def timed(name: str, *args: Any):
        start = time.perf_counter()
        call(name, *args)
        spent[name.removesuffix("_float")] += time.perf_counter() - start

    _cpu.call = timed
    try:
        start = time.perf_counter()
        for _ in range(rounds):
            step()
        total = time.perf_counter() - start
    finally:
        _cpu.call = call
    spent["all else"] = total - sum(spent.values())
    return {name: 1000 * seconds / rounds for name, seconds in spent.items()}


def peak(queue: Any, threads: int, batch_size: int, device: str, seed: int, *which: Any):
    r"""Runs in a process of its own."""
    torch.set_num_threads(threads)
    *which, hierarchy = which
    keep_freed_memory()
    memory = measure.Memory(device)
    x = torch.randn(batch_size, hierarchy.num_vertices[0], 3, device=device)
    step = Step(make(*which, hierarchy, seed).to(device), x)
    for _ in range(5):
        step()
    queue.put(memory.peak())


def main(
    num_vertices: int = 5023,
    batch_size: int = 16,
    repeat: int = 21,
    budget: float = 120.0,
    models: tuple[str, ...] = tuple(MODELS),
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    output: Path = measure.RESULTS,
):
    r"""Prints and writes the table.

    Args:
        num_vertices: Vertices of the template; each coarser level has a quarter.
        batch_size: Meshes per step.
        repeat: Rounds of each measurement.
        budget: Seconds after which a measurement begins no further round.
        models: Names of models.
        threads: CPU threads; PyTorch's default if none.
        device: Where to run.
        seed: Of parameters and meshes.
        output: Folder of the results.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    keep_freed_memory()
    hierarchy = MeshHierarchy.from_template(blob(num_vertices))
    torch.manual_seed(seed)
    x = torch.randn(batch_size, num_vertices, 3, device=device)
    context = multiprocessing.get_context("spawn")
    rows, spent = [], {}
    for name in models:
        trained, equality, peaks = {}, {}, {}
        for pool in POOLS:
            ours, plain = (
                make(name, pool, each, hierarchy, seed).to(device) for each in (False, True)
            )
            equality[pool] = check(ours, plain, x[:2])
            trained |= {f"ours {pool}": Step(ours, x), f"plain {pool}": Step(plain, x)}
        step_times = measure.interleaved(trained, repeat, budget)

        if _cpu.AVAILABLE and device == "cpu":
            for pool in POOLS:
                spent[f"{name}, {pool}"] = operations(trained[f"ours {pool}"], repeat)

        used = {key: copy.deepcopy(step.model).eval() for key, step in trained.items()}
        freeze(used["ours attention"])
        with torch.inference_mode():
            times = measure.interleaved(
                {key: lambda model=model: model(x) for key, model in used.items()}, repeat, budget
            )
        for key in trained:
            kind, pool = key.split()
            queue = context.Queue()
            which = (name, pool, kind == "plain", hierarchy)
            process = context.Process(
                target=peak, args=(queue, torch.get_num_threads(), batch_size, device, seed, *which)
            )
            process.start()
            peaks[key] = queue.get(timeout=600)
            process.join()
        for key in trained:
            kind, pool = key.split()
            rows.append(
                {
                    "model": name,
                    "pool": pool,
                    "kind": kind,
                    "step_seconds": step_times[key],
                    "inference_seconds": times[key],
                    "step_over_ours": step_times[key] / step_times[f"ours {pool}"],
                    "inference_over_ours": times[key] / times[f"ours {pool}"],
                    "step_over_qem": step_times[key] / step_times[f"{kind} qem"],
                    "inference_over_qem": times[key] / times[f"{kind} qem"],
                    "peak_bytes": peaks[key],
                    "largest_difference": equality[pool],
                }
            )
            print(rows[-1], flush=True)
    about = report.machine(device) | {
        "levels": " ".join(map(str, hierarchy.num_vertices)),
        "batch": batch_size,
        "rounds": repeat,
        "seed": seed,
    }
    tables = {"Training": [line(row, "step") for row in rows]}
    tables["Inference"] = [line(row, "inference") for row in rows]
    if spent:
        names = sorted({name for each in spent.values() for name in each} - {"all else"})
        tables["Where the time goes"] = [
            {"operation": name} | {column: each.get(name) for column, each in spent.items()}
            for name in [*names, "all else"]
        ]
    name = "training" if device == "cpu" else "training_gpu"
    print(report.write(output, name, report.command(), rows, tables, about, NOTES))


def line(row: dict[str, Any], what: str) -> dict[str, Any]:
    r"""A row as the table shows it."""
    cells = {
        "model": row["model"],
        "pooling": row["pool"],
        "written": row["kind"],
        "ms": 1000 * row[f"{what}_seconds"],
        "times ours": row[f"{what}_over_ours"],
        "times QEM": row[f"{what}_over_qem"],
    }
    if what == "step":
        megabytes = row["peak_bytes"] / 2**20 if row["peak_bytes"] else None
        cells |= {"peak MiB": megabytes, "difference": row["largest_difference"]}
    return cells


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
