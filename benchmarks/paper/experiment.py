r"""What a table or figure is made of: settings by row and column."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.paper.options import Options
from pyg_attnpool.nn.attention_pool import K_POOL, K_UNPOOL, PUBLISHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.paper.tables import Results
    from pyg_attnpool.datasets import MeshDataset


@dataclass(frozen=True)
class Setting:
    r"""What a cell of a table shows the results of.

    Args:
        model (dict): As :func:`spectral`, :func:`spiral` and :func:`pca` return.
        reported (dict, optional): The paper's values of statistics.
        split (dict, optional): Arguments of :meth:`MeshDataset.split`.
        fewer (int, optional): How many times fewer steps it gets below full scale, as its steps
            take so much longer. (default: :obj:`1`)
    """

    model: dict[str, Any]
    reported: dict[str, float] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    fewer: int = 1


# How attention starts in a variant of the models.
STARTS: dict[str, dict[str, Any]] = {
    "default": {"init": "lifted", "normalization": "softmax", "fusion_weight": -2.0},
    "published": PUBLISHED,
}

# Settings by row and column.
Table = dict[Any, dict[str, Setting]]


@dataclass(frozen=True)
class Experiment:
    r"""A table or figure.

    Args:
        name (str): Its name on the command line, and that of the files that it writes.
        title (str): What it shows.
        about (str): The same in a line of help.
        table (dict or callable): Settings by row and column, or what makes them of a data set and
            options.
        rows (str): What the rows are.
        statistics (tuple, optional): Columns of the results to show, a table for each.
        steps (int, optional): Steps of a run at small scale. (default: :obj:`1700`)
        variant (str, optional): That of the models below full scale. (default: :obj:`"default"`)
        notes (tuple, optional): Sentences below the tables.
        draw (callable, optional): Draws the results of every data set into a figure.
        options (type, optional): What the command line chooses. (default: :class:`Options`)
    """

    name: str
    title: str
    about: str
    table: "Table | Callable[[MeshDataset, Any], Table]"
    rows: str
    statistics: tuple[str, ...] = ("mean",)
    steps: int = 1700
    variant: Literal["default", "published"] = "default"
    notes: tuple[str, ...] = ()
    draw: "Callable[[Figure, dict[str, Results]], None] | None" = None
    options: type[Options] = Options


# Models ###########################################################################


def spectral(pool: str, latent_channels: int = 8, **kwargs: Any) -> dict[str, Any]:
    r"""The arguments of :meth:`MorphableModel.coma`. With :obj:`fixed`, attention layers are frozen
    as they start, and nothing of them learned."""
    return {"family": "coma", "pool": pool, "latent_channels": latent_channels, **kwargs}


def spiral(pool: str, latent_channels: int = 8, **kwargs: Any) -> dict[str, Any]:
    r"""The arguments of :meth:`MorphableModel.neural3dmm`, as of :meth:`spectral`."""
    return {"family": "neural3dmm", "pool": pool, "latent_channels": latent_channels, **kwargs}


def pca(latent_channels: int = 8) -> dict[str, Any]:
    r"""The arguments of :meth:`MorphableModel.pca`."""
    return {"family": "pca", "latent_channels": latent_channels}


def layers(**kwargs: Any) -> dict[str, Any]:
    r"""The arguments of a model that hand these to all attention layers."""
    return {"down_kwargs": kwargs, "up_kwargs": kwargs}


def shortest(model: dict[str, Any], variant: str) -> dict[str, Any]:
    r"""The model without the arguments that its variant has anyway, so that tables which reach the
    same model in different ways share its results."""
    start = {**STARTS[variant], "channels": 21}
    has = {
        "K": 6,
        "wider": False,
        "fixed": False,
        "down_kwargs": {**start, "k": K_POOL},
        "up_kwargs": {**start, "k": K_UNPOOL},
    }

    def without(arguments: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in arguments.items() if k not in known or v != known[k]}

    model = {k: without(v, has[k]) if k.endswith("_kwargs") else v for k, v in model.items()}
    return without(model, {**has, "down_kwargs": {}, "up_kwargs": {}})
