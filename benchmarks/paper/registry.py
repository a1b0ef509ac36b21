r"""What varies: every table and figure that :mod:`benchmarks.paper` makes, in the order of its
help. Models have 8 latent dimensions where nothing else is said."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from benchmarks.paper.experiment import (
    STARTS,
    Experiment,
    Setting,
    Table,
    layers,
    pca,
    spectral,
    spiral,
)
from benchmarks.paper.figures import cumulative, lines
from benchmarks.paper.options import Options
from pyg_attnpool.datasets import MeshDataset

DEFAULT, PUBLISHED = STARTS["default"], STARTS["published"]
PCA = Setting(pca())


def with_pca(table: Table) -> Table:
    r"""The table with PCA as its last row, the same in every column."""
    return {**table, "PCA": dict.fromkeys(next(iter(table.values())), PCA)}


def beside_pca(table: Table) -> Table:
    r"""The table with PCA as its last column, the same in every row."""
    return {row: {**columns, "PCA": PCA} for row, columns in table.items()}


def column(settings: Mapping[Any, Setting], name: str = "error") -> Table:
    r"""A table of one column."""
    return {row: {name: setting} for row, setting in settings.items()}


def attention(reported: float | None = None, **kwargs: Any) -> Setting:
    r"""The spectral model with these arguments for all attention layers."""
    known = {} if reported is None else {"mean": reported}
    return Setting(spectral("attention", **layers(**kwargs)), known)


def varied(name: str, values: tuple[Any, ...], published: Any) -> Table:
    r"""One argument of the attention layers, the paper's value among others."""
    settings = {
        value: attention(0.519 if value == published else None, **{name: value}) for value in values
    }
    return beside_pca(column(settings, "attention"))


# Tables that depend on the data set or on options #################################


def by_expression(dataset: MeshDataset, options: Options) -> Table:
    if dataset.expression is None:
        raise ValueError("Expected meshes with known 'expression', as faces or coma (got none)")
    models = {"PCA": pca(), "QEM": spectral("qem"), "attention": spectral("attention")}
    return {
        expression: {
            name: Setting(model, split={"kind": "extrapolation", "expression": expression})
            for name, model in models.items()
        }
        for expression in sorted(set(dataset.expression))
    }


@dataclass
class LatentOptions(Options):
    data: tuple[str, ...] = ("faces", "bodies", "hands")
    latent: tuple[int, ...] = (8, 16, 32, 64)
    """Sizes of the latent code."""

    def check(self):
        super().check()
        if not self.latent or min(self.latent) < 1 or len(set(self.latent)) != len(self.latent):
            raise ValueError(f"Expected different positive 'latent' (got {list(self.latent)})")


def by_latent(dataset: MeshDataset, options: LatentOptions) -> Table:
    models = {
        "QEM, spectral": (spectral, "qem", 0.939),
        "attention, spectral": (spectral, "attention", 0.519),
        "QEM, spiral": (spiral, "qem", 0.785),
        "attention, spiral": (spiral, "attention", 0.487),
    }
    return {
        size: {
            **{
                name: Setting(model(pool, size), {"mean": mean} if size == 8 else {})
                for name, (model, pool, mean) in models.items()
            },
            "PCA": Setting(pca(size)),
        }
        for size in options.latent
    }


@dataclass
class AblationOptions(Options):
    data: tuple[str, ...] = ("faces", "bodies", "hands")
    rows: Literal["all", "starts", "default"] = "starts"
    """starts: what decides the default. default: without the published start. all: every part."""


# What decides the default: w_a = -2 alone, or with lifted keys and a softmax.
DECISIVE = {
    "attention as published": PUBLISHED,
    "as published, w_a from -2": {**PUBLISHED, "fusion_weight": -2.0},
    "keys lifted, softmax, w_a from -2": DEFAULT,
}
# The value that w_a starts from, and the parts one by one.
PARTS = {
    "keys lifted": {**PUBLISHED, "init": "lifted"},
    "keys lifted, softmax": {**DEFAULT, "fusion_weight": 0.2},
    **{
        f"keys lifted, softmax, w_a from {w_a:g}": {**DEFAULT, "fusion_weight": w_a}
        for w_a in (2.0, 0.0, -1.0, -3.0)
    },
}


def by_start(dataset: MeshDataset, options: AblationOptions) -> Table:
    def row(pool: str, **kwargs: Any) -> dict[str, Setting]:
        models = {"spectral": spectral, "spiral": spiral}
        return {name: Setting(model(pool, **kwargs)) for name, model in models.items()}

    starts = {**DECISIVE, **PARTS} if options.rows == "all" else dict(DECISIVE)
    if options.rows == "default":
        del starts["attention as published"]
    table = {"QEM": row("qem")}
    for name, kwargs in starts.items():
        table[name] = row("attention", **layers(**kwargs))
    if options.rows == "all":
        table["w_a = -2, nothing learned"] = row("attention", fixed=True)
    return with_pca(table)


def by_k(encoder: tuple[int, ...], decoder: tuple[int, ...]) -> Table:
    def kept(down: int, up: int) -> Setting:
        model = spectral("attention", down_kwargs={"k": down}, up_kwargs={"k": up})
        return Setting(model, {"mean": 0.519} if (down, up) == (2, 32) else {})

    table: Table = {k: {} for k in sorted({*encoder, *decoder})}
    for k in encoder:
        table[k]["k in the encoder"] = kept(k, 32)
    for k in decoder:
        table[k]["k in the decoder"] = kept(2, k)
    return beside_pca(table)


# All of them ######################################################################

EXPERIMENTS = (
    Experiment(
        "table1",
        "Aggregation methods",
        "QEM, full mapping, DiffPool, average, variant weight, attention; spectral",
        # Dense matrices, and an assignment for every sample, take about that many times longer.
        with_pca(
            column(
                {
                    "QEM": Setting(spectral("qem"), {"mean": 0.939}),
                    "full mapping": Setting(spectral("full"), {"mean": 4.319}, fewer=4),
                    "DiffPool": Setting(spectral("diffpool"), {"mean": 3.964}, fewer=12),
                    "average": Setting(spectral("average"), {"mean": 0.975}),
                    "variant weight": Setting(spectral("variant"), {"mean": 0.928}),
                    "attention": Setting(spectral("attention"), {"mean": 0.519}),
                }
            )
        ),
        rows="aggregation",
    ),
    Experiment(
        "table2",
        "Filters, spectral",
        "simple and wider filters, with numbers of parameters; spectral",
        with_pca(
            {
                "QEM": {
                    "simple": Setting(spectral("qem"), {"mean": 0.939, "shipped": 30_056}),
                    "wider": Setting(
                        spectral("qem", wider=True), {"mean": 0.682, "shipped": 179_656}
                    ),
                },
                "attention": {
                    "simple": Setting(spectral("attention"), {"mean": 0.519, "shipped": 30_056}),
                    "wider": Setting(
                        spectral("attention", wider=True), {"mean": 0.441, "shipped": 179_656}
                    ),
                },
            }
        ),
        rows="aggregation",
        statistics=("mean", "shipped", "trained"),
    ),
    Experiment(
        "table3",
        "Encoder and decoder",
        "QEM or attention, in the encoder and in the decoder; spectral",
        with_pca(
            {
                "QEM": {
                    "decoder QEM": Setting(spectral("qem"), {"mean": 0.939}),
                    "decoder attention": Setting(spectral("qem", up="attention"), {"mean": 0.525}),
                },
                "attention": {
                    "decoder QEM": Setting(spectral("attention", up="qem"), {"mean": 0.886}),
                    "decoder attention": Setting(spectral("attention"), {"mean": 0.519}),
                },
            }
        ),
        rows="encoder",
    ),
    Experiment(
        "table8",
        "Extrapolation",
        "every expression in turn in no training mesh and all of the test part; spectral",
        by_expression,
        rows="expression",
        statistics=("mean", "std", "median"),
        steps=700,
    ),
    Experiment(
        "table9",
        "Filters, spiral",
        "simple and wider filters, with numbers of parameters; spiral",
        with_pca(
            {
                "QEM": {
                    "simple": Setting(spiral("qem"), {"mean": 0.785}),
                    "wider": Setting(spiral("qem", wider=True), {"mean": 0.525}),
                },
                "attention": {
                    "simple": Setting(spiral("attention"), {"mean": 0.487}),
                    "wider": Setting(spiral("attention", wider=True), {"mean": 0.420}),
                },
            }
        ),
        rows="aggregation",
        statistics=("mean", "shipped", "trained"),
    ),
    Experiment(
        "table10",
        "Filter size",
        "Chebyshev filters of size 6 and 3",
        with_pca(
            {
                "QEM": {
                    "K = 6": Setting(spectral("qem", K=6), {"mean": 0.939}),
                    "K = 3": Setting(spectral("qem", K=3), {"mean": 1.031}),
                },
                "attention": {
                    "K = 6": Setting(spectral("attention", K=6), {"mean": 0.519}),
                    "K = 3": Setting(spectral("attention", K=3), {"mean": 0.558}),
                },
            }
        ),
        rows="aggregation",
    ),
    Experiment(
        "table11",
        "Fusing",
        "QEM alone, attention alone, both fused; spectral",
        with_pca(
            column(
                {
                    "QEM alone": Setting(spectral("qem"), {"mean": 0.939}),
                    "attention alone": attention(0.693, prior=None),
                    "fused": attention(0.519),
                }
            )
        ),
        rows="mapping",
        variant="published",
    ),
    Experiment(
        "table12",
        "Initial keys",
        "how keys and queries start; the paper's three, and two of ours; spectral",
        with_pca(
            column(
                {
                    "normal": attention(0.649, init="normal"),
                    "uniform": attention(0.619, init="uniform"),
                    "positions": attention(0.519, init="positions"),
                    "lifted": attention(init="lifted"),
                    "lifted, softmax, w_a from -2": attention(**DEFAULT),
                }
            )
        ),
        rows="keys and queries",
        variant="published",
    ),
    Experiment(
        "figure3",
        "Latent size",
        "error by latent size; QEM and attention, spectral and spiral, PCA; three data sets",
        by_latent,
        rows="latent dimensions",
        steps=400,
        draw=partial(lines, label="latent dimensions", log=True),
        options=LatentOptions,
    ),
    Experiment(
        "figure10",
        "Cumulative error",
        "vertices whose error is below a bound; QEM and attention, spectral and spiral, PCA",
        with_pca(
            {
                "QEM": {
                    "spectral": Setting(spectral("qem"), {"mean": 0.939}),
                    "spiral": Setting(spiral("qem"), {"mean": 0.785}),
                },
                "attention": {
                    "spectral": Setting(spectral("attention"), {"mean": 0.519}),
                    "spiral": Setting(spiral("attention"), {"mean": 0.487}),
                },
            }
        ),
        rows="aggregation",
        statistics=("mean", "median"),
        notes=("Thin lines are seeds.",),
        draw=cumulative,
    ),
    Experiment(
        "figure15",
        "Top k",
        "attention to the k best source vertices and to all; spectral",
        beside_pca(column({"top k": attention(0.519), "all": attention(k=None)}, name="attention")),
        rows="source vertices",
        steps=1000,
        variant="published",
        draw=partial(lines, label="source vertices"),
    ),
    Experiment(
        "figure16",
        "Initial w_a",
        "the initial share w_a of attention in the fused mapping; spectral",
        varied("fusion_weight", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), published=0.2),
        rows="initial w_a",
        variant="published",
        draw=partial(lines, label="initial w_a"),
    ),
    Experiment(
        "figure17",
        "Channels of keys and queries",
        "the channels c of keys and queries; spectral",
        varied("channels", (5, 10, 21, 42, 84), published=21),
        rows="c",
        statistics=("mean", "trained"),
        variant="published",
        draw=partial(lines, label="c", log=True),
    ),
    Experiment(
        "figure18_19",
        "Source vertices kept",
        "k in the encoder with 32 in the decoder, and in the decoder with 2 in the encoder",
        by_k(encoder=(1, 2, 4, 8, 16, 32), decoder=(2, 4, 8, 16, 32, 64)),
        rows="k",
        steps=1000,
        variant="published",
        draw=partial(lines, label="k", log=True),
    ),
    Experiment(
        "ablation",
        "Start of the attention",
        "not in the paper: the parts of the default start; three data sets",
        by_start,
        rows="aggregation",
        steps=850,
        options=AblationOptions,
    ),
)
