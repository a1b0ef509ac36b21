r"""What ships after training, with frozen attention and with QEM: parameters, sizes of the files,
differences to eager, and, once equality holds, the time of inference in every form as a ratio of
medians of interleaved runs:

    python -m benchmarks.speed.export
"""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import tyro
from torch import Tensor

from benchmarks import report
from benchmarks.speed import measure
from benchmarks.speed.templates import blob, random_model
from pyg_attnpool import MorphableModel
from pyg_attnpool.export import export_onnx, export_torch
from pyg_attnpool.mesh import MeshHierarchy

MODELS = {
    "modal": MorphableModel.modal,
    "CoMA": MorphableModel.coma,
    "Neural3DMM": MorphableModel.neural3dmm,
}
POOLS = {"qem": "QEM", "attention": "frozen attention"}
NOTES = (
    "Whole models, meshes in and out. Numbers after the size of a file are its largest difference "
    "to eager, relative to the largest output.",
    "eager: of a model loaded from its folder. torch.export, ONNX: time over that of eager.",
    "attention / QEM: frozen attention in eager, over its QEM twin.",
    "Weights are random: time and size depend on the architecture alone.",
)


@torch.no_grad()
def main(
    num_vertices: int = 5023,
    batch_sizes: tuple[int, ...] = (1, 16),
    threads: tuple[int, ...] = (1, 2),
    repeat: int = 31,
    output: Path = measure.RESULTS,
):
    r"""Writes models in every form, runs them from there, and prints and stores the tables.

    Args:
        num_vertices: Size of the template.
        batch_sizes: Meshes of a call.
        threads: Of PyTorch and of onnxruntime.
        repeat: Rounds of every measurement, within a minute.
        output: Folder of the results.
    """
    hierarchy = MeshHierarchy.from_template(blob(num_vertices))
    x = torch.from_numpy(hierarchy.vertices[0]).float() + 0.003 * torch.randn(
        max(batch_sizes), num_vertices, 3, generator=torch.Generator().manual_seed(0)
    )
    files, times, rows = [], [], []
    for (name, make), num_threads in product(MODELS.items(), threads):
        torch.set_num_threads(num_threads)
        runs: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
        for pool, label in POOLS.items():
            torch.manual_seed(0)
            model = random_model(make(hierarchy, pool=pool), hierarchy).eval()
            trained = model.num_parameters
            model.freeze()
            forms, shipped = ship(model, x, num_threads)
            runs |= {(pool, form): run for form, run in forms.items()}
            if num_threads == threads[0]:
                about_model = {"model": name, "aggregation": label}
                numbers = {"trained": f"{trained:,}", "shipped": f"{model.num_parameters:,}"}
                files.append(about_model | numbers | shipped)
        for size in batch_sizes:
            calls = {key: partial(run, x[:size]) for key, run in runs.items()}
            found = measure.interleaved(calls, repeat, budget=60.0)
            rows += [
                {"model": name, "pool": p, "form": f, "threads": num_threads, "batch": size, "s": s}
                for (p, f), s in found.items()
            ]
            row: dict[str, Any] = {"model": name, "threads": num_threads, "batch": size}
            for pool, label in POOLS.items():
                eager = found[pool, "eager"]
                row[f"eager, {label}"] = f"{1000 * eager:.1f} ms"
                for form in ("torch.export", "ONNX"):
                    row[f"{form}, {label}"] = f"{found[pool, form] / eager:.2f}"
            row["attention / QEM"] = f"{found['attention', 'eager'] / found['qem', 'eager']:.2f}"
            times.append(row)
            print(row, flush=True)
    about = report.machine("cpu") | {"vertices": num_vertices, "seed": 0}
    about.pop("threads")
    tables = {"Files": files, "Time": times}
    print(report.write(output, "export", report.command(), rows, tables, about, NOTES))


def ship(
    model: MorphableModel, x: Tensor, num_threads: int
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    r"""Writes the model in every form. Returns what runs it again from there, and the sizes."""
    with tempfile.TemporaryDirectory() as folder:
        saved, pt2, onnx = (Path(folder) / name for name in ("model", "model.pt2", "model.onnx"))
        model.save(saved)
        differences = {"torch.export": export_torch(model, x, pt2)}
        differences["ONNX"] = export_onnx(model, x, onnx)
        loaded = MorphableModel.load(saved).eval()
        assert torch.equal(loaded(x), model(x))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        program = torch.export.load(pt2).module()
        sizes = {"folder": f"{sum(f.stat().st_size for f in saved.iterdir()) / 1e6:.2f} MB"}
        for (form, difference), path in zip(differences.items(), (pt2, onnx), strict=True):
            sizes[form] = f"{path.stat().st_size / 1e6:.2f} MB, {difference:.1e}"
    forms = {
        "eager": loaded,
        "torch.export": program,
        "ONNX": lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),
    }
    return forms, sizes


if __name__ == "__main__":
    tyro.cli(main)
