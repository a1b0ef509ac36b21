r"""Figure 6: the receptive fields of some vertices at the finest unpooling, which vertices of the
coarser level each of them mixes, from the start of a training to its end."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.spatial import cKDTree

from benchmarks.paper.data import Meshes
from benchmarks.paper.pictures import SPECTRAL, PictureOptions, run_of, show, write_figure
from benchmarks.paper.run import fitted
from pyg_attnpool import Mapping, MorphableModel
from pyg_attnpool.files import read_arrays, replacing
from pyg_attnpool.mesh.io import edges
from pyg_attnpool.mesh.normals import vertex_normals
from pyg_attnpool.training import quiet_lightning

ABOUT = "receptive fields of chosen vertices at the finest unpooling, while it is trained"
CHOSEN = 9  # vertices
SHARES = (1 / 6, 1 / 3, 2 / 3, 1)  # of all epochs, at which the fields are drawn; and the first
AZIMUTH = 20.0
NOTHING = 0.88  # the grey of vertices that none of the chosen mixes


class Record(pl.Callback):
    r"""The finest unpooling at the ends of some epochs; 0 is the start."""

    def __init__(self, epochs: Sequence[int]):
        self.epochs = epochs
        self.found: dict[int, Mapping] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._keep(0, module.model)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 in self.epochs:
            self._keep(trainer.current_epoch + 1, module.model)

    @torch.no_grad()
    def _keep(self, epoch: int, model: MorphableModel) -> None:
        mapping = model.autoencoder.unpools[-1].mapping().to("cpu")
        self.found[epoch] = Mapping(
            mapping.index.clone(), mapping.weight.clone(), mapping.num_source
        )


def recorded(name: str, meshes: Meshes, options: PictureOptions) -> dict[int, Mapping]:
    r"""The finest unpooling by epoch, of a training or as it was stored."""
    run = run_of(SPECTRAL["attention"], name, meshes, options)
    path = options.output / "models" / f"{run.key}-unpooling.npz"
    number = meshes.hierarchy.num_vertices[1]
    if path.exists():
        arrays = read_arrays(path)
        columns = (arrays[name] for name in ("epochs", "index", "weight"))
        return {
            int(epoch): Mapping(torch.from_numpy(index), torch.from_numpy(weight), number)
            for epoch, index, weight in zip(*columns, strict=True)
        }
    last = int(run["epochs"])
    record = Record(sorted({1, *(max(1, round(share * last)) for share in SHARES)}))
    parts = meshes.split()
    fitted(run, run.model(meshes), parts, None, options.accelerator, callbacks=[record])
    arrays = {
        "epochs": np.array(list(record.found)),
        "index": torch.stack([m.index for m in record.found.values()]).numpy(),
        "weight": torch.stack([m.weight for m in record.found.values()]).numpy(),
    }
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)
    return record.found


def chosen(vertices: ndarray, faces: ndarray) -> list[int]:
    r"""Vertices that are seen from the front and far from each other."""
    a = np.radians(AZIMUTH)
    right, viewer = np.array([np.cos(a), 0, np.sin(a)]), np.array([-np.sin(a), 0, np.cos(a)])
    # What faces the viewer and has nothing far before it within an edge: no teeth, no eyes.
    ends = vertices[edges(faces)]
    edge = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1).mean()
    depth = vertices @ viewer
    near = cKDTree(np.stack([vertices @ right, vertices[:, 1]], axis=1)).query_pairs(
        edge, output_type="ndarray"
    )
    front = depth.copy()
    for one, other in (near.T, near.T[::-1]):
        np.maximum.at(front, one, depth[other])
    seen = (vertex_normals(vertices, faces) @ viewer > 0.5) & (depth > front - 2 * edge)
    middle = vertices[seen].mean(axis=0)
    found = [int(np.where(seen, np.linalg.norm(vertices - middle, axis=1), np.inf).argmin())]
    distance = np.where(seen, np.inf, -np.inf)
    while len(found) < CHOSEN:
        distance = np.minimum(distance, np.linalg.norm(vertices - vertices[found[-1]], axis=1))
        found.append(int(distance.argmax()))
    return found


def fields(mapping: Mapping, vertices: list[int]) -> ndarray:
    r"""Colours :obj:`[M, 3]` of the coarser level: the hue says which of the vertices mixes one
    most, the saturation how much, by the square root of its share of the largest weight."""
    weight = torch.zeros(len(vertices), mapping.num_source)
    weight.scatter_add_(1, mapping.index[vertices], mapping.weight[vertices].float())
    share = weight.abs() / weight.abs().amax(dim=1, keepdim=True)
    most, owner = share.max(dim=0)
    hues = matplotlib.colormaps["hsv"](np.arange(len(vertices)) / len(vertices))[:, :3]
    saturation = most.sqrt().numpy()[:, None]
    return saturation * hues[owner.numpy()] + (1 - saturation) * NOTHING


def draw(figure: Figure, meshes: Meshes, steps: dict[int, Mapping]) -> None:
    r"""The fields of QEM, then those of attention epoch by epoch."""
    hierarchy = meshes.hierarchy
    vertices, faces = hierarchy.vertices[1], hierarchy.faces[1]
    some = chosen(hierarchy.vertices[0], hierarchy.faces[0])
    shown = {"QEM": hierarchy.up[0]}
    shown |= {f"epoch {epoch}" if epoch else "start": m for epoch, m in steps.items()}
    figure.set_size_inches(2.6 * len(shown), 3.4)
    for ax, (title, mapping) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        show(ax, vertices, faces, fields(mapping, some), AZIMUTH)
        low, high = (getattr(mapping.weight[some], f)().item() for f in ("min", "max"))
        ax.set_title(f"{title}\nweights {low:.2f} to {high:.2f}", fontsize=9)


def main(options: PictureOptions) -> None:
    r"""Trains the attention of a picture and writes it, for every data set."""
    quiet_lightning()
    for name in options.data:
        meshes = Meshes(name, options.sweep_options())
        steps = recorded(name, meshes, options)
        figure = Figure(layout="constrained")
        draw(figure, meshes, steps)
        write_figure(figure, "figure6", name, options)
