r"""Figure 15: attention to the k best source vertices and to all; spectral, 8 latent dimensions."""

import tyro
from experiments import Experiment, Options, Setting, lines, spectral, sweep

ALL = {"k": None}
TABLE = {
    "top k": {"attention": Setting(spectral("attention"), {"mean": 0.519})},
    "all": {"attention": Setting(spectral("attention", down_kwargs=ALL, up_kwargs=ALL))},
}


def main(options: Options):
    experiment = Experiment(
        "figure15",
        "Top k",
        TABLE,
        rows="source vertices",
        steps=1000,
        recipe="published",
        draw=lambda figure, found: lines(figure, found, "source vertices"),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
