r"""Times of fits and edits of one mesh, on one thread, with the models of the package."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from benchmarks import report
from benchmarks.speed import measure
from pyg_attnpool import MorphableModel
from pyg_attnpool.mesh.normals import vertex_normals
from pyg_attnpool.metrics import vertex_distances

NAMES = ("faces", "faces-32", "hands", "hands-32", "bodies", "bodies-32")
NOISE = 0.001  # metres, of all that is observed
NOTES = (
    "Medians of interleaved rounds, each on another mesh that is sampled from the model, with "
    "normal noise of 1 mm.",
    "Edit: one vertex by 5 mm along its normal; kept: half of the vertices held back meanwhile.",
    "Scan: vertices and faces of the mesh itself, turned by 30 degrees and moved by half a metre, "
    "in a pose that nothing tells.",
    "Error: the mean distance of vertices to where they are in truth; of an edit, of the vertex "
    "to where it was moved.",
)


def cases(model: MorphableModel, seed: int) -> dict[str, Callable[[], torch.Tensor]]:
    r"""What is timed: calls that give the distances of a fit from what it is to be."""
    generator = torch.Generator().manual_seed(seed)
    x = model.sample(1, generator=generator)[0]
    seen = x + NOISE * torch.randn(x.shape, generator=generator)
    normal = torch.from_numpy(vertex_normals(x.double().numpy(), model.faces.numpy())).float()
    vertex = int(torch.randint(len(x), (), generator=generator))
    target = x[vertex] + 0.005 * normal[vertex]
    some = torch.rand(len(x), generator=generator) < 0.05
    marks = {int(i): seen[i] for i in torch.randperm(len(x), generator=generator)[:20]}
    half = x[:, 1] < x[vertex, 1] - 0.01
    half = half if half.any() else x[:, 1] > x[vertex, 1] + 0.01
    turn = torch.from_numpy(Rotation.from_rotvec([0, np.radians(30), 0]).as_matrix()).float()
    moved = seen @ turn.t() + 0.5

    def edited(keep: torch.Tensor | None) -> torch.Tensor:
        return vertex_distances(model.edit(x, {vertex: target}, keep).mesh[vertex], target)

    def fitted(truth: torch.Tensor, *observations: Any, **kwargs: Any) -> torch.Tensor:
        return vertex_distances(model.fit_to(*observations, **kwargs).mesh, truth)

    scan = moved.numpy(), model.faces.numpy()
    return {
        "edit": lambda: edited(None),
        "edit, half kept": lambda: edited(half),
        "5 % of vertices": lambda: fitted(x, seen, weight=some),
        "20 landmarks": lambda: fitted(x, landmarks=marks),
        "scan": lambda: fitted(x @ turn.t() + 0.5, scan),
    }


def main(
    models: tuple[str, ...] = NAMES,
    repeat: int = 5,
    threads: int = 1,
    output: Path = measure.RESULTS,
) -> None:
    r"""Prints and writes the table.

    Args:
        models: Names of models that come with the package.
        repeat: Rounds of each measurement.
        threads: CPU threads.
        output: Folder of the results.
    """
    torch.set_num_threads(threads)
    rows = []
    for name in models:
        model = MorphableModel.from_pretrained(name)
        times: dict[str, list[float]] = {}
        errors: dict[str, list[float]] = {}
        for seed in range(-1, repeat):  # the first round is none that counts
            for case, call in cases(model, abs(seed)).items():
                found: list[torch.Tensor] = []
                second = measure.seconds(lambda call=call, found=found: found.append(call()))
                if seed >= 0:
                    times.setdefault(case, []).append(second)
                    errors.setdefault(case, []).append(found[0].mean().item())
        for case, taken in times.items():
            row = {"model": name, "observed": case, "ms": 1000 * statistics.median(taken)}
            rows.append(row | {"error (mm)": statistics.median(errors[case])})
            print(rows[-1], flush=True)
    about = report.machine("cpu") | {"rounds": repeat}
    tables = {"Fits and edits": rows}
    print(report.write(output, "fits", report.command(), rows, tables, about, NOTES))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
