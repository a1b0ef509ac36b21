r"""Peak memory of an epoch over more meshes than one would hold: they are made and written block by
block, mapped, and read in shuffled blocks. What counts is anonymous memory; pages of the mapped
file are counted to the process too, but the system takes them back when it needs them.

Beside the defaults, 40,000 meshes as those of bodies: `--meshes 40000 --vertices 6890`."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

from benchmarks import report
from benchmarks.speed import measure
from benchmarks.speed.templates import blob
from pyg_attnpool.datasets import MeshDataset
from pyg_attnpool.datasets.cache import stored
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models import MorphableModel

BLOCK = 100


class Smooth:
    # Random shapes of 16 smooth modes, as source of a stored data set.
    def __init__(self, num_meshes: int, num_vertices: int):
        self.template = blob(num_vertices)
        self.sizes = [min(BLOCK, num_meshes - i) for i in range(0, num_meshes, BLOCK)]
        self.labels = {}
        rng = np.random.default_rng(0)
        vertices = self.template[0] / np.abs(self.template[0]).max()
        waves = np.sin(vertices @ rng.normal(0, 2, (3, 16)) + rng.uniform(0, 6, 16))
        self.modes = 0.005 * np.einsum("nk,kd->knd", waves, rng.standard_normal((16, 3)))

    def blocks(self, start: int) -> Iterator[ndarray]:
        for i, size in enumerate(self.sizes[start:], start):
            weights = np.random.default_rng([0, i]).standard_normal((size, 16))
            yield self.template[0] + np.einsum("mk,knd->mnd", weights, self.modes)


class Memory:
    # The highest of anonymous and of all memory of this process since the last look, in MiB.
    def __init__(self):
        self.highest = {"RssAnon": 0.0, "VmRSS": 0.0}
        self.rows: list[dict[str, object]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            status = Path("/proc/self/status").read_text()
            values = dict(line.split(":", 1) for line in status.splitlines())
            for key in self.highest:
                self.highest[key] = max(self.highest[key], int(values[key].split()[0]) / 1024)
            time.sleep(0.02)

    def look(self, what: str, seconds: float):
        time.sleep(0.05)
        anonymous, everything = self.highest.values()
        print(
            f"{what:24}{seconds:8.1f} s   anonymous {anonymous:7,.0f} MiB   with mapped pages "
            f"{everything:7,.0f} MiB",
            flush=True,
        )
        self.rows.append(
            {
                "part": what,
                "seconds": seconds,
                "anonymous MiB": anonymous,
                "with mapped pages MiB": everything,
            }
        )
        self.highest = dict.fromkeys(self.highest, 0.0)


def main(
    meshes: int = 100_000,
    vertices: int = 1609,
    batch_size: int = 16,
    output: Path = measure.RESULTS,
):
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        torch.manual_seed(0)
        source = Smooth(meshes, vertices)
        hierarchy = MeshHierarchy.from_template(source.template)
        model = MorphableModel.coma(hierarchy)
        memory.look("Imports and model", time.perf_counter() - begin)

        begin = time.perf_counter()
        path = Path(folder) / "smooth.npz"
        arrays = stored(path, {"meshes": meshes}, lambda: source, "Writing")
        dataset = MeshDataset(
            torch.from_numpy(arrays["vertices"]), (arrays["template"], arrays["faces"])
        )
        memory.look("Writing and verifying", time.perf_counter() - begin)
        size = path.with_suffix(".npy").stat().st_size / 2**20
        print(f"{meshes:,} meshes of {vertices:,} vertices: {size:,.0f} MiB")

        begin = time.perf_counter()
        split = dataset.split("independent")
        train, val, test = (dataset[part] for part in split)
        run = Path(folder) / "run"
        model.fit(train, val, output=run, epochs=1, batch_size=batch_size, accelerator="cpu")
        memory.look("Statistics and an epoch", time.perf_counter() - begin)

        begin = time.perf_counter()
        error = model.evaluate(test)["mean"]
        memory.look("Test", time.perf_counter() - begin)
        print(f"Test error {error:.3f} mm")
    about = report.machine("cpu") | {
        "meshes": meshes,
        "vertices": vertices,
        "file MiB": round(size),
        "batch": batch_size,
        "seed": 0,
    }
    note = "The system takes mapped pages back when it needs them; anonymous memory is held."
    tables = {"Peak memory": memory.rows}
    print(report.write(output, "streaming", report.command(), memory.rows, tables, about, [note]))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
