r"""Table 9: simple and wider filters; spiral, 8 latent dimensions, with numbers of parameters."""

import tyro
from experiments import Experiment, Options, Setting, spiral, sweep

TABLE = {
    "QEM": {
        "simple": Setting(spiral("qem"), {"mean": 0.785}),
        "wider": Setting(spiral("qem", wider=True), {"mean": 0.525}),
    },
    "attention": {
        "simple": Setting(spiral("attention"), {"mean": 0.487}),
        "wider": Setting(spiral("attention", wider=True), {"mean": 0.420}),
    },
}


def main(options: Options):
    experiment = Experiment(
        "table9",
        "Filters, spiral",
        TABLE,
        rows="aggregation",
        statistics=("mean", "shipped", "trained"),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
