r"""Pictures of meshes and of reconstruction errors (extra :obj:`viz`).

Meshes are drawn by a small rasteriser with a depth buffer, in numpy. The libraries that draw with
OpenGL (pyvista, pyrender, moderngl, Open3D) need EGL or OSMesa of the system, which a bare machine
has not, and matplotlib sorts whole faces, which shows wherever surfaces cross.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from pyg_attnpool.files import replacing
from pyg_attnpool.mesh.normals import vertex_normals
from pyg_attnpool.metrics import vertex_distances

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

SKIN = (0.72, 0.65, 0.59)
# Directions towards the lights, which turn with the viewer, and their shares. A surface that faces
# the viewer has its own colour.
LIGHTS = (((-0.55, 0.70, 0.59), 0.68), ((0.85, 0.15, 0.55), 0.26))
AMBIENT = 0.45


def render(
    vertices: Tensor | ndarray,
    faces: Tensor | ndarray,
    colors: ndarray | Sequence[float] = SKIN,
    size: tuple[int, int] = (480, 480),
    azimuth: float = 20.0,
    elevation: float = 0.0,
    box: tuple[ndarray, float] | None = None,
    shade: float = 1.0,
    samples: int = 2,
) -> ndarray:
    r"""Draws one mesh, smoothly shaded and correct in depth, seen from afar: :math:`y` is up and at
    azimuth 0 :math:`z` comes towards the viewer.

    Args:
        vertices (torch.Tensor or numpy.ndarray): Vertices :obj:`[N, 3]`, in any unit.
        faces (torch.Tensor or numpy.ndarray): Faces :obj:`[F, 3]`; both of their sides are drawn.
        colors (numpy.ndarray or tuple, optional): A colour per vertex :obj:`[N, 3]` or one for all,
            red, green and blue in :math:`[0, 1]`. (default: that of skin)
        size (tuple, optional): Width and height in pixels. (default: :obj:`(480, 480)`)
        azimuth (float, optional): How far the mesh is turned about :math:`y`, in degrees.
            (default: :obj:`20.0`)
        elevation (float, optional): How far above the viewer stands, in degrees.
            (default: :obj:`0.0`)
        box (tuple, optional): Centre :obj:`[3]` and height of what is seen, as from
            :func:`view_box`, so that several pictures have one scale; by default the mesh fills
            the picture. (default: :obj:`None`)
        shade (float, optional): How much of the colour depends on light, 0 to 1.
            (default: :obj:`1.0`)
        samples (int, optional): Samples of a pixel along each side, which smooth its edges.
            (default: :obj:`2`)

    Returns:
        The picture :obj:`[height, width, 4]` (uint8), red, green, blue and opacity.

    Raises:
        ValueError: If shapes do not fit or a coordinate is not finite.

    Example:
        >>> corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        >>> render(corners, np.array([[0, 1, 2]]), size=(40, 30)).shape
        (30, 40, 4)
    """
    vertices, faces = _mesh(vertices, faces)
    colors = np.asarray(colors, dtype=np.float64)
    if colors.shape not in ((3,), vertices.shape):
        raise ValueError(
            f"Expected 'colors' of shape [3] or {list(vertices.shape)} (got {list(colors.shape)})"
        )
    if min(size) < 1 or samples < 1:
        raise ValueError(f"Expected positive 'size' and 'samples' (got {size} and {samples})")
    width, height = size[0] * samples, size[1] * samples
    turn = _turn(azimuth, elevation)
    if box is None:
        box = view_box([vertices], azimuth, elevation, aspect=width / height)
    centre, extent = box
    seen = (vertices - centre) @ turn.T
    scale = height / extent
    x, y = width / 2 + scale * seen[:, 0], height / 2 - scale * seen[:, 1]

    pixel, face, weight = _visible(np.stack([x, y, -scale * seen[:, 2]], 1), faces, width, height)
    corner = faces[face]
    normal = np.einsum("pk,pkc->pc", weight, vertex_normals(vertices, faces)[corner]) @ turn.T
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    # Of faces that are seen from behind, the other side is lit.
    a, b, c = (seen[faces[:, k]] for k in range(3))
    normal *= np.where(_cross(b - a, c - a) < 0, -1, 1)[face, None]
    light = _light(normal) / _light(np.array([[0.0, 0.0, 1.0]]))
    color = np.broadcast_to(colors, vertices.shape)[corner]
    color = np.einsum("pk,pkc->pc", weight, color) * (1 - shade + shade * light)[:, None]

    image = np.zeros((height * width, 4))
    image[pixel] = np.concatenate([np.clip(color, 0, 1), np.ones((len(pixel), 1))], axis=1)
    image = image.reshape(size[1], samples, size[0], samples, 4).mean(axis=(1, 3))
    image[..., :3] /= np.maximum(image[..., 3:], 1e-12)  # colours without those of the ground
    return np.rint(255 * image).astype(np.uint8)


def view_box(
    meshes: Iterable[Tensor | ndarray],
    azimuth: float = 20.0,
    elevation: float = 0.0,
    aspect: float = 1.0,
) -> tuple[ndarray, float]:
    r"""The centre and the height of a picture in which all of several meshes are seen.

    Args:
        meshes (list): Vertices :obj:`[N, 3]` of each.
        azimuth (float, optional): As in :func:`render`. (default: :obj:`20.0`)
        elevation (float, optional): As in :func:`render`. (default: :obj:`0.0`)
        aspect (float, optional): The width of the picture over its height. (default: :obj:`1.0`)

    Example:
        >>> from pyg_attnpool.visualize import render, view_box
        >>> box = view_box(meshes)  # one frame for all of them
        >>> images = [render(x, template[1], box=box) for x in meshes[:2]]
    """
    turn = _turn(azimuth, elevation)
    seen = np.concatenate([_numpy(vertices).astype(np.float64) @ turn.T for vertices in meshes])
    low, high = seen.min(axis=0), seen.max(axis=0)
    extent = 1.06 * max(high[1] - low[1], (high[0] - low[0]) / aspect, 1e-12)
    return (low + high) / 2 @ turn, float(extent)


def write_picture(path: str | Path, image: ndarray, background: str | None = "white") -> None:
    r"""Writes a picture of :func:`render` to a file of any format of pillow.

    Args:
        path (str or Path): The file.
        image (numpy.ndarray): The picture :obj:`[height, width, 4]`.
        background (str, optional): The colour behind it; :obj:`None` leaves it transparent.
            (default: :obj:`"white"`)

    Example:
        >>> from pyg_attnpool.visualize import render, write_picture
        >>> write_picture("mesh.png", render(meshes[0], template[1], size=(80, 60)))
    """
    with replacing(path) as temporary:
        _pillow(image, background).save(temporary)


def write_animation(
    path: str | Path,
    frames: Iterable[ndarray],
    fps: float = 25.0,
    background: str = "white",
) -> None:
    r"""Writes pictures of :func:`render` as an animation, GIF or MP4 by the ending of the file.

    Args:
        path (str or Path): The file. A GIF repeats for ever; an MP4 needs :obj:`imageio-ffmpeg`.
        frames (iterable): Pictures of one size, such as those of :func:`turntable` or
            :func:`draw_meshes`.
        fps (float, optional): Pictures a second. (default: :obj:`25.0`)
        background (str, optional): The colour behind them. (default: :obj:`"white"`)

    Raises:
        ImportError: If :obj:`imageio-ffmpeg` is missing for an MP4.
        ValueError: If there are no pictures or the ending is another one.

    Example:
        >>> from pyg_attnpool.visualize import draw_meshes, write_animation
        >>> path = model.interpolate(meshes[0], meshes[1], steps=5)
        >>> write_animation("path.gif", draw_meshes(path, template[1], size=(80, 60)))
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"Expected a file name ending in '.gif' or '.mp4' (got {path})")
    images = [_pillow(frame, background) for frame in frames]
    if not images:
        raise ValueError("Expected at least one picture of an animation (got none)")
    with replacing(path) as temporary:
        if suffix == ".gif":
            # One palette for all, so that colours do not flicker.
            palette = images[len(images) // 2].quantize(255)
            images = [image.quantize(palette=palette) for image in images]
            images[0].save(
                temporary, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0
            )
        else:
            _write_mp4(temporary, images, fps)


def turntable(
    vertices: Tensor | ndarray,
    faces: Tensor | ndarray,
    num_frames: int = 72,
    **kwargs: Any,
) -> list[ndarray]:
    r"""Pictures of a mesh that turns once about :math:`y`, for :func:`write_animation`.

    Args:
        vertices (torch.Tensor or numpy.ndarray): As in :func:`render`.
        faces (torch.Tensor or numpy.ndarray): As in :func:`render`.
        num_frames (int, optional): The number of pictures. (default: :obj:`72`)
        **kwargs (optional): Arguments of :func:`render`; :obj:`azimuth` is where it starts.

    Example:
        >>> from pyg_attnpool.visualize import turntable, write_animation
        >>> frames = turntable(meshes[0], template[1], num_frames=8, size=(80, 60))
        >>> write_animation("turn.gif", frames)
    """
    start = kwargs.pop("azimuth", 20.0)
    width, height = kwargs.get("size", (480, 480))
    points = _numpy(vertices).astype(np.float64)
    # A box that holds the mesh from every side.
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high) / 2
    radius = np.linalg.norm((points - centre)[:, [0, 2]], axis=1).max()
    extent = 1.06 * max(high[1] - low[1], 2 * radius * height / width)
    kwargs.setdefault("box", (centre, extent))
    angles = start + 360 * np.arange(num_frames) / num_frames
    return [render(vertices, faces, azimuth=angle, **kwargs) for angle in angles]


def draw_meshes(
    meshes: Tensor | ndarray | Sequence[Tensor],
    faces: Tensor | ndarray,
    **kwargs: Any,
) -> list[ndarray]:
    r"""Pictures of meshes at one scale, such as those of an interpolation, for
    :func:`write_animation`.

    Args:
        meshes (torch.Tensor, numpy.ndarray or list): Meshes :obj:`[M, N, 3]`.
        faces (torch.Tensor or numpy.ndarray): As in :func:`render`.
        **kwargs (optional): Arguments of :func:`render`.

    Example:
        >>> from pyg_attnpool.visualize import draw_meshes
        >>> [image.shape for image in draw_meshes(meshes[:2], template[1], size=(80, 60))]
        [(60, 80, 4), (60, 80, 4)]
    """
    view = {k: kwargs[k] for k in ("azimuth", "elevation") if k in kwargs}
    width, height = kwargs.get("size", (480, 480))
    kwargs.setdefault("box", view_box(meshes, aspect=width / height, **view))
    return [render(vertices, faces, **kwargs) for vertices in meshes]


def plot_mesh(
    ax: Axes,
    vertices: Tensor,
    faces: ndarray,
    values: Tensor | None = None,
    norm: Normalize | None = None,
    azimuth: float = 20.0,
) -> None:
    r"""Draws a mesh into axes of matplotlib, with :func:`render`. The axes have the mesh's unit.

    Args:
        ax (matplotlib.axes.Axes): The axes to draw in.
        vertices (torch.Tensor): Vertices :obj:`[N, 3]`.
        faces (numpy.ndarray): Faces :obj:`[F, 3]`.
        values (torch.Tensor, optional): A value per vertex :obj:`[N]`, drawn as colour.
            (default: :obj:`None`)
        norm (matplotlib.colors.Normalize, optional): The scale of the values.
            (default: :obj:`None`)
        azimuth (float, optional): As in :func:`render`. (default: :obj:`20.0`)

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from pyg_attnpool.visualize import plot_mesh
        >>> figure, ax = plt.subplots()
        >>> plot_mesh(ax, meshes[0], template[1])
        >>> plt.close(figure)
    """
    matplotlib = _matplotlib()
    points = _numpy(vertices).astype(np.float64)
    centre, extent = view_box([points], azimuth)
    colors: Any = SKIN
    if values is not None:
        norm = norm or matplotlib.colors.Normalize()
        colors = matplotlib.colormaps["viridis"](norm(_numpy(values)))[:, :3]
    # Colours that stand for values are only lightly shaded, so that they can be read.
    shade = 1.0 if values is None else 0.35
    image = render(points, faces, colors, (400, 400), azimuth, 0.0, (centre, extent), shade)
    turn, reach = _turn(azimuth, 0.0), extent / 2
    x, y, _ = turn @ centre
    sides = x - reach, x + reach, y - reach, y + reach
    ax.imshow(image, extent=sides, interpolation="antialiased")
    seen = points @ turn.T
    ax.set_xlim(seen[:, 0].min(), seen[:, 0].max())
    ax.set_ylim(seen[:, 1].min(), seen[:, 1].max())
    ax.set_aspect("equal")
    ax.set_axis_off()


def plot_reconstructions(
    path: str | Path,
    faces: ndarray,
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

    Example:
        >>> from pyg_attnpool.visualize import plot_reconstructions
        >>> plot_reconstructions("errors.png", template[1], meshes[:2], {"PCA": model(meshes[:2])})
    """
    matplotlib = _matplotlib()
    errors = {name: vertex_distances(x, meshes) for name, x in reconstructions.items()}
    largest = torch.cat([e.flatten() for e in errors.values()]).quantile(0.99).item()
    norm = matplotlib.colors.Normalize(0, largest)

    columns = ["truth", *reconstructions, *(f"error of {name}" for name in errors)]
    size = 2.1 * len(columns), 2.6 * len(meshes) + 0.6
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(meshes), len(columns), squeeze=False)
    for row, ax in enumerate(axes):
        shapes = [meshes[row], *(x[row] for x in reconstructions.values())]
        for a, shape in zip(ax, shapes, strict=False):
            plot_mesh(a, shape, faces, azimuth=azimuth)
        for a, error in zip(ax[len(shapes) :], errors.values(), strict=True):
            plot_mesh(a, meshes[row], faces, error[row], norm, azimuth)
            mean = f"{error[row].mean():.2f} mm"
            a.text(0.5, -0.02, mean, transform=a.transAxes, ha="center", va="top")
    for a, title in zip(axes[0], columns, strict=True):
        a.set_title(title)
    figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, "viridis"),
        ax=axes,
        label="error per vertex (mm)",
        extend="max",
        shrink=0.6,
        pad=0.01,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


# Drawing ##############################################################################


def _visible(
    points: ndarray, faces: ndarray, width: int, height: int
) -> tuple[ndarray, ndarray, ndarray]:
    # For every pixel whose centre some face covers: the pixel, the nearest face and the barycentric
    # weights there. Points are pixels to the right and down, and depth.
    corners = points[faces] - [0.5, 0.5, 0]  # so that centres are whole numbers
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    area = _cross(b - a, c - a)
    corners = corners[np.abs(area) > 1e-9]
    kept, area = np.flatnonzero(np.abs(area) > 1e-9), area[np.abs(area) > 1e-9]
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    # Weights are affine in the place: of the second and third corner, by their gradients.
    second = np.stack([c[:, 1] - a[:, 1], a[:, 0] - c[:, 0]], axis=1) / area[:, None]
    third = np.stack([a[:, 1] - b[:, 1], b[:, 0] - a[:, 0]], axis=1) / area[:, None]
    slope = second * (b - a)[:, 2:] + third * (c - a)[:, 2:]

    # The rows of pixels of every face, and where the face begins and ends on them.
    low = np.ceil(corners[:, :, 1].min(axis=1)).astype(np.int64).clip(0)
    high = np.floor(corners[:, :, 1].max(axis=1)).astype(np.int64).clip(max=height - 1)
    face, y = _ranges(low, high)
    begin, end = np.full(len(face), np.inf), np.full(len(face), -np.inf)
    for i in range(3):
        p, q = corners[face, i, :2], corners[face, i - 1, :2]
        rise = q[:, 1] - p[:, 1]
        crossed = ((p[:, 1] <= y) != (q[:, 1] < y)) & (rise != 0)
        x = p[:, 0] + (y - p[:, 1]) * (q - p)[:, 0] / np.where(crossed, rise, 1)
        begin = np.where(crossed, np.minimum(begin, x), begin)
        end = np.where(crossed, np.maximum(end, x), end)
    met = begin <= end
    face, y, begin, end = face[met], y[met], begin[met], end[met]
    # A centre on the border of two faces is in both; what is between them is never missed.
    first = np.ceil(begin - 1e-6).astype(np.int64).clip(0)
    last = np.floor(end + 1e-6).astype(np.int64).clip(max=width - 1)

    depth, nearest = np.full(width * height, np.inf), np.full(width * height, -1)
    base = a[:, 2] - (slope * a[:, :2]).sum(axis=1)
    span, x = _ranges(first, last)
    pixel, of = y[span] * width + x, face[span]
    z = (base[face] + slope[face, 1] * y)[span] + slope[of, 0] * x
    np.minimum.at(depth, pixel, z)
    front = z == depth[pixel]
    nearest[pixel[front]] = of[front]
    pixel = np.flatnonzero(nearest >= 0)
    face = nearest[pixel]
    offset = np.stack([pixel % width, pixel // width], axis=1) - a[face, :2]
    v, w = ((g[face] * offset).sum(axis=1) for g in (second, third))
    return pixel, kept[face], np.stack([1 - v - w, v, w], axis=1)


def _ranges(low: ndarray, high: ndarray) -> tuple[ndarray, ndarray]:
    # All whole numbers from each low to its high, and which pair each is of.
    count = (high - low + 1).clip(0)
    of = np.repeat(np.arange(len(count)), count)
    return of, low[of] + np.arange(len(of)) - (np.cumsum(count) - count)[of]


def _cross(a: ndarray, b: ndarray) -> ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _turn(azimuth: float, elevation: float) -> ndarray:
    # Rows are the viewer's right, up and back.
    a, e = np.radians(azimuth), np.radians(elevation)
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
    return about_x @ about_y


def _light(normal: ndarray) -> ndarray:
    light = np.full(len(normal), AMBIENT)
    for direction, share in LIGHTS:
        light += share * (normal @ direction / np.linalg.norm(direction)).clip(0)
    return light


def _numpy(x: Tensor | ndarray) -> ndarray:
    return x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x)


def _mesh(vertices: Tensor | ndarray, faces: Tensor | ndarray) -> tuple[ndarray, ndarray]:
    vertices, faces = _numpy(vertices).astype(np.float64), _numpy(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not np.isfinite(vertices).all():
        raise ValueError(f"Expected finite 'vertices' of shape [N, 3] (got {list(vertices.shape)})")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu" or len(faces) == 0:
        raise ValueError(
            f"Expected 'faces' of shape [F, 3] of integers (got {faces.dtype} of shape "
            f"{list(faces.shape)})"
        )
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"Expected 'faces' of vertices from 0 to {len(vertices) - 1} "
            f"(got {faces.min()} to {faces.max()})"
        )
    return vertices, faces.astype(np.int64)


# Files ################################################################################


def _pillow(image: ndarray, background: str | None) -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise _missing("pillow") from e
    picture = Image.fromarray(image, "RGBA")
    if background is None:
        return picture
    ground = Image.new("RGBA", picture.size, background)
    return Image.alpha_composite(ground, picture).convert("RGB")


def _write_mp4(path: Path, images: list[Any], fps: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as e:
        raise _missing("imageio-ffmpeg") from e
    width, height = images[0].size
    even = width - width % 2, height - height % 2  # as the coding of colours needs
    writer = imageio_ffmpeg.write_frames(
        str(path), even, fps=fps, quality=8, macro_block_size=2, ffmpeg_log_level="error"
    )
    writer.send(None)
    for image in images:
        writer.send(np.ascontiguousarray(image.crop((0, 0, *even))))
    writer.close()


def _matplotlib() -> Any:
    try:
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
    except ImportError as e:
        raise _missing("matplotlib") from e
    return matplotlib


def _missing(package: str) -> ImportError:
    return ImportError(
        f"'pyg_attnpool.visualize' requires '{package}': install it with "
        f'`pip install "pyg_attnpool[viz]"`'
    )
