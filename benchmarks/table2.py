r"""Table 2: simple and wider filters; spectral, 8 latent dimensions, with numbers of parameters."""

import tyro
from experiments import Experiment, Options, Setting, spectral, sweep

TABLE = {
    "QEM": {
        "simple": Setting(spectral("qem"), {"mean": 0.939, "shipped": 30_056}),
        "wider": Setting(spectral("qem", wider=True), {"mean": 0.682, "shipped": 179_656}),
    },
    "attention": {
        "simple": Setting(spectral("attention"), {"mean": 0.519, "shipped": 30_056}),
        "wider": Setting(spectral("attention", wider=True), {"mean": 0.441, "shipped": 179_656}),
    },
}


def main(options: Options):
    experiment = Experiment(
        "table2",
        "Filters, spectral",
        TABLE,
        rows="aggregation",
        statistics=("mean", "shipped", "trained"),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
