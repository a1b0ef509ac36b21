r"""Table 3: learned aggregation in the encoder, the decoder, both or neither; spectral, 8 latent
dimensions."""

import tyro
from experiments import Experiment, Options, Setting, spectral, sweep

TABLE = {
    "QEM": {
        "decoder QEM": Setting(spectral("qem"), {"mean": 0.939}),
        "decoder attention": Setting(spectral("qem", up="attention"), {"mean": 0.525}),
    },
    "attention": {
        "decoder QEM": Setting(spectral("attention", up="qem"), {"mean": 0.886}),
        "decoder attention": Setting(spectral("attention"), {"mean": 0.519}),
    },
}


def main(options: Options):
    sweep(Experiment("table3", "Encoder and decoder", TABLE, rows="encoder"), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
