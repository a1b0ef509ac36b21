r"""Interpolation, extrapolation and deformation transfer in the latent space, by CoMA with quadric
(QEM) pooling and with learned aggregation: the three figures of section 4.7 of "Learning Feature
Aggregation for Deep 3D Morphable Models" (CVPR 2021), and the same by the modal network, on faces
or bodies made here. Numbers beside them are of sequences that training has not seen:

* interpolation: the error of the meshes between two frames, against the true frames between them
* smoothness: the second differences of a path from a neutral mesh to the peak of its expression
* extrapolation: the share of faces that flip, and how many pairs of faces cross, beside those of
  true meshes, at each factor
* transfer: the error against the true mesh of the target with the source's expression

Reproduced with the defaults, 429 steps, on faces, seed 0, in mm:

    reconstruction   QEM 2.153, learned 1.529, modal 0.493
    interpolation    QEM 2.254, learned 1.655, modal 0.697
    transfer         QEM 2.729, learned 2.302, modal 1.151
"""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Threads that spin while they wait slow a busy machine ten times. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor

from pyg_attnpool import MeshHierarchy, MorphableModel
from pyg_attnpool.datasets import AnnyBodies, AnnyFaces
from pyg_attnpool.datasets.anny.transfer import transferred
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.training import epochs_for, quiet_lightning
from pyg_attnpool.visualize import plot_mesh

NAMES = {"qem": "QEM", "attention": "learned", "modal": "modal"}
ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
GAP = 4  # frames from one end of an interpolation to the other


@dataclass
class Options:
    data: Literal["faces", "bodies"] = "faces"
    root: Path = Path("data")
    """Folder of the data sets."""
    frames: int = 20
    """Frames of each sequence."""
    latent: int = 8
    """Latent channels."""
    steps: int = 400
    """Training steps."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    output: Path | None = None
    """Folder for everything written; by default runs/latent_ and the data. Models that are there
    are not trained again."""


def main(options: Options):
    quiet_lightning()
    output = options.output or Path("runs") / f"latent_{options.data}"
    make = AnnyFaces if options.data == "faces" else AnnyBodies
    dataset = make(options.root / make.__name__, frames=options.frames)
    split = dataset.split("sequence")
    train, val, test = (dataset[part] for part in split)
    hierarchy = MeshHierarchy.from_template(dataset.template, cache=options.root / "hierarchies")
    models = {
        pool: trained(output / f"model_{pool}", hierarchy, pool, train, val, options)
        for pool in NAMES
    }
    sequences = test.vertices.view(-1, options.frames, *test.vertices.shape[1:])
    names = list(zip(test.subject, test.expression, strict=True))[:: options.frames]
    truth, ends = transfers(dataset, names, options)

    rows = []
    truly = float(np.mean([crossing(x, dataset.face.t()) for x in sequences[:4, 0]]))
    for pool, model in models.items():
        row = {"model": pool, "reconstruction": model.evaluate(test)["mean"]}
        row["interpolation"], row["straight line"] = interpolation(model, sequences)
        neutral, peak = sequences[:, 0], peaks(sequences)
        path = model.interpolate(neutral, peak, 9)
        row["second differences"] = vertex_distances(path[:, 2:] + path[:, :-2], 2 * path[:, 1:-1])
        row["second differences"] = row["second differences"].mean().item()
        row["transfer"] = vertex_distances(model.transfer(*ends), truth).mean().item()
        row["transfer of offsets"] = vertex_distances(ends[2] + ends[1] - ends[0], truth)
        row["transfer of offsets"] = row["transfer of offsets"].mean().item()
        row["reconstructed target"] = vertex_distances(model(truth), truth).mean().item()
        for alpha, meshes in zip(
            ALPHAS, model.extrapolate(neutral, peak, ALPHAS).unbind(1), strict=True
        ):
            row[f"flipped at {alpha:g} (%)"] = 100 * flipped(meshes, neutral, model.faces)
            row[f"crossing at {alpha:g}"] = float(
                np.mean([crossing(x, model.faces) for x in meshes[:4]])
            )
        rows.append(row | {"crossing in truth": truly})

    print(f"\n{options.data}: {len(sequences)} unseen sequences; errors in mm\n")
    for name in list(rows[0])[1:]:
        print(f"{name:24}" + "".join(f"{row['model']:>12} {row[name]:9.3f}" for row in rows))
    with (
        replacing(output / "results.csv") as path,
        open(path, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(output, models, sequences, ends, truth, dataset.template[1])
    print(f"results.csv and three pictures are in {output}")


def trained(
    folder: Path, hierarchy: MeshHierarchy, pool: str, train, val, options: Options
) -> MorphableModel:
    if folder.exists():
        return MorphableModel.load(folder)
    torch.manual_seed(options.seed)
    if pool == "modal":
        model = MorphableModel.modal(hierarchy, options.latent)
    else:
        model = MorphableModel.coma(hierarchy, options.latent, pool)
    model.fit(
        train,
        val,
        epochs=epochs_for(options.steps, len(train)),
        seed=options.seed,
        freeze=True,
        accelerator=options.device,
    )
    model.cpu().save(folder)
    return model


def peaks(sequences: Tensor) -> Tensor:
    r"""The mesh of every sequence that is farthest from its first."""
    away = vertex_distances(sequences, sequences[:, :1]).mean(dim=2)
    return sequences[torch.arange(len(sequences)), away.argmax(dim=1)]


def interpolation(model: MorphableModel, sequences: Tensor) -> tuple[float, float]:
    r"""The errors of the meshes between two frames: those of the model, and of a straight line
    between the true ends."""
    start = torch.arange(0, sequences.size(1) - GAP, GAP)
    a, b = (sequences[:, start + i].flatten(0, 1) for i in (0, GAP))
    between = torch.stack([sequences[:, start + i].flatten(0, 1) for i in range(1, GAP)], dim=1)
    found = model.interpolate(a, b, GAP + 1)[:, 1:-1]
    t = (torch.arange(1, GAP) / GAP).view(-1, 1, 1)
    line = (1 - t) * a.unsqueeze(1) + t * b.unsqueeze(1)
    return tuple(vertex_distances(x, between).mean().item() for x in (found, line))


def transfers(dataset, names: list, options: Options) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""The true meshes of targets with the expression of sources, which are not in training, and
    the neutral source, the source and the neutral target of each."""
    subjects = sorted(set(dataset.subject))
    wanted, targets = [], []
    for subject, expression in names:
        s = subjects.index(subject)
        t = (s + 1) % len(subjects)
        wanted += [(s, t, expression), (s, s, expression)]
        targets.append(t)
    meshes = transferred(options.data, wanted, options.frames)
    on_target, on_source = meshes[::2], meshes[1::2]
    away = vertex_distances(on_source, on_source[:, :1]).mean(dim=2).argmax(dim=1)
    rows = torch.arange(len(names))
    ends = on_source[:, 0], on_source[rows, away], on_target[:, 0]
    return on_target[rows, away], ends


def flipped(meshes: Tensor, reference: Tensor, faces: Tensor) -> float:
    r"""The share of faces that turn by more than 90 degrees from a reference."""
    dots = normals(meshes, faces) * normals(reference, faces)
    return (dots.sum(dim=-1) < 0).double().mean().item()


def normals(x: Tensor, faces: Tensor) -> Tensor:
    a, b, c = x[:, faces].unbind(2)
    return torch.linalg.cross(b - a, c - a)


def crossing(mesh: Tensor, faces: Tensor) -> int:
    r"""The pairs of faces without a common vertex of which an edge of one goes through the
    other."""
    from scipy.spatial import cKDTree

    x, f = mesh.double().numpy(), faces.numpy()
    corners = x[f]
    centre = corners.mean(axis=1)
    radius = np.linalg.norm(corners - centre[:, None], axis=2).max(axis=1)
    pairs = cKDTree(centre).query_pairs(2 * np.quantile(radius, 0.99), output_type="ndarray")
    close = np.linalg.norm(centre[pairs[:, 0]] - centre[pairs[:, 1]], axis=1)
    pairs = pairs[close < radius[pairs].sum(axis=1)]
    pairs = pairs[~(f[pairs[:, 0], :, None] == f[pairs[:, 1], None, :]).any(axis=(1, 2))]
    hit = np.zeros(len(pairs), dtype=bool)
    for one, other in (pairs.T, pairs.T[::-1]):
        for i in range(3):
            hit |= through(
                corners[one, i], corners[one, (i + 1) % 3], *corners[other].swapaxes(0, 1)
            )
    return int(hit.sum())


def through(p: ndarray, q: ndarray, a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    r"""Whether segments from p to q go through triangles abc."""

    def volume(u: ndarray, v: ndarray, w: ndarray, o: ndarray) -> ndarray:
        return np.einsum("ij,ij->i", np.cross(u - o, v - o), w - o)

    sides = np.stack([volume(a, b, q, p), volume(b, c, q, p), volume(c, a, q, p)])
    apart = volume(a, b, c, p) * volume(a, b, c, q) < 0
    return apart & ((sides > 0).all(axis=0) | (sides < 0).all(axis=0))


def draw(
    output: Path,
    models: dict[str, MorphableModel],
    sequences: Tensor,
    ends: tuple[Tensor, ...],
    truth: Tensor,
    faces: ndarray,
) -> None:
    r"""The three figures, of the sequence and of the transfer that move most."""
    away = vertex_distances(sequences, sequences[:, :1]).mean(dim=2)
    sequence = sequences[away.amax(dim=1).argmax()]
    peak = int(away[away.amax(dim=1).argmax()].argmax())
    neutral, deformed = sequence[0], sequence[peak]
    frames = torch.linspace(0, peak, 7).round().long()
    rows = {"truth": sequence[frames]}
    rows |= {NAMES[p]: m.interpolate(neutral, deformed, 7) for p, m in models.items()}
    picture(output / "interpolation.png", rows, [f"{i / 6:.2f}" for i in range(7)], faces)

    rows = {NAMES[p]: m.extrapolate(neutral, deformed, ALPHAS) for p, m in models.items()}
    picture(output / "extrapolation.png", rows, [f"α = {alpha:g}" for alpha in ALPHAS], faces)

    most = vertex_distances(ends[1], ends[0]).mean(dim=1).argmax()
    ends = tuple(x[most] for x in ends)
    meshes = [*ends, *(m.transfer(*ends) for m in models.values()), truth[most]]
    columns = ["source, neutral", "source", "target, neutral"]
    columns += [f"transferred, {NAMES[pool]}" for pool in models] + ["truth"]
    picture(output / "transfer.png", {"": torch.stack(meshes)}, columns, faces)


def picture(path: Path, rows: dict[str, Tensor], columns: list[str], faces: ndarray) -> None:
    figure = Figure(figsize=(2.2 * len(columns), 2.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, meshes) in zip(axes, rows.items(), strict=True):
        for ax, mesh in zip(line, meshes, strict=True):
            plot_mesh(ax, mesh, faces)
        line[0].text(-0.16, 0.5, name, transform=line[0].transAxes, rotation=90, va="center")
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options, description="Walks through latent spaces: QEM, learned, modal."))
