r"""This checkout against another one, operation by operation: a process for each, in turn, after
both have computed the same. Shows what a change has made slower."""

import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTES = (
    "Milliseconds of a call and the ratio of this checkout to the other, medians over rounds in "
    "which both run one after the other. Wall-clock time and the time of all processors.",
    "Difference: of the outputs, relative to the largest magnitude.",
)


class Checkout:
    r"""A process that imports the package of a checkout and times calls on request."""

    def __init__(self, root: Path, num_vertices: int, batch_size: int, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, (num_vertices, batch_size, threads))],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.file = self._line()
        if Path(self.file).parents[1].resolve() != root.resolve():
            raise ValueError(f"Expected the package of {root} (got {self.file})")

    def _line(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"Expected an answer of the process (got exit {self.process.wait()})")
        return json.loads(line)

    def ask(self, what: str, name: str = "") -> Any:
        assert self.process.stdin is not None
        print(what, name, sep="\t", file=self.process.stdin, flush=True)
        return self._line()


def operations(num_vertices: int, batch_size: int) -> dict[str, Callable[[], Any]]:
    r"""What is timed, by name. Each returns a tensor or an array that both must agree in."""
    import numpy as np
    import torch

    import pyg_attnpool
    from pyg_attnpool import (
        AttentionPool,
        AttentionUnpool,
        MappingPool,
        MeshHierarchy,
        SpiralConv,
        StaticChebConv,
        models,
    )
    from pyg_attnpool.mesh import spiral_sequences
    from pyg_attnpool.training import keep_freed_memory

    # As `models.coma` stood before version 0.2, published settings were the only ones.
    published = {"variant": "published"}
    if "variant" not in inspect.signature(models.coma).parameters:
        published = {}

    def start(layer: Any) -> Any:
        return getattr(layer, "published", layer)

    freeze = getattr(pyg_attnpool, "freeze", None) or pyg_attnpool.freeze_attention

    keep_freed_memory()
    shape = _blob(num_vertices)
    hierarchy = MeshHierarchy.from_template(shape)
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: torch.Tensor) -> torch.Tensor:
        return 0.1 * torch.randn(tensor.shape, generator=generator)

    def seeded(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for name, p in sorted(module.named_parameters()):
                p.copy_(torch.full_like(p, 0.2) if "fusion" in name else random_like(p))
        return module

    x = torch.randn(batch_size, num_vertices, 3, generator=generator)
    found: dict[str, Callable[[], Any]] = {
        "hierarchy": lambda: MeshHierarchy.from_template(shape).num_vertices,
        "spirals, 2 hops": lambda: np.asarray(spiral_sequences(*shape, hops=2))[:, :7],
    }

    def add_step(name: str, model: torch.nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x).abs().mean()
            loss.backward()
            optimizer.step()
            return loss

        found[f"{name}, training step"] = step

    def inference(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with torch.no_grad():
                return module(x)

        return call

    def training(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            module.zero_grad()
            out = module(x.requires_grad_())
            out.backward(torch.ones_like(out))
            return out

        return call

    for name, make in {"CoMA": models.coma, "Neural3DMM": models.neural3dmm}.items():
        for pool in ("qem", "attention"):
            add_step(f"{name}, {pool}", seeded(make(hierarchy, pool, **published)))
        frozen = seeded(make(hierarchy, "attention", **published)).eval()
        freeze(frozen)
        found[f"{name}, frozen, reconstruction"] = inference(frozen, x)
        found[f"{name}, frozen, one mesh"] = inference(frozen, x[:1])

    coarse = hierarchy.num_vertices[1]
    fine_features = torch.randn(batch_size, num_vertices, 16, generator=generator)
    coarse_features = torch.randn(batch_size, coarse, 16, generator=generator)
    edges = torch.as_tensor(hierarchy.edge_index(0))
    layers = {
        "AttentionPool": (
            start(AttentionPool)(num_vertices, coarse, prior=hierarchy.down[0]),
            fine_features,
        ),
        "AttentionUnpool": (
            start(AttentionUnpool)(coarse, num_vertices, prior=hierarchy.up[0]),
            coarse_features,
        ),
        "MappingPool": (MappingPool(hierarchy.down[0]), fine_features),
        "MappingPool up": (MappingPool(hierarchy.up[0]), coarse_features),
        "StaticChebConv": (StaticChebConv(16, 16, 6, edges, num_vertices), fine_features),
        "SpiralConv": (SpiralConv(16, 16, hierarchy.spirals(0)), fine_features),
    }
    for name, (layer, features) in layers.items():
        found[f"{name}, forward"] = inference(seeded(layer), features)
        found[f"{name}, forward and backward"] = training(layer, features.clone())
    return found


def _blob(num_vertices: int) -> Any:
    # Both checkouts get the template of this one, whatever stands in theirs.
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "templates", Path(__file__).parent / "templates.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.blob(num_vertices)


def serve(num_vertices: int, batch_size: int, threads: int) -> None:
    r"""The process of a checkout: answers requests, a line each."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import numpy as np
    import torch

    import pyg_attnpool

    torch.set_num_threads(threads)
    print(json.dumps(pyg_attnpool.__file__), file=answers, flush=True)
    found = operations(num_vertices, batch_size)
    for line in sys.stdin:
        what, name = line.rstrip("\n").split("\t")
        answer: Any
        if what == "names":
            answer = list(found)
        elif what == "values":
            out = found[name]()
            out = out.detach() if isinstance(out, torch.Tensor) else out
            answer = np.asarray(out, dtype=np.float64).ravel()[:5000].tolist()
        else:
            start, spent = time.perf_counter(), time.process_time()
            found[name]()
            answer = (time.perf_counter() - start, time.process_time() - spent)
        print(json.dumps(answer), file=answers, flush=True)


def main(
    other: Path,
    num_vertices: int = 5023,
    batch_size: int = 16,
    repeat: int = 31,
    threads: int = 1,
    output: Path = ROOT / "benchmarks" / "results" / "speed",
):
    r"""Prints and writes the table.

    Args:
        other: The root of the other checkout, its libraries built in place.
        num_vertices: Vertices of the template; each coarser level has a quarter.
        batch_size: Meshes per step.
        repeat: Rounds of each measurement.
        threads: CPU threads.
        output: Folder of the results.
    """
    import numpy as np

    from benchmarks import report

    roots = {"this": ROOT, "other": other.resolve()}
    checkouts = {
        key: Checkout(root, num_vertices, batch_size, threads) for key, root in roots.items()
    }
    rows: list[dict[str, Any]] = []
    for name in checkouts["this"].ask("names"):
        values = [np.array(each.ask("values", name)) for each in checkouts.values()]
        difference = np.abs(values[0] - values[1]).max() / np.abs(values[1]).max()
        if not difference < 1e-4:
            raise ValueError(f"Expected both to agree in {name} (got {difference:.1e})")
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in checkouts}
        for number in range(repeat):
            order = list(checkouts)
            random.Random(number).shuffle(order)
            for key in order:
                times[key].append(checkouts[key].ask("time", name))
        row: dict[str, Any] = {"operation": name}
        for i, clock in enumerate(("wall", "processors")):
            ms = {key: [1000 * t[i] for t in times[key]] for key in checkouts}
            ratios = [a / b for a, b in zip(ms["this"], ms["other"], strict=True)]
            row |= {
                f"this, {clock} (ms)": statistics.median(ms["this"]),
                f"other, {clock} (ms)": statistics.median(ms["other"]),
                f"ratio, {clock}": statistics.median(ratios),
            }
        rows.append(row | {"difference": float(difference)})
        print(rows[-1], flush=True)
    about = report.machine("cpu") | {
        "threads": threads,
        "vertices": num_vertices,
        "batch": batch_size,
        "rounds": repeat,
    }
    print(report.write(output, "checkouts", report.command(), rows, {"Ratios": rows}, about, NOTES))


if __name__ == "__main__":
    if len(sys.argv) == 4 and all(argument.isdigit() for argument in sys.argv[1:]):
        serve(*map(int, sys.argv[1:]))
    else:
        import tyro

        tyro.cli(main)
