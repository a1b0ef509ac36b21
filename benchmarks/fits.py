r"""Fits to what is known of meshes that no model has seen, by models of the same size and steps:
completion from a part of the vertices, from landmarks, and from scans.

    python -m benchmarks.fits --data faces bodies hands --seeds 0 1 2

The error is the distance of every vertex to where it is in truth, in millimetres, also where
nothing was observed. "reconstruction" is what the encoder makes of the whole mesh. A scan has one
side of the surface (what a camera in front sees), vertices and faces of its own, normal noise of
0.5 mm, and is turned by up to 60 degrees and moved by about a metre; nothing tells its pose. The
noise that a fit expects is the root mean square, per coordinate, of what the model leaves of
validation meshes: its own error is most of it.

A finished case is a line of :obj:`fits.csv` in the folder of results, on the disk before the next
one begins. A call into the same folder goes on where the last one ended, and writes the table
:obj:`fits.md` of all that is there of the same sizes.
"""

import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from numpy import ndarray
from scipy.spatial.transform import Rotation
from torch import Tensor

from benchmarks import report
from benchmarks.peers.rows import append_row, read_rows
from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces, AnnyHands
from pyg_attnpool.mesh import decimate
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.training import epochs_for, quiet_lightning

DATA = {"faces": AnnyFaces, "bodies": AnnyBodies, "hands": AnnyHands}
MODELS = {"modal": "modal", "attention": "CoMA, learned", "qem": "CoMA, QEM", "pca": "PCA"}
BATCH_SIZE = 16
NOISE = 0.0005  # metres, of a scan
SHARES = (5, 10, 25, 50)  # percent of the vertices
LANDMARKS = 20
CASES = (
    "reconstruction",
    *(f"{percent} % of vertices" for percent in SHARES),
    "one half",
    f"{LANDMARKS} landmarks",
    "partial scan",
)

KEYS = ("data", "latent", "steps", "meshes", "scans", "model", "seed", "case")
# Errors in millimetres: over all vertices, and of the worst mesh; the noise of the fits in
# millimetres; how many fits converged, of how many; seconds of one.
MEASURED = ("mean", "median", "worst", "noise", "converged", "fits", "seconds")
COLUMNS = (*KEYS, *MEASURED)


@dataclass
class Options:
    data: tuple[Literal["faces", "bodies", "hands"], ...] = ("faces",)
    seeds: tuple[int, ...] = (0,)
    """Of the training and of what is observed."""
    latent: int = 8
    """Latent channels, and components of PCA."""
    steps: int = 400
    """Training steps."""
    meshes: int = 20
    """Test meshes, evenly spread."""
    scans: int = 6
    """Those of them that a scan is made of."""
    root: Path = Path("data")
    """Folder of the data sets."""
    output: Path = Path("runs") / "fits"
    """Folder for the models and results; models that are there are not trained again."""

    def __post_init__(self):
        if min(self.latent, self.steps, self.meshes, self.scans) < 1:
            raise ValueError("Expected positive 'latent', 'steps', 'meshes' and 'scans'")


def main(options: Options):
    quiet_lightning()
    path = options.output / "fits.csv"
    keys = {
        key: dict(zip(KEYS, map(str, key), strict=True))
        for data, seed, name, case in product(options.data, options.seeds, MODELS, CASES)
        for key in [
            (data, options.latent, options.steps, options.meshes, options.scans, name, seed, case)
        ]
    }
    done = [{name: row[name] for name in KEYS} for row in read_rows(path, COLUMNS)]
    left = [key for key in keys.values() if key not in done]
    for data in options.data:
        if not any(key["data"] == data for key in left):
            continue
        dataset = DATA[data](options.root / DATA[data].__name__)
        train, val, test = (dataset.read(part) for part in dataset.split())
        test = _spread(test, options.meshes)
        hierarchy = MeshHierarchy.from_template(
            dataset.template, cache=options.root / "hierarchies"
        )
        for seed, name in product(options.seeds, MODELS):
            mine = [
                k for k in left if (k["data"], k["seed"], k["model"]) == (data, str(seed), name)
            ]
            if not mine:
                continue
            folder = options.output / f"{data}_{name}_{options.latent}_{options.steps}_{seed}"
            model = trained(folder, hierarchy, name, train, val, seed, options)
            noise = rms(model, val)
            for key in mine:
                row = measured(model, key["case"], test, noise, seed, options)
                append_row(path, COLUMNS, {**key, **row})
                print(", ".join(key.values()), f"{row['mean']} mm, {row['seconds']} s", flush=True)
    # Those of other calls too.
    sizes = {name: str(getattr(options, name)) for name in ("latent", "steps", "meshes", "scans")}
    rows = [row for row in read_rows(path, COLUMNS) if sizes.items() <= row.items()]
    print(written(rows, options, len(rows) > len(keys)))


def trained(
    folder: Path,
    hierarchy: MeshHierarchy,
    name: str,
    train: Tensor,
    val: Tensor,
    seed: int,
    options: Options,
) -> MorphableModel:
    if folder.exists():
        return MorphableModel.load(folder)
    if name == "pca":
        model = MorphableModel.pca(hierarchy, options.latent).fit(train)
    else:
        torch.manual_seed(seed)
        if name == "modal":
            model = MorphableModel.modal(hierarchy, options.latent)
        else:
            model = MorphableModel.coma(hierarchy, options.latent, name)
        epochs = epochs_for(options.steps, len(train), BATCH_SIZE)
        model.fit(train, val, epochs=epochs, batch_size=BATCH_SIZE, seed=seed, freeze=True)
    model.cpu().save(folder)
    return model


@torch.no_grad()
def rms(model: MorphableModel, meshes: Tensor) -> float:
    r"""The root mean square, per coordinate and in metres, of what a model leaves of meshes."""
    squares = [(model(x) - x).double().square().mean(dim=(1, 2)) for x in meshes.split(64)]
    return torch.cat(squares).mean().sqrt().item()


@torch.no_grad()
def measured(
    model: MorphableModel, case: str, test: Tensor, noise: float, seed: int, options: Options
) -> dict[str, Any]:
    r"""The values of :obj:`MEASURED`."""
    start = time.perf_counter()
    if case == "partial scan":
        truth, found = [], []
        rng = np.random.default_rng(seed)
        seconds = 0.0
        for mesh in _spread(test, options.scans):
            vertices, faces, rotation, translation = scan(mesh, model.faces.numpy(), rng)
            start = time.perf_counter()
            found.append(model.fit_to((vertices, faces), noise=float(np.hypot(noise, NOISE))))
            seconds += time.perf_counter() - start
            truth.append(mesh @ rotation.t() + translation)
        error = vertex_distances(torch.stack([fit.mesh for fit in found]), torch.stack(truth))
        converged = torch.stack([fit.converged for fit in found])
    elif case == "reconstruction":
        error, converged = vertex_distances(model(test), test), torch.ones(len(test))
        seconds = time.perf_counter() - start
    else:
        fit = model.fit_to(test, weight=observed(model, case, seed), noise=noise)
        error, converged = vertex_distances(fit.mesh, test), fit.converged
        seconds = time.perf_counter() - start
    return {
        "mean": round(error.mean().item(), 4),
        "median": round(error.median().item(), 4),
        "worst": round(error.mean(dim=1).max().item(), 4),
        "noise": round(1000 * noise, 4),
        "converged": int(converged.sum()),
        "fits": len(error),
        "seconds": round(seconds / len(error), 3),
    }


def observed(model: MorphableModel, case: str, seed: int) -> Tensor:
    r"""The mask :obj:`[N]` of the vertices that are known."""
    n = model.num_vertices
    known = torch.zeros(n)
    if case.endswith("landmarks"):
        known[farthest(model.template, LANDMARKS)] = 1
    elif case == "one half":
        # One side of the body, about the middle of the template's longest horizontal axis.
        sides = model.template[:, [0, 2]]
        across = sides[:, sides.std(dim=0).argmax()]
        known[across > across.median()] = 1
    else:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        known[order[: n * int(case.split()[0]) // 100]] = 1
    return known


def _spread(x: Tensor, num: int) -> Tensor:
    return x[torch.linspace(0, len(x) - 1, min(num, len(x))).long()]


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
    # A camera at z sees faces that look at it and have nothing far before them in their cell, which
    # is about as large as a face.
    corners = vertices[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(normal, axis=1, keepdims=True)
    side = np.sqrt(area.mean())
    normal /= np.maximum(area, 1e-30)
    middle = corners.mean(axis=1)
    _, cell = np.unique(np.floor(middle[:, :2] / side).astype(int), axis=0, return_inverse=True)
    front = np.full(cell.max() + 1, -np.inf)
    np.maximum.at(front, cell.ravel(), middle[:, 2])
    faces = faces[(normal[:, 2] > 0.15) & (middle[:, 2] > front[cell.ravel()] - 2 * side)]
    used = rng.permutation(np.unique(faces))
    place = np.empty(len(vertices), dtype=np.int64)
    place[used] = np.arange(len(used))
    points = vertices[used] + NOISE * rng.normal(size=(len(used), 3))
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(rng.uniform(0, np.pi / 3) * axis / np.linalg.norm(axis)).as_matrix()
    shift = rng.normal(size=3)
    moved = points @ turn.T + shift
    return moved, place[faces], torch.from_numpy(turn).to(mesh), torch.from_numpy(shift).to(mesh)


def written(rows: list[dict[str, str]], options: Options, several: bool) -> str:
    r"""Writes the table, means over seeds, and returns it; :obj:`several` where not all rows are of
    this call."""
    tables = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        seeds = sorted({row["seed"] for row in rows if row["data"] == data}, key=int)
        tables[f"{data}, mean error in mm, seeds {' '.join(seeds)}"] = table = []
        for case in CASES:
            line = {"observed": case}
            for model, name in MODELS.items():
                of_cell = [
                    r for r in rows if (r["data"], r["case"], r["model"]) == (data, case, model)
                ]
                if not of_cell:
                    line[name] = None
                    continue
                means = [float(r["mean"]) for r in of_cell]
                line[name] = f"{np.mean(means):.3f}"
                error = report.standard_error(means)
                if error is not None:
                    line[name] += f" ± {error:.3f}"
                converged, fits = (sum(int(r[k]) for r in of_cell) for k in ("converged", "fits"))
                if converged < fits:
                    line[name] += f" ({converged} of {fits} converged)"
            table.append(line)
    about = report.machine("cpu") | {
        "latent": options.latent,
        "steps": options.steps,
        "meshes": options.meshes,
        "scans": options.scans,
    }
    notes = [
        "Mean ± standard error over seeds of training and of what is observed; PCA has no seed of "
        "training.",
        "Distances of all vertices to their true places, also of those that were not observed.",
        "A fit has converged when its last step was small and, of a scan, most of it is explained.",
    ]
    if several:
        notes.append("Rows of several calls; headings tell the seeds.")
    return report.write(options.output, "fits", report.command(), rows, tables, about, notes)


if __name__ == "__main__":
    main(tyro.cli(Options, description="Errors of fits to a part of a mesh, landmarks and scans."))
