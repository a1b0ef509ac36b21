r"""What ships after training: CoMA with frozen attention beside its QEM twin. Parameters, sizes of
the files, differences to eager, and, once equality holds, the time of inference as a ratio of
medians of interleaved runs."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from benchmarks.speed import measure
from benchmarks.speed.templates import blob
from pyg_attnpool import MorphableModel
from pyg_attnpool.export import export_onnx, export_torch
from pyg_attnpool.mesh import MeshHierarchy


@torch.no_grad()
def main(num_vertices: int = 5023, batch_size: int = 1, repeat: int = 31):
    hierarchy = MeshHierarchy.from_template(blob(num_vertices))
    x = 0.1 * torch.randn(batch_size, num_vertices, 3)
    print(f"{num_vertices} vertices, batch {batch_size}, {torch.get_num_threads()} threads")
    runs: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    for pool in ("qem", "attention"):
        torch.manual_seed(0)
        model = MorphableModel.coma(hierarchy, pool=pool).eval()
        training = model.num_parameters
        shipped = model.freeze().num_parameters
        print(f"{pool}: {training:,} parameters in training, {shipped:,} shipped")
        runs[pool] = ship(model, x)

    for form in runs["qem"]:
        both = {pool: partial(forms[form], x) for pool, forms in runs.items()}
        qem, attention = measure.interleaved(both, repeat, budget=60.0).values()
        print(
            f"{form}: frozen attention takes {attention / qem:.2f} times as long as its QEM twin "
            f"({1000 * attention:.1f} and {1000 * qem:.1f} ms)"
        )


def ship(model: MorphableModel, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    r"""Writes the model in every form, and returns what runs it again from there."""
    with tempfile.TemporaryDirectory() as folder:
        saved, pt2, onnx = (Path(folder) / name for name in ("model", "model.pt2", "model.onnx"))
        model.save(saved)
        differences = {"saved": 0.0}
        differences["torch.export"] = export_torch(model, x, pt2)
        differences["ONNX"] = export_onnx(model, x, onnx)
        loaded = MorphableModel.load(saved).eval()
        assert torch.equal(loaded(x), model(x))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        program = torch.export.load(pt2).module()
        for (form, difference), path in zip(differences.items(), (saved, pt2, onnx), strict=True):
            size = sum(f.stat().st_size for f in path.iterdir()) if path == saved else None
            size = path.stat().st_size if size is None else size
            print(f"  {form}: {size / 2**20:.2f} MiB, largest relative difference {difference:.1e}")
            if path == saved:
                for file in sorted(saved.iterdir()):
                    print(f"    {file.name}: {file.stat().st_size / 2**20:.2f} MiB")
    return {
        "eager": loaded,
        "torch.export": program,
        "ONNX": lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),
    }


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
