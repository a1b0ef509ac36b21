r"""What the start of the attention owes to each of its parts; 8 latent dimensions. It is not in the
paper. Everything has a one-cycle learning rate and a linear latent, QEM too."""

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from experiments import START, Experiment, Options, Setting, spectral, spiral, sweep

PUBLISHED = {"init": "positions", "normalization": "sum", "fusion_weight": 0.2}
# What decides the default: w_a = -2 alone, or with lifted keys and a softmax.
STARTS = {
    "attention as published": PUBLISHED,
    "as published, w_a from -2": {**PUBLISHED, "fusion_weight": -2.0},
    "keys lifted, softmax, w_a from -2": START,
}
# The value that w_a starts from, and the parts one by one.
PARTS = {
    "keys lifted": {**PUBLISHED, "init": "lifted"},
    "keys lifted, softmax": {**START, "fusion_weight": 0.2},
    **{
        f"keys lifted, softmax, w_a from {w_a:g}": {**START, "fusion_weight": w_a}
        for w_a in (2.0, 0.0, -1.0, -3.0)
    },
}
MODELS = {"spectral": spectral, "spiral": spiral}


@dataclass
class AblationOptions(Options):
    data: tuple[str, ...] = ("faces", "bodies", "hands")
    rows: Literal["all", "starts", "default"] = "starts"
    """starts: what decides the default. default: without the published start. all: every part."""


def row(pool: str, **kwargs: Any) -> dict[str, Setting]:
    return {name: Setting(model(pool, **kwargs)) for name, model in MODELS.items()}


def main(options: AblationOptions):
    starts = {**STARTS, **PARTS} if options.rows == "all" else dict(STARTS)
    if options.rows == "default":
        del starts["attention as published"]
    table = {"QEM": row("qem")}
    for name, kwargs in starts.items():
        table[name] = row("attention", down_kwargs=kwargs, up_kwargs=kwargs)
    if options.rows == "all":
        table["w_a = -2, nothing learned"] = row("attention", fixed=True)
    sweep(
        Experiment("ablation", "Start of the attention", table, "aggregation", steps=850), options
    )


if __name__ == "__main__":
    main(tyro.cli(AblationOptions, description=__doc__))
