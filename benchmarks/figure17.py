r"""Figure 17: the channels c of keys and queries; spectral, 8 latent dimensions."""

import tyro
from experiments import Experiment, Options, Setting, lines, spectral, sweep

CHANNELS = (5, 10, 21, 42, 84)


def attention(channels: int) -> Setting:
    kwargs = {"channels": channels}
    model = spectral("attention", down_kwargs=kwargs, up_kwargs=kwargs)
    return Setting(model, {"mean": 0.519} if channels == 21 else {})


def main(options: Options):
    experiment = Experiment(
        "figure17",
        "Channels of keys and queries",
        {channels: {"attention": attention(channels)} for channels in CHANNELS},
        rows="c",
        statistics=("mean", "trained"),
        recipe="published",
        draw=lambda figure, found: lines(figure, found, "c", log=True),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
