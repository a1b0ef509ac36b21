r"""Figure 3: error by latent size; quadric (QEM) and learned aggregation, spectral and spiral, on
three data sets."""

from dataclasses import dataclass

import tyro
from experiments import Experiment, Options, Setting, lines, spectral, spiral, sweep

MODELS = {
    "QEM, spectral": (spectral, "qem", 0.939),
    "attention, spectral": (spectral, "attention", 0.519),
    "QEM, spiral": (spiral, "qem", 0.785),
    "attention, spiral": (spiral, "attention", 0.487),
}


@dataclass
class LatentOptions(Options):
    data: tuple[str, ...] = ("faces", "bodies", "hands")
    latent: tuple[int, ...] = (8, 16, 32, 64)
    """Sizes of the latent code."""


def main(options: LatentOptions):
    table = {
        size: {
            name: Setting(model(pool, size), {"mean": mean} if size == 8 else {})
            for name, (model, pool, mean) in MODELS.items()
        }
        for size in options.latent
    }
    experiment = Experiment(
        "figure3",
        "Latent size",
        table,
        rows="latent dimensions",
        steps=400,
        draw=lambda figure, found: lines(figure, found, "latent dimensions", log=True),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(LatentOptions, description=__doc__))
