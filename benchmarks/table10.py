r"""Table 10: Chebyshev filters of size 6 and 3; 8 latent dimensions."""

import tyro
from experiments import Experiment, Options, Setting, spectral, sweep

TABLE = {
    "QEM": {
        "K = 6": Setting(spectral("qem", K=6), {"mean": 0.939}),
        "K = 3": Setting(spectral("qem", K=3), {"mean": 1.031}),
    },
    "attention": {
        "K = 6": Setting(spectral("attention", K=6), {"mean": 0.519}),
        "K = 3": Setting(spectral("attention", K=3), {"mean": 0.558}),
    },
}


def main(options: Options):
    sweep(Experiment("table10", "Filter size", TABLE, rows="aggregation"), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
