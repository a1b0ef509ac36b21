r"""Table 1: ways to aggregate features; spectral, 8 latent dimensions."""

import tyro
from experiments import Experiment, Options, Setting, spectral, sweep

# Dense matrices, and an assignment for every sample, take about that many times longer.
TABLE = {
    "QEM": Setting(spectral("qem"), {"mean": 0.939}),
    "full mapping": Setting(spectral("full"), {"mean": 4.319}, fewer=4),
    "DiffPool": Setting(spectral("diffpool"), {"mean": 3.964}, fewer=12),
    "average": Setting(spectral("average"), {"mean": 0.975}),
    "variant weight": Setting(spectral("variant"), {"mean": 0.928}),
    "attention": Setting(spectral("attention"), {"mean": 0.519}),
}


def main(options: Options):
    table = {row: {"error": setting} for row, setting in TABLE.items()}
    sweep(Experiment("table1", "Aggregation methods", table, rows="aggregation"), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
