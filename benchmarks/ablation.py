r"""What the attention of the fast recipe owes to each of its parts; 8 latent dimensions. Not in the
paper. Everything has the fast recipe's optimizer and linear latent, QEM too."""

from typing import Any

import tyro
from experiments import START, Experiment, Options, Setting, spectral, spiral, sweep

PUBLISHED = {"init": "positions", "normalization": "sum", "fusion_weight": 0.2}
ATTENTION = {
    "attention as published": PUBLISHED,
    "keys lifted": {**PUBLISHED, "init": "lifted"},
    "keys lifted, softmax": {**START, "fusion_weight": 0.2},
    **{
        f"keys lifted, softmax, w_a from {w_a:g}": {**START, "fusion_weight": w_a}
        for w_a in (2.0, 0.0, -1.0, -2.0, -3.0)
    },
    "as published, w_a from -2": {**PUBLISHED, "fusion_weight": -2.0},
}
MODELS = {"spectral": spectral, "spiral": spiral}


def row(pool: str, **kwargs: Any) -> dict[str, Setting]:
    return {name: Setting(model(pool, **kwargs)) for name, model in MODELS.items()}


def main(options: Options):
    table = {"QEM": row("qem")}
    for name, kwargs in ATTENTION.items():
        table[name] = row("attention", down_kwargs=kwargs, up_kwargs=kwargs)
    table["w_a = -2, nothing learned"] = row("attention", fixed=True)
    experiment = Experiment(
        "ablation", "Attention of the fast recipe", table, rows="aggregation", steps=850
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
