r"""Pictures of meshes and of reconstruction errors (extra :obj:`viz`)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import vertex_distances

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
except ImportError as e:
    raise ImportError(
        f"'pyg_attnpool.visualize' requires '{e.name}': install it with "
        f'`pip install "pyg_attnpool[viz]"`'
    ) from e

SKIN = np.array([0.80, 0.74, 0.70])
LIGHT = np.array([0.25, 0.35, 0.90])


def plot_mesh(
    ax: Axes,
    vertices: Tensor,
    faces: np.ndarray,
    values: Tensor | None = None,
    norm: Normalize | None = None,
    azimuth: float = 20.0,
) -> None:
    r"""Draws a mesh from the front: :math:`y` is up and :math:`z` comes towards the viewer, as in
    face scans.

    Args:
        ax (matplotlib.axes.Axes): The axes to draw in.
        vertices (torch.Tensor): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
        values (torch.Tensor, optional): A value per vertex :obj:`[N]`, drawn as colour; otherwise
            the mesh is lit. (default: :obj:`None`)
        norm (matplotlib.colors.Normalize, optional): The scale of the values.
            (default: :obj:`None`)
        azimuth (float, optional): How far the mesh is turned about :math:`y`, in degrees.
            (default: :obj:`20.0`)
    """
    c, s = np.cos(np.radians(azimuth)), np.sin(np.radians(azimuth))
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    corners = (vertices.numpy(force=True).astype(np.float64) @ turn.T)[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    # Faces that look at the viewer, the farthest first.
    order = corners[:, :, 2].mean(axis=1).argsort()
    order = order[normals[order, 2] > 0]
    if values is None:
        shade = 0.35 + 0.65 * (normals[order] @ (LIGHT / np.linalg.norm(LIGHT))).clip(0)
        colors = shade[:, None] * SKIN
    else:
        of_face = values.numpy(force=True)[faces[order]].mean(axis=1)
        colors = matplotlib.colormaps["viridis"]((norm or Normalize())(of_face))
    # An edge of the same colour closes the seams that antialiasing leaves between faces.
    polygons = PolyCollection(
        corners[order, :, :2], facecolors=colors, edgecolors=colors, linewidths=0.3
    )
    ax.add_collection(polygons)
    ax.autoscale_view()
    ax.set_aspect("equal")
    ax.set_axis_off()


def plot_reconstructions(
    path: str | Path,
    faces: np.ndarray,
    meshes: Tensor,
    reconstructions: dict[str, Tensor],
    azimuth: float = 20.0,
) -> None:
    r"""Writes a picture with one row per mesh: the truth, every model's reconstruction, and every
    model's error per vertex in one colour scale, with a bar in millimetres that ends at the 99th
    percentile.

    Args:
        path (str or Path): The file to write, in a format of matplotlib such as PNG.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
        meshes (torch.Tensor): The true meshes :obj:`[M, N, 3]` in metres.
        reconstructions (dict): For every model's name its reconstructions :obj:`[M, N, 3]`.
        azimuth (float, optional): As in :meth:`plot_mesh`. (default: :obj:`20.0`)
    """
    errors = {name: vertex_distances(x, meshes) for name, x in reconstructions.items()}
    largest = torch.cat([e.flatten() for e in errors.values()]).quantile(0.99).item()
    norm = Normalize(0, largest)

    columns = ["truth", *reconstructions, *(f"error of {name}" for name in errors)]
    figure = Figure(figsize=(2.1 * len(columns), 2.6 * len(meshes) + 0.6), layout="constrained")
    axes = figure.subplots(len(meshes), len(columns), squeeze=False)
    for row, ax in enumerate(axes):
        shapes = [meshes[row], *(x[row] for x in reconstructions.values())]
        for a, shape in zip(ax, shapes, strict=False):
            plot_mesh(a, shape, faces, azimuth=azimuth)
        for a, error in zip(ax[len(shapes) :], errors.values(), strict=True):
            plot_mesh(a, meshes[row], faces, error[row], norm, azimuth)
            a.text(0.5, -0.02, f"{error[row].mean():.2f} mm", transform=a.transAxes, ha="center")
    for a, title in zip(axes[0], columns, strict=True):
        a.set_title(title)
    figure.colorbar(
        ScalarMappable(norm, "viridis"),
        ax=axes,
        label="error per vertex (mm)",
        extend="max",
        shrink=0.6,
        pad=0.01,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
