r"""What the pictures of models share: their options, the models, and how a mesh is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from benchmarks.paper.data import Meshes
from benchmarks.paper.experiment import Experiment, Setting, pca, spectral, spiral
from benchmarks.paper.options import Options
from benchmarks.paper.run import Run, fitted
from benchmarks.paper.sweep import settings_of
from pyg_attnpool import MorphableModel
from pyg_attnpool.files import replacing
from pyg_attnpool.training import quiet_lightning
from pyg_attnpool.visualize import render, view_box

COMPARED = {
    "PCA": Setting(pca()),
    "QEM, spectral": Setting(spectral("qem")),
    "attention, spectral": Setting(spectral("attention")),
    "QEM, spiral": Setting(spiral("qem")),
    "attention, spiral": Setting(spiral("attention")),
}
SPECTRAL = {name: COMPARED[f"{name}, spectral"] for name in ("QEM", "attention")}
STEPS = Experiment("pictures", "", "", {}, rows="model", steps=850)  # of a run at small scale


@dataclass
class PictureOptions:
    data: tuple[str, ...] = ("faces",)
    """As of a table; a picture for each."""
    scale: Literal["smoke", "small", "full"] = "small"
    """As of a table; small takes half as many steps."""
    seed: int = 0
    variant: Literal["default", "published"] | None = None
    """As of a table."""
    optimizer: Literal["one_cycle", "published"] | None = None
    """As of a table."""
    steps: int | None = None
    """Steps of a run, in place of the scale's."""
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    root: Path = Path("data")
    """Folder of the data sets."""
    unit: Literal["m", "cm", "mm"] = "m"
    """The unit of the folders' meshes."""
    output: Path = Path("runs") / "pictures"
    """Folder for pictures and models. Models that are there are not trained again, so that all
    pictures are of the same ones."""

    @property
    def accelerator(self) -> str:
        r"""cpu or cuda."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def sweep_options(self) -> Options:
        r"""The same as options of a table."""
        names = ("data", "scale", "variant", "optimizer", "steps", "device", "root", "unit")
        options = Options(**{name: getattr(self, name) for name in names}, seeds=(self.seed,))
        options.check()
        return options


class Picture(NamedTuple):
    r"""A picture of models, a file for every data set."""

    name: str
    about: str
    models: dict[str, Setting]
    draw: Callable[[Figure, Meshes, dict[str, MorphableModel]], None]
    r"""Draws into an empty figure, whose size it chooses."""

    def main(self, options: PictureOptions) -> None:
        r"""Trains what is not there yet and writes the pictures."""
        quiet_lightning()
        for name in options.data:
            meshes = Meshes(name, options.sweep_options())
            models = {
                label: trained(setting, name, meshes, options)
                for label, setting in self.models.items()
            }
            figure = Figure(layout="constrained")
            self.draw(figure, meshes, models)
            write_figure(figure, self.name, name, options)


def write_figure(figure: Figure, name: str, data: str, options: PictureOptions) -> None:
    r"""Writes a picture, named by what it shows, data set and scale."""
    path = options.output / f"{name}-{options.scale}-{Path(data).name}.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    print(path)


def run_of(setting: Setting, data: str, meshes: Meshes, options: PictureOptions) -> Run:
    r"""The training of a setting."""
    return Run(settings_of(data, meshes, setting, STEPS, options.sweep_options()), options.seed)


def trained(setting: Setting, data: str, meshes: Meshes, options: PictureOptions) -> MorphableModel:
    r"""A model of a setting, trained or as it was stored."""
    run = run_of(setting, data, meshes, options)
    folder = options.output / "models" / run.key
    if folder.exists():
        return MorphableModel.load(folder)
    parts = meshes.split(**setting.split)
    model = fitted(run, run.model(meshes), parts, None, options.accelerator).cpu()
    model.save(folder)
    return model


def show(
    ax: Axes,
    vertices: ndarray,
    faces: ndarray,
    colors: ndarray,
    azimuth: float = 20.0,
    shade: float = 0.35,
) -> None:
    r"""Draws a mesh with a colour for every vertex :obj:`[N, 3]`, lightly shaded."""
    box = view_box([vertices], azimuth)
    image = render(vertices, faces, colors, (360, 360), azimuth, box=box, shade=shade)
    drawn = np.flatnonzero(image[..., 3].any(axis=0))  # a slim mesh needs no square
    image = image[:, max(0, drawn[0] - 4) : drawn[-1] + 5]
    ax.imshow(image, interpolation="antialiased")
    ax.set_axis_off()
