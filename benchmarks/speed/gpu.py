r"""Everything that needs a GPU, in one command of under ten minutes, with nothing but the core
dependencies and PyTorch Lightning: the speed scripts, the search against `torch.matmul` and
`torch.topk`, training at COMA's scale, and training in half precision. What a budget cuts off is
said in the tables."""

import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from benchmarks.speed import measure, ops, scaling, training
from pyg_attnpool.models import MorphableModel
from pyg_attnpool.ops.search import cosine_topk
from pyg_attnpool.training import quiet_lightning


def search(num_query: int, num_key: int, device: str, channels: int = 21, k: int = 32):
    r"""The search against all scores at once."""
    torch.manual_seed(0)
    query, key = (torch.randn(n, channels, device=device) for n in (num_query, num_key))

    def ours() -> Tensor:
        return cosine_topk(query, key, k)

    def full() -> Tensor:
        score = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).t()
        return score.topk(k, dim=-1).indices

    share = measure.equal_topk("the search", ours(), query, key)
    seconds = measure.interleaved({"ours": ours, "full": full}, 9, 60.0)
    memory = {f.__name__: measure.peak_memory(f, device) for f in (ours, full)}
    return {
        "queries": num_query,
        "keys": num_key,
        "ours ms": 1000 * seconds["ours"],
        "matmul + topk, times ours": seconds["full"] / seconds["ours"],
        "ours MiB": memory["ours"] / 2**20,
        "its MiB": memory["full"] / 2**20,
        "keys that gaps determine": share,
    }


def train(num_meshes: int, num_vertices: int, precision: str, epochs: int, device: str):
    r"""Whole epochs as `fit` runs them, on smooth deformations of a template."""
    hierarchy = scaling.hierarchy(num_vertices, 0)
    waves = scaling.Waves(hierarchy.vertices[0], 0)
    x = torch.cat([waves.sample(64, 3) for _ in range(-(-num_meshes // 64) + 1)])
    x = torch.from_numpy(hierarchy.vertices[0]).float() + 0.01 * x
    train, val = x[:num_meshes], x[-64:]
    torch.manual_seed(0)
    model = MorphableModel.coma(hierarchy)
    options = dict(accelerator=device, precision=precision)
    start = time.perf_counter()  # the first run compiles
    copy.deepcopy(model).fit(train, val, epochs=1, **options)
    middle = time.perf_counter()
    model.fit(train, val, epochs=epochs, **options)
    epoch = (time.perf_counter() - middle) / epochs
    return {
        "precision": precision,
        "meshes": num_meshes,
        "vertices": hierarchy.num_vertices[0],
        "first epoch s": middle - start,
        "an epoch s": epoch,
        "300 epochs min": 5 * epoch,
        "mm": model.evaluate(val)["mean"],
    }


def main(output: Path = measure.RESULTS):
    quiet_lightning()
    tables = {"Search": [search(100_000, 25_000, "cuda")]}
    print(tables, flush=True)
    # COMA's number of meshes and vertices.
    tables["Training"] = [
        train(20_465, 5023, precision, 3, "cuda") for precision in ("32-true", "bf16-mixed")
    ]
    rows = [row for table in tables.values() for row in table]
    about = report.machine("cuda") | {"batch": 16, "seed": 0}
    print(report.write(output, "gpu", report.command(), rows, tables, about), flush=True)
    training.main(device="cuda", budget=10.0, output=output)
    ops.main(device="cuda", budget=5.0, output=output)
    scaling.main(device="cuda", budget=15.0, output=output)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
