r"""Fits to what is known of meshes that no model has seen, by models of the same size and steps:
completion from a part of the vertices, from landmarks, and from scans.

    python benchmarks/fits.py --data faces bodies hands --seeds 0 1 2

The error is the distance of every vertex to where it is in truth, in millimetres, also where
nothing was observed. "reconstruction" is what the encoder makes of the whole mesh. A scan has one
side of the surface (what a camera in front sees), vertices and faces of its own, normal noise of
0.5 mm, and is turned by up to 60 degrees and moved by about a metre; nothing tells its pose.
"""

import csv
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import tyro
from numpy import ndarray
from scipy.spatial.transform import Rotation
from torch import Tensor

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces, AnnyHands
from pyg_attnpool.files import replacing
from pyg_attnpool.mesh import decimate
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.training import quiet_lightning

DATA = {"faces": AnnyFaces, "bodies": AnnyBodies, "hands": AnnyHands}
POOLS = ("attention", "qem", "pca")
BATCH_SIZE = 16
NOISE = 0.0005  # metres, of a scan


@dataclass
class Options:
    data: tuple[Literal["faces", "bodies", "hands"], ...] = ("faces",)
    seeds: tuple[int, ...] = (0,)
    """Of the training and of what is observed."""
    latent: int = 8
    """Latent channels, and components of PCA."""
    steps: int = 400
    """Training steps of attention and QEM."""
    meshes: int = 20
    """Test meshes, evenly spread."""
    scans: int = 6
    """Those of them that a scan is made of."""
    noise: float = 0.001
    """The noise of the fits in metres."""
    root: Path = Path("data")
    """Folder of the data sets."""
    output: Path = Path("runs") / "fits"
    """Folder for the models and results.csv; models that are there are not trained again."""


def main(options: Options):
    quiet_lightning()
    rows = []
    for data in options.data:
        dataset = DATA[data](options.root / DATA[data].__name__)
        parts = dataset.split()
        train, val, test = (dataset.read(part) for part in parts)
        test = test[torch.linspace(0, len(test) - 1, min(options.meshes, len(test))).long()]
        hierarchy = MeshHierarchy.from_template(
            dataset.template, cache=options.root / "hierarchies"
        )
        for seed in options.seeds:
            for pool in POOLS:
                folder = options.output / f"{data}_{pool}_{options.latent}_{options.steps}_{seed}"
                model = trained(folder, hierarchy, pool, train, val, seed, options)
                for case, error, seconds in measured(model, test, seed, options):
                    mean, worst = error.mean().item(), error.mean(dim=1).max().item()
                    rows.append(
                        {
                            **{"data": data, "seed": seed, "model": pool, "case": case},
                            **{"mean": mean, "median": error.median().item(), "worst": worst},
                            **{"meshes": len(error), "seconds": seconds / len(error)},
                        }
                    )
                    print(
                        f"{data} {seed} {pool:10}{case:16}{mean:8.3f} mm, worst mesh {worst:8.3f} "
                        f"mm, {seconds / len(error):.2f} s a mesh",
                        flush=True,
                    )
    with (
        replacing(options.output / "results.csv") as path,
        open(path, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))


def trained(
    folder: Path,
    hierarchy: MeshHierarchy,
    pool: str,
    train: Tensor,
    val: Tensor,
    seed: int,
    options: Options,
) -> MorphableModel:
    if folder.exists():
        return MorphableModel.load(folder)
    if pool == "pca":
        model = MorphableModel.pca(hierarchy, options.latent).fit(train)
    else:
        torch.manual_seed(seed)
        model = MorphableModel.coma(hierarchy, options.latent, pool)
        epochs = -(-options.steps * BATCH_SIZE // len(train))
        model.fit(train, val, epochs=epochs, batch_size=BATCH_SIZE, seed=seed, freeze=True)
    model.cpu().save(folder)
    return model


@torch.no_grad()
def measured(
    model: MorphableModel, test: Tensor, seed: int, options: Options
) -> Iterator[tuple[str, Tensor, float]]:
    r"""What was observed, the errors :obj:`[M, N]` of the meshes, and the seconds of all."""
    n = model.num_vertices
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=chance)
    # One side of the body, about the middle of the template's longest horizontal axis.
    sides = model.template[:, [0, 2]]
    across = sides[:, sides.std(dim=0).argmax()]

    def timed(fit: Callable[[], Tensor], truth: Tensor) -> tuple[Tensor, float]:
        start = time.perf_counter()
        found = fit()
        seconds = time.perf_counter() - start
        return vertex_distances(found, truth), seconds

    def completed(known: Tensor) -> Callable[[], Tensor]:
        return lambda: model.fit_to(test, weight=known, noise=options.noise).mesh

    yield "reconstruction", *timed(lambda: model(test), test)
    for percent in (5, 10, 25, 50):
        known = torch.zeros(n)
        known[order[: n * percent // 100]] = 1
        yield f"{percent} % of vertices", *timed(completed(known), test)
    yield "one half", *timed(completed((across > across.median()).float()), test)
    marks = torch.zeros(n)
    marks[farthest(model.template, 20)] = 1
    yield "20 landmarks", *timed(completed(marks), test)
    rng = np.random.default_rng(seed)
    if options.scans < 1:
        return
    errors, seconds = [], 0.0
    for mesh in test[torch.linspace(0, len(test) - 1, min(options.scans, len(test))).long()]:
        vertices, faces, rotation, translation = scan(mesh, model.faces.numpy(), rng)
        truth = mesh @ rotation.t() + translation
        error, took = timed(
            lambda s=(vertices, faces): model.fit_to(s, noise=options.noise).mesh, truth
        )
        errors.append(error)
        seconds += took
    yield "partial scan", torch.stack(errors), seconds


def farthest(x: Tensor, num: int) -> list[int]:
    r"""Vertices that are far from each other."""
    chosen = [0]
    distance = (x - x[0]).norm(dim=1)
    while len(chosen) < num:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).norm(dim=1))
    return chosen


def scan(
    mesh: Tensor, faces: ndarray, rng: np.random.Generator
) -> tuple[ndarray, ndarray, Tensor, Tensor]:
    r"""A scan of the front of a mesh, and the rotation and translation that it was moved by."""
    vertices = mesh.double().numpy()
    # Vertices of its own: a random point in every face, then as many as before by decimation.
    weight = rng.dirichlet(np.full(3, 3.0), len(faces))
    inside = (weight[:, :, None] * vertices[faces]).sum(axis=1)
    (a, b, c), d = faces.T, len(vertices) + np.arange(len(faces))
    split = np.concatenate([np.stack(t, axis=1) for t in ((a, b, d), (b, c, d), (c, a, d))])
    ((kept, faces),) = decimate(np.concatenate([vertices, inside]), split, [len(vertices)])
    vertices = np.concatenate([vertices, inside])[kept]
    # A camera at z sees faces that look at it and have nothing within a cell of 4 mm before them.
    corners = vertices[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    middle = corners.mean(axis=1)
    _, cell = np.unique(np.floor(middle[:, :2] / 0.004).astype(int), axis=0, return_inverse=True)
    front = np.full(cell.max() + 1, -np.inf)
    np.maximum.at(front, cell.ravel(), middle[:, 2])
    faces = faces[(normal[:, 2] > 0.15) & (middle[:, 2] > front[cell.ravel()] - 0.008)]
    used = rng.permutation(np.unique(faces))
    place = np.empty(len(vertices), dtype=np.int64)
    place[used] = np.arange(len(used))
    points = vertices[used] + NOISE * rng.normal(size=(len(used), 3))
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(rng.uniform(0, np.pi / 3) * axis / np.linalg.norm(axis)).as_matrix()
    shift = rng.normal(size=3)
    moved = points @ turn.T + shift
    return moved, place[faces], torch.from_numpy(turn).to(mesh), torch.from_numpy(shift).to(mesh)


def table(rows: list[dict]) -> str:
    r"""Means over seeds in Markdown: a row for every case, a column for every model."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        lines += [
            f"\n{data}: mean error in mm\n",
            f"| | {' | '.join(POOLS)} |",
            "|---|---|---|---|",
        ]
        for case in dict.fromkeys(row["case"] for row in mine):
            means = []
            for pool in POOLS:
                values = [r["mean"] for r in mine if (r["case"], r["model"]) == (case, pool)]
                means.append(f"{np.mean(values):.3f}")
            lines.append(f"| {case} | {' | '.join(means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description="Errors of fits to a part of a mesh, landmarks and scans."))
