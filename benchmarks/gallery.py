r"""Pictures of what the models that come with the package are for, for the documentation:

    python -m benchmarks.gallery

It makes the meshes of :mod:`benchmarks.peers.data` where they are not there yet, and trains
nothing.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor
from torch.distributions import MultivariateNormal

from benchmarks.fits import NOISE, rms, scan
from benchmarks.peers.data import SETS, load
from pyg_attnpool import MorphableModel
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.visualize import draw_meshes, render, view_box, write_animation, write_picture

COLORS = "viridis"
SIZE = (360, 480)  # pixels of a mesh in a figure
VIEW: dict[str, Any] = {"azimuth": 10.0, "size": SIZE}  # of a face that is edited
ASPECT = SIZE[0] / SIZE[1]
SCAN = (0.55, 0.63, 0.70)
MARK = (0.80, 0.15, 0.15)
FITTED = {"faces-32": 3, "bodies-32": 5}  # which of ten test meshes, evenly spread
MOVED = (0.004, 0.008, 0.0)  # metres, of a corner of the mouth
EDITS: dict[str, dict[str, Any]] = {  # the weight of the other half, and the noise
    "edited": {"keep": 0, "noise": 0.001},
    "keep": {"keep": 1, "noise": 0.001},
    "keep 10, noise 0.3 mm": {"keep": 10, "noise": 0.0003},
}
SAMPLED = {"faces": (150, 190), "hands": (150, 200), "bodies": (150, 300)}  # pixels of a mesh
SHARES = (1.0, 0.5)  # of the variance of the codes; the last one is drawn
SUBJECT = "04"  # who walks and is edited


def main(
    pictures: tuple[Literal["fit", "edit", "samples", "walk"], ...] = (
        "fit",
        "edit",
        "samples",
        "walk",
    ),
    root: Path = Path("data"),
    output: Path = Path("docs") / "images",
):
    r"""Draws the pictures.

    Args:
        pictures: Which of them.
        root: Folder of the data sets.
        output: Folder of the pictures.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in pictures:
        DRAW[name](root, output)


@torch.no_grad()
def fit(root: Path, output: Path) -> None:
    r"""Scans of test meshes, the fits to them in the pose of the model, and their errors."""
    figure = Figure(figsize=(8.6, 5.8), layout="constrained")
    axes = figure.subplots(2, 4)
    for row, (name, number) in zip(axes, FITTED.items(), strict=True):
        model = MorphableModel.from_pretrained(name)
        _, (_, val, test), _ = load(name.partition("-")[0], root)
        mesh = test[torch.linspace(0, len(test) - 1, 10).long()[number]]
        points, faces, rotation, translation = scan(
            mesh, model.faces.numpy(), np.random.default_rng(0)
        )
        noise = float(np.hypot(rms(model, val), NOISE))
        found = model.fit_to((points, faces), noise=noise)
        fitted = (found.mesh - translation) @ rotation
        error = vertex_distances(fitted, mesh)
        print(
            f"{name}: {error.mean():.2f} mm from the truth, at most {error.max():.2f}, "
            f"converged {found.converged.item()}"
        )
        norm = Normalize(0, error.quantile(0.99).item())
        # One scale for all four.
        boxes = view_box([points], aspect=ASPECT), view_box([mesh, fitted], aspect=ASPECT)
        height = max(height for _, height in boxes)
        of_scan, box = ((centre, height) for centre, _ in boxes)
        show(row[0], render(points, faces, SCAN, SIZE, box=of_scan))
        show(row[1], render(fitted, model.faces, size=SIZE, box=box))
        show(row[2], render(mesh, model.faces, size=SIZE, box=box))
        show(row[3], render(mesh, model.faces, colors(error, norm), SIZE, box=box, shade=0.35))
        bar(figure, row, norm, "mm")
    for ax, title in zip(axes[0], ("scan", "fit", "truth", "error of the fit"), strict=True):
        ax.set_title(title, fontsize=10)
    write_figure(output / "fit.png", figure)


@torch.no_grad()
def edit(root: Path, output: Path) -> None:
    r"""A face, and a corner of its mouth moved: with all that belongs to it, and where the other
    half is to stay. The picture is of the last model."""
    neutral, smile = expressions(root, "high_smile")
    for name in ("faces", "faces-32"):
        model = MorphableModel.from_pretrained(name)
        face = model(neutral[None])[0]
        # The corner of the mouth goes farthest in a smile.
        corner = int(((smile - neutral).norm(dim=1) * (model.template[:, 0] > 0)).argmax())
        target = face[corner] + torch.tensor(MOVED)
        other = (model.template[:, 0] < -0.01).float()  # metres from the middle
        meshes = {"before": face}
        for title, settings in EDITS.items():
            keep = settings["keep"] * other if settings["keep"] else None
            found = model.edit(face, {corner: target}, keep=keep, noise=settings["noise"])
            meshes[title] = found.mesh
            print(
                f"{name}, {title}: {found.residuals[0]:.2f} mm from the target, the other half "
                f"moves by {vertex_distances(found.mesh, face)[other > 0].mean():.2f} mm"
            )
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes = figure.subplots(2, len(meshes))
    moves = vertex_distances(torch.stack(list(meshes.values())), face)
    norm = Normalize(0, moves.max().item())
    box = view_box([face], VIEW["azimuth"], aspect=ASPECT)
    for (above, below), (title, mesh), move in zip(axes.T, meshes.items(), moves, strict=True):
        show(above, render(mesh, model.faces, box=box, **VIEW))
        above.set_title(title, fontsize=10)
        if title == "before":
            above.plot(*place(face[corner], box), ".", color=MARK)
            below.set_axis_off()
        else:
            above.plot(*place(target, box), "+", color=MARK)
            of_move = colors(move, norm)
            show(below, render(mesh, model.faces, of_move, box=box, shade=0.35, **VIEW))
    bar(figure, axes[1], norm, "moved by (mm)")
    write_figure(output / "edit.png", figure)


@torch.no_grad()
def samples(root: Path, output: Path) -> None:
    r"""New faces, hands and bodies, a row each. Of many, it counts those whose edges are longer on
    average than those of any training mesh."""
    rows = []
    for kind, size in SAMPLED.items():
        model = MorphableModel.from_pretrained(kind)
        longest = max(edge_length(x, model.faces).max() for x in load(kind, root)[1][0].split(64))
        for share in SHARES:
            torch.manual_seed(0)
            codes = MultivariateNormal(model.latent_mean, share * model.latent_cov).sample((200,))
            new = model.decode(codes)
            stretched = int((edge_length(new, model.faces) > longest).sum())
            print(f"{kind}, {share} of the variance: {stretched} of {len(new)} are stretched")
        rows.append(np.concatenate(draw_meshes(new[:6], model.faces, size=size), axis=1))
    write_picture(output / "samples.png", np.concatenate(rows))


def edge_length(x: Tensor, faces: Tensor) -> Tensor:
    r"""The mean length :obj:`[B]` of the edges of all faces."""
    corners = x[:, faces]
    return (corners - corners.roll(1, dims=2)).norm(dim=3).mean(dim=(1, 2))


@torch.no_grad()
def walk(root: Path, output: Path) -> None:
    r"""From one expression to another and back, in the latent space."""
    model = MorphableModel.from_pretrained("faces")
    _, smile = expressions(root, "high_smile")
    _, wide = expressions(root, "mouth_open")
    there = model.interpolate(smile, wide, steps=16)
    path = torch.cat([there, there.flip(0)[1:-1]])
    box = view_box(path, 0.0)
    turn = 25 * np.sin(2 * np.pi * np.arange(len(path)) / len(path))
    frames = [
        render(x, model.faces, size=(230, 260), azimuth=azimuth, box=box)
        for x, azimuth in zip(path, turn, strict=True)
    ]
    write_animation(output / "walk.gif", frames, fps=12)


def expressions(root: Path, name: str) -> tuple[Tensor, Tensor]:
    r"""A subject at the start and at the peak of an expression."""
    dataset = SETS["faces"].build(root)
    mine = [
        i
        for i, key in enumerate(zip(dataset.subject, dataset.expression, strict=True))
        if key == (SUBJECT, name)
    ]
    x = dataset.read(torch.tensor(mine))
    return x[0], x[(x - x[0]).norm(dim=2).mean(dim=1).argmax()]


def show(ax: Axes, image: ndarray) -> None:
    r"""Shows a picture, whose pixels are the units of the axes."""
    ax.imshow(image, interpolation="antialiased")
    ax.set_axis_off()


def place(point: Tensor, box: tuple[ndarray, float]) -> tuple[float, float]:
    r"""The pixel of a point in a picture of :func:`edit`."""
    centre, height = box
    x, y, z = SIZE[1] / height * (point.numpy() - centre)
    angle = np.radians(VIEW["azimuth"])
    return SIZE[0] / 2 + np.cos(angle) * x + np.sin(angle) * z, SIZE[1] / 2 - y


def colors(values: Tensor, norm: Normalize) -> ndarray:
    r"""A colour for every value."""
    return ScalarMappable(norm, COLORS).to_rgba(values.numpy())[:, :3]


def bar(figure: Figure, axes: ndarray, norm: Normalize, label: str) -> None:
    r"""The scale of colours beside a picture."""
    figure.colorbar(ScalarMappable(norm, COLORS), ax=axes, label=label, shrink=0.7)


def write_figure(path: Path, figure: Figure) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


DRAW = {"fit": fit, "edit": edit, "samples": samples, "walk": walk}

if __name__ == "__main__":
    tyro.cli(main)
