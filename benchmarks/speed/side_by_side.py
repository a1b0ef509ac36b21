r"""Whether trainings get done sooner side by side than one by one: the time of a sweep over four
seeds by the number of its jobs."""

import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.paper.data import Meshes
from benchmarks.paper.experiment import Experiment, Setting, spectral
from benchmarks.paper.options import Options
from benchmarks.paper.sweep import sweep
from benchmarks.speed import measure


def main(
    data: str = "faces",
    jobs: tuple[int, ...] = (1, 2, 4),
    steps: int = 284,
    device: str = "cpu",
    output: Path = measure.RESULTS,
):
    r"""Trains CoMA with attention and prints how long it takes, the start of processes included.

    Args:
        data: Faces, bodies or hands.
        jobs: Numbers of trainings side by side.
        steps: Steps of a training, to be rounded up to whole epochs.
        device: Cpu or cuda.
        output: Folder of the results.
    """
    table = {"attention": {"error": Setting(spectral("attention"))}}
    experiment = Experiment("side_by_side", "Four trainings", "", table, rows="pooling")
    Meshes(data, Options())  # made once, which is not to be timed
    rows = []
    for number in jobs:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(
                data=(data,),
                seeds=(0, 1, 2, 3),
                steps=steps,
                device=device,
                jobs=number,
                output=Path(folder),
            )
            start = time.perf_counter()
            found = sweep(experiment, options)[data]["attention"]["error"]
            rows.append({"jobs": number, "seconds": time.perf_counter() - start})
            rows[-1]["times faster"] = rows[0]["seconds"] / rows[-1]["seconds"]
            # Sums of other numbers of threads round otherwise, and no more may differ.
            rows[-1]["mean error (mm)"] = found.mean()
    about = report.machine(device) | {"data": data, "steps": found.steps}
    tables = {"Four trainings": rows}
    print(report.write(output, "side_by_side", report.command(), rows, tables, about))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
