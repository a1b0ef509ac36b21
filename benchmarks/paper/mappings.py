r"""Figures 5, 11, 12 and 13: the mappings between levels. t-SNE puts the rows of a mapping, and its
columns, on a line, by their cosine; the place on the line is the colour of the vertex. Vertices of
one colour mix the same vertices of the other level (rows), or are mixed into the same (columns).
Where a mapping follows the surface, colours change smoothly over the mesh."""

from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.sparse import csr_array

from benchmarks.paper.data import Meshes
from benchmarks.paper.pictures import SPECTRAL, Picture, show
from pyg_attnpool import MorphableModel
from pyg_attnpool.mesh.io import edges

PERPLEXITY = 30  # neighbours that t-SNE keeps together, where there are three times as many
UNUSED = (0.75, 0.75, 0.75)  # of vertices that a mapping has nothing of
SIZE = 240  # pixels of a matrix along each side, at most
VIEWS = {"front": 20.0, "back": 200.0}  # degrees


class Side(NamedTuple):
    r"""The rows or the columns of a mapping between a level and the next coarser one."""

    direction: str  # down or up
    level: int
    kind: str  # rows or columns

    def vectors(self, model: MorphableModel) -> csr_array:
        r"""A vector :obj:`[N, M]` for every vertex of the level that is drawn."""
        matrix = matrix_of(model, self.direction, self.level)
        return matrix if self.kind == "rows" else matrix.T.tocsr()

    @property
    def drawn(self) -> int:
        r"""The level whose vertices these are."""
        coarse = (self.direction == "down") == (self.kind == "rows")
        return self.level + coarse

    def __str__(self) -> str:
        a, b = self.level, self.level + 1
        a, b = (a, b) if self.direction == "down" else (b, a)
        return f"{self.kind}, level {a} to {b}"


def matrix_of(model: MorphableModel, direction: str, level: int) -> csr_array:
    r"""The mapping between a level and the next coarser one."""
    network = model.autoencoder
    layer = network.pools[level] if direction == "down" else network.unpools[-1 - level]
    return csr_array(layer.mapping().detach().to_scipy())


def on_a_line(vectors: csr_array) -> ndarray:
    r"""The places of vectors on a line between 0 and 1, evenly spaced: like ones are neighbours.
    Those without an entry are nowhere, NaN."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as e:
        raise ImportError(
            "t-SNE requires 'scikit-learn': install it with `pip install scikit-learn`"
        ) from e
    used = np.flatnonzero(np.diff(vectors.indptr))
    place = np.full(vectors.shape[0], np.nan)
    perplexity = min(PERPLEXITY, (len(used) - 1) / 3)
    line = TSNE(1, metric="cosine", init="random", random_state=0, perplexity=perplexity)
    rank = line.fit_transform(vectors[used])[:, 0].argsort().argsort()
    place[used] = (rank + 0.5) / len(used)
    return place


def jump(place: ndarray, faces: ndarray) -> float:
    r"""How far apart the places of neighbours on the mesh are, over how far those of any two
    vertices are, which is a third."""
    a, b = place[edges(faces)].T
    return float(3 * np.nanmean(np.abs(a - b)))


def draw_sides(
    figure: Figure, meshes: Meshes, models: dict[str, MorphableModel], sides: list[Side]
) -> None:
    r"""A row for every model, and for every side of a mapping its colours from front and back."""
    hierarchy = meshes.hierarchy
    figure.set_size_inches(3.1 * len(sides), 2.2 * len(models) + 0.4)
    parts = figure.subfigures(len(models), len(sides), squeeze=False)
    for line, (name, model) in zip(parts, models.items(), strict=True):
        for part, side in zip(line, sides, strict=True):
            vertices, faces = hierarchy.vertices[side.drawn], hierarchy.faces[side.drawn]
            place = on_a_line(side.vectors(model))
            colors = matplotlib.colormaps["turbo"](place)[:, :3]
            colors[np.isnan(place)] = UNUSED
            axes = part.subplots(1, len(VIEWS))
            for ax, azimuth in zip(axes, VIEWS.values(), strict=True):
                show(ax, vertices, faces, colors, azimuth)
            title = f"{name}: {side}\nneighbours differ by {jump(place, faces):.2f}"
            part.suptitle(title, fontsize=8)


def draw_matrices(figure: Figure, meshes: Meshes, models: dict[str, MorphableModel]) -> None:
    r"""A row for every model and a column for every mapping: its largest weights, with vertices in
    the order of their place along the template's longest axis."""
    hierarchy = meshes.hierarchy
    axis = np.ptp(hierarchy.vertices[0], axis=0).argmax()
    order = [vertices[:, axis].argsort() for vertices in hierarchy.vertices]
    number = len(order) - 1
    columns = [("down", level) for level in range(number)]
    columns += [("up", level) for level in reversed(range(number))]
    figure.set_size_inches(2.0 * len(columns), 2.4 * len(models) + 0.3)
    axes = figure.subplots(len(models), len(columns), squeeze=False)
    for line, (name, model) in zip(axes, models.items(), strict=True):
        for ax, (direction, level) in zip(line, columns, strict=True):
            matrix = matrix_of(model, direction, level)
            fine, coarse = order[level], order[level + 1]
            rows, cols = (coarse, fine) if direction == "down" else (fine, coarse)
            image = shrunk(matrix[rows][:, cols])
            top = np.abs(image).max()
            # Small weights are seen too: attention has many of them.
            image = np.sign(image) * np.sqrt(np.abs(image) / top)
            ax.imshow(image, cmap="RdBu_r", norm=TwoSlopeNorm(0, -1, 1), aspect="auto")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}\n{matrix.shape[0]} × {matrix.shape[1]}", fontsize=8)
            low, high = matrix.data.min(initial=0.0), matrix.data.max(initial=0.0)
            ax.set_xlabel(f"{low:.2f} to {high:.2f}", fontsize=8)


def shrunk(matrix: csr_array) -> ndarray:
    r"""A picture of a matrix, of every block of entries the one that is largest in size."""
    entries = matrix.tocoo()
    shape = [min(SIZE, n) for n in matrix.shape]
    row, col = (c * s // n for c, s, n in zip(entries.coords, shape, matrix.shape, strict=True))
    image = np.zeros(shape)
    by_size = np.abs(entries.data).argsort()  # the largest is written last
    image[row[by_size], col[by_size]] = entries.data[by_size]
    return image


FINEST = [Side(direction, 0, kind) for direction in ("down", "up") for kind in ("rows", "columns")]


def coarser(direction: str) -> list[Side]:
    r"""The two levels after the finest."""
    return [Side(direction, level, kind) for level in (1, 2) for kind in ("rows", "columns")]


PICTURES = (
    Picture(
        "figure5",
        "the finest mappings, down and up, as colour on the mesh; QEM and attention",
        SPECTRAL,
        lambda figure, meshes, models: draw_sides(figure, meshes, models, FINEST),
    ),
    Picture(
        "figure11",
        "the mappings down of the next two levels as colour on the mesh",
        SPECTRAL,
        lambda figure, meshes, models: draw_sides(figure, meshes, models, coarser("down")),
    ),
    Picture(
        "figure12",
        "the mappings up of the next two levels as colour on the mesh",
        SPECTRAL,
        lambda figure, meshes, models: draw_sides(figure, meshes, models, coarser("up")),
    ),
    Picture("figure13", "the mappings of all levels as matrices", SPECTRAL, draw_matrices),
)
