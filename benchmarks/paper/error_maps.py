r"""Figures 4 and 14: where models err, as colour on meshes of the test part."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from benchmarks.paper.data import Meshes
from benchmarks.paper.pictures import COMPARED, Picture
from pyg_attnpool import MorphableModel
from pyg_attnpool.metrics import vertex_distances
from pyg_attnpool.visualize import plot_mesh

FEW, MORE = 3, 6  # meshes


@torch.no_grad()
def draw(
    figure: Figure, meshes: Meshes, models: dict[str, MorphableModel], number: int, shapes: bool
) -> None:
    r"""A row for every mesh: the truth, and of every model the error on it, or with :obj:`shapes`
    the reconstruction and below it the error on that. One scale for all; it ends at the 99th
    percentile."""
    test = meshes.split()[2]
    test = torch.as_tensor(test[torch.linspace(0, len(test) - 1, number).round().long()])
    faces = meshes.hierarchy.faces[0]
    made = {name: model(test) for name, model in models.items()}
    errors = {name: vertex_distances(x, test) for name, x in made.items()}
    top = float(np.quantile(np.concatenate([e.flatten() for e in errors.values()]), 0.99))
    norm = Normalize(0, top)
    lines = number * (2 if shapes else 1)
    figure.set_size_inches(2.1 * (1 + len(models)), 2.5 * lines + 0.5)
    axes = figure.subplots(lines, 1 + len(models), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, mesh in enumerate(test):
        row = axes[(2 if shapes else 1) * i :]
        plot_mesh(row[0][0], mesh, faces)
        for column, (name, error) in enumerate(errors.items(), start=1):
            if shapes:
                plot_mesh(row[0][column], made[name][i], faces)
            ax = row[1 if shapes else 0][column]
            plot_mesh(ax, made[name][i], faces, error[i], norm)
            mean = f"{error[i].mean():.2f} mm"
            ax.text(0.5, -0.02, mean, transform=ax.transAxes, ha="center", va="top", fontsize=9)
    _same_size([ax for ax in axes.flat if ax.images])
    for ax, title in zip(axes[0], ["truth", *models], strict=True):
        ax.set_title(title, fontsize=10)
    label = "distance of a vertex to where it should be (mm)"
    figure.colorbar(
        ScalarMappable(norm, "viridis"),
        ax=axes,
        label=label,
        extend="max",
        shrink=min(0.6, 2 / lines),
        pad=0.01,
    )


def _same_size(axes: Sequence[Axes]) -> None:
    # One scale for all meshes, each in the middle of its axes.
    sizes = np.array([[np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())] for ax in axes])
    width, height = sizes.max(axis=0) / 2
    for ax in axes:
        x, y = np.mean(ax.get_xlim()), np.mean(ax.get_ylim())
        ax.set(xlim=(x - width, x + width), ylim=(y - height, y + height))


PICTURES = (
    Picture(
        "figure4",
        "error maps on three meshes; QEM and attention, spectral and spiral, PCA",
        COMPARED,
        lambda figure, meshes, models: draw(figure, meshes, models, FEW, False),
    ),
    Picture(
        "figure14",
        "reconstructions and error maps on more meshes, of the same models",
        COMPARED,
        lambda figure, meshes, models: draw(figure, meshes, models, MORE, True),
    ),
)
