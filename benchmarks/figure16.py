r"""Figure 16: the initial share w_a of attention in the fused mapping; spectral, 8 latent
dimensions."""

import tyro
from experiments import Experiment, Options, Setting, lines, spectral, sweep

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def attention(share: float) -> Setting:
    kwargs = {"fusion_weight": share}
    model = spectral("attention", down_kwargs=kwargs, up_kwargs=kwargs)
    return Setting(model, {"mean": 0.519} if share == 0.2 else {})


def main(options: Options):
    experiment = Experiment(
        "figure16",
        "Initial w_a",
        {share: {"attention": attention(share)} for share in SHARES},
        rows="initial w_a",
        recipe="published",
        draw=lambda figure, found: lines(figure, found, "initial w_a"),
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
