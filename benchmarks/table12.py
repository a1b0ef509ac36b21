r"""Table 12: how keys and queries start; spectral, 8 latent dimensions. The last two rows are not
in the paper: keys lifted to the sphere, and the attention of the fast recipe."""

from typing import Any

import tyro
from experiments import SHARPENING, Experiment, Options, Setting, spectral, sweep

REPORTED = {"normal": 0.649, "uniform": 0.619, "positions": 0.519}


def attention(**kwargs: Any) -> dict[str, Any]:
    return spectral("attention", down_kwargs=kwargs, up_kwargs=kwargs)


def main(options: Options):
    table = {
        init: {"error": Setting(attention(init=init), {"mean": mean})}
        for init, mean in REPORTED.items()
    }
    table["lifted"] = {"error": Setting(attention(init="lifted"))}
    table["lifted, softmax, w_a from -2"] = {"error": Setting(attention(**SHARPENING))}
    experiment = Experiment(
        "table12", "Initial keys", table, rows="keys and queries", recipe="published"
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
