r"""What the command line chooses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class Options:
    data: tuple[str, ...] = ("faces",)
    """faces, bodies or hands, made here, and as detailed_faces and so on with the detail of scans;
    coma, dfaust or synhand; or folders of registered meshes."""
    scale: Literal["smoke", "small", "full"] = "small"
    """A few steps on a mesh of a few hundred vertices; about an hour on two cores; or as many
    epochs as published, on as many meshes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    variant: Literal["default", "published"] | None = None
    """published: attention from the paper's start, and CoMA's ReLU on the latent. default: the
    start that wins, and a linear latent, for every pooling. Unless given, it is published at full
    scale, and in tables that vary what is published."""
    optimizer: Literal["one_cycle", "published"] | None = None
    """one_cycle: Adam with a one-cycle learning rate. published: SGD for spectral models, Adam for
    spiral ones, both with a rate that decays. Unless given, it is published at full scale, else
    one_cycle."""
    steps: int | None = None
    """Steps of a run, in place of the scale's."""
    device: str = "auto"
    """cpu, cuda, or whichever is there."""
    jobs: int = 1
    """Runs that train side by side, each in a process with its share of the cores."""
    root: Path = Path("data")
    """Folder of the data sets: AnnyFaces, AnnyBodies and AnnyHands are made there; CoMA,
    DynamicFAUST and SynHand are where these put their files."""
    unit: Literal["m", "cm", "mm"] = "m"
    """The unit of the folders' meshes."""
    output: Path | None = None
    """Folder for everything written; by default runs/ and the name of table, scale and data."""
    resume: bool = False
    """Go on where an earlier sweep into the same folder was cut off."""
    reuse: tuple[Path, ...] = ()
    """CSV files of other sweeps. What they have of the same settings and seeds is taken from there:
    tables share settings, and a run takes hours at full scale."""

    def check(self):
        r"""Raises a :class:`ValueError` or :class:`FileNotFoundError` if something cannot be
        meant."""
        for name in ("data", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"Expected different '{name}', at least one (got {list(values)})")
        for name in ("steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected positive '{name}' (got {value})")
        for path in self.reuse:
            if not path.exists():
                raise FileNotFoundError(f"Expected results of a sweep in {path} (got no such file)")
