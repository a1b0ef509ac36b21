r"""Figures 18 and 19: how many source vertices k are kept in the encoder, with 32 in the decoder,
and in the decoder, with 2 in the encoder; spectral, 8 latent dimensions."""

import tyro
from experiments import Experiment, Options, Setting, Table, lines, spectral, sweep

ENCODER = (1, 2, 4, 8, 16, 32)
DECODER = (2, 4, 8, 16, 32, 64)


def attention(encoder: int, decoder: int) -> Setting:
    model = spectral("attention", down_kwargs={"k": encoder}, up_kwargs={"k": decoder})
    return Setting(model, {"mean": 0.519} if (encoder, decoder) == (2, 32) else {})


def main(options: Options):
    table: Table = {k: {} for k in sorted({*ENCODER, *DECODER})}
    for k in ENCODER:
        table[k]["k in the encoder"] = attention(k, 32)
    for k in DECODER:
        table[k]["k in the decoder"] = attention(2, k)
    experiment = Experiment(
        "figure18_19",
        "Source vertices kept",
        table,
        rows="k",
        steps=1000,
        recipe="published",
        draw=lambda figure, found: lines(figure, found, "k", log=True),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
