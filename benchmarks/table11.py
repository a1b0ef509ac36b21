r"""Table 11: attention alone and fused with the mapping of mesh simplification; spectral, 8 latent
dimensions."""

import tyro
from experiments import Experiment, Options, Setting, spectral, sweep

ALONE = {"prior": None}
TABLE = {
    "QEM alone": Setting(spectral("qem"), {"mean": 0.939}),
    "attention alone": Setting(
        spectral("attention", down_kwargs=ALONE, up_kwargs=ALONE), {"mean": 0.693}
    ),
    "fused": Setting(spectral("attention"), {"mean": 0.519}),
}


def main(options: Options):
    table = {row: {"error": setting} for row, setting in TABLE.items()}
    experiment = Experiment("table11", "Fusing", table, rows="mapping", recipe="published")
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
