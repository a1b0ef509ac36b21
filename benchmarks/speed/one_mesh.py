r"""Decode and encode of one mesh on one thread, as a viewer or a tracker asks for them: frozen
models in one compiled call, after the same run has shown that it equals the layers one by one."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.speed import measure
from benchmarks.speed.templates import blob
from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.models.compiled import compiled_decoder, compiled_encoder
from pyg_attnpool.models.plan import (
    Chebyshev,
    Gather,
    Linear,
    Spiral,
    Step,
    Sum,
    decoder_plan,
    encoder_plan,
)

MODELS = {
    "CoMA": MorphableModel.coma,
    "Neural3DMM": MorphableModel.neural3dmm,
    "modal": MorphableModel.modal,
}
CACHED = 1 << 19  # bytes of a copy that stays in the cache, as the features of one mesh do
NOTES = (
    "Of every compiled call: the median and the fastest time on the clock, and the median of what "
    "the process itself used. Rounds are interleaved with the layers one by one ('by layers').",
    "The check whether the model has changed since it was compiled is part of the call.",
    "Floor: the sum over the steps of the longer of two times, of their multiplications and "
    "additions at the rate of a large product, and of their bytes (weights, indices and features "
    "once) at the rate of a copy within the cache; both rates are measured in the same run.",
    "Difference: the largest one between both, over the largest standard deviation of an output.",
    "Weights are random: times depend on the architecture alone.",
)


def work(plan: list[Step], numbers: int) -> list[tuple[float, float]]:
    r"""Operations and bytes of every step of a plan whose input has so many numbers."""
    counts: list[tuple[float, float]] = []
    for step in plan:
        if isinstance(step, Sum):
            for path in step.paths:
                counts += work(path, numbers)
            last = step.paths[0][-1]
            numbers = last.bias.size if isinstance(last, Linear) else numbers
            continue
        before, operations, held = numbers, 2.0 * numbers, 0.0
        if isinstance(step, Linear):
            numbers, operations, held = step.bias.size, 2.0 * step.weight.size, step.weight.size
        elif isinstance(step, Gather):
            rows, columns = step.matrix.shape
            channels = numbers // columns
            numbers, operations = rows * channels, 2.0 * step.matrix.nnz * channels
            held = 2.0 * step.matrix.nnz
        elif isinstance(step, Chebyshev):
            rows, (slots, channels, out) = step.laplacian.shape[0], step.weight.shape
            numbers, held = rows * out, 2.0 * step.laplacian.nnz + step.weight.size
            operations = 2.0 * rows * step.weight.size
            operations += 2.0 * (slots - 1) * step.laplacian.nnz * min(channels, out)
        elif isinstance(step, Spiral):
            rows, out = len(step.index), step.weight.shape[2]
            numbers, held = rows * out, step.index.size + step.weight.size
            operations = 2.0 * rows * step.weight.size
        counts.append((operations, 4.0 * (before + numbers + held)))
    return counts


def clock(function: Callable[[], Any]) -> tuple[float, float]:
    start, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - used


def frozen(name: str, hierarchy: MeshHierarchy, seed: int) -> MorphableModel:
    torch.manual_seed(seed)
    model = MODELS[name](hierarchy).eval()
    if name == "modal":
        vertices = torch.from_numpy(hierarchy.vertices[0]).float()
        meshes = vertices + 0.003 * torch.randn(100, *vertices.shape)
        model.set_statistics(meshes.mean(dim=0), torch.full_like(vertices, 0.003))
        model.autoencoder.fit_modes(lambda: [model.standardize(meshes)])
        for parameter in model.autoencoder.parameters():  # the last layers start at zero
            parameter.data.normal_(std=0.05)
    return model.freeze()


@torch.no_grad()
def main(
    num_vertices: tuple[int, ...] = (5023, 12000),
    batch_size: int = 1,
    repeat: int = 300,
    budget: float = 30.0,
    models: tuple[str, ...] = tuple(MODELS),
    threads: int = 1,
    seed: int = 0,
    output: Path = measure.RESULTS,
):
    r"""Prints and writes the table.

    Args:
        num_vertices: Sizes of templates.
        batch_size: Meshes of a call.
        repeat: Rounds of each measurement.
        budget: Seconds after which a measurement begins no further round.
        models: Names of models.
        threads: CPU threads.
        seed: Of parameters, meshes and codes.
        output: Folder of the results.
    """
    torch.set_num_threads(threads)
    rates, rows = measure.floor("cpu", CACHED), []
    for size in num_vertices:
        hierarchy = MeshHierarchy.from_template(blob(size))
        for name in models:
            model = frozen(name, hierarchy, seed)
            if compiled_decoder(model) is None:
                raise RuntimeError(f"Expected {name} to be compiled (got layers one by one)")
            network = model.autoencoder
            z = torch.randn(batch_size, model.latent_channels)
            x = model.mean + model.std * torch.randn(batch_size, *model.mean.shape)

            def decode(z: Tensor = z, model: MorphableModel = model) -> Tensor:
                return model.autoencoder.decode(z) * model.std + model.mean

            def encode(x: Tensor = x, model: MorphableModel = model) -> Tensor:
                return model.autoencoder.encode(model.standardize(x))

            ways = {
                "decode": (lambda z=z, m=model: m.decode(z), decode, decoder_plan, z),
                "encode": (lambda x=x, m=model: m.encode(x), encode, encoder_plan, x),
            }
            if compiled_encoder(model) is None:  # the modal network's searches
                del ways["encode"]
            for way, (call, by_layers, plan, example) in ways.items():
                expected = by_layers()
                spread = expected.std()
                found = measure.equal(way, call() / spread, expected / spread, 1e-5)
                steps = work(plan(model), example[0].numel())
                # A batch shares weights; what it could save is not in the floor.
                least = batch_size * sum(
                    max(operations / rates["flop_per_s"], moved / rates["bytes_per_s"])
                    for operations, moved in steps
                )
                times = measure.rounds({"one": call, "layers": by_layers}, repeat, budget, clock)
                wall, used = zip(*times["one"], strict=True)
                rows.append(
                    {
                        "vertices": size,
                        "model": name,
                        "way": way,
                        "median_seconds": statistics.median(wall),
                        "fastest_seconds": min(wall),
                        "process_seconds": statistics.median(used),
                        "layers_process_seconds": statistics.median(u for _, u in times["layers"]),
                        "floor_seconds": least,
                        "operations": batch_size * sum(operations for operations, _ in steps),
                        "bytes": batch_size * sum(moved for _, moved in steps),
                        "difference": found,
                        "parameters": sum(p.numel() for p in network.parameters()),
                    }
                )
                print(rows[-1], flush=True)
    about = report.machine("cpu") | {"batch": batch_size, "rounds": repeat, "seed": seed}
    about |= {"Gflop/s": rates["flop_per_s"] / 1e9, "GB/s": rates["bytes_per_s"] / 1e9}
    table = [
        {
            "vertices": row["vertices"],
            "model": row["model"],
            "": row["way"],
            "ms": 1000 * row["median_seconds"],
            "fastest": 1000 * row["fastest_seconds"],
            "of the process": 1000 * row["process_seconds"],
            "by layers": 1000 * row["layers_process_seconds"],
            "a second": batch_size / row["process_seconds"],
            "floor": 1000 * row["floor_seconds"],
            "times floor": row["process_seconds"] / row["floor_seconds"],
            "Mflop": row["operations"] / 1e6,
            "MB": row["bytes"] / 1e6,
            "difference": row["difference"],
        }
        for row in rows
    ]
    tables = {"One mesh" if batch_size == 1 else f"{batch_size} meshes": table}
    print(report.write(output, "one_mesh", report.command(), rows, tables, about, NOTES))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
