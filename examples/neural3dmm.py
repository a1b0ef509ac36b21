r"""Neural3DMM, the spiral mesh autoencoder, with quadric (QEM) pooling and with learned
aggregation: the same size, the same steps, the same seed.

Reported by "Learning Feature Aggregation for Deep 3D Morphable Models" (CVPR 2021, table 9) on the
COMA faces, 8 latent channels, 200 epochs, interpolation split, mean error per vertex:

    QEM 0.785 mm    learned 0.487 mm        wider: QEM 0.525 mm    learned 0.420 mm

Reproduced by version 0.1.0 on AnnyFaces (as in examples/coma.py), 12 epochs of one cycle, seed 0:

    QEM 1.238 mm    learned 1.003 mm    PCA 1.600 mm
"""

from dataclasses import dataclass

import tyro
from coma import Options, compare

from pyg_attnpool import MeshHierarchy, MorphableModel


@dataclass
class SpiralOptions(Options):
    hops: int = 1
    """Rings of a spiral; Neural3DMM's own default is 2 with --dilation 2 2 1 1 and --wider."""
    dilation: tuple[int, ...] = (1, 1, 1, 1)
    """The step along a spiral at every level, from fine to coarse."""


def main(options: SpiralOptions):
    def build(hierarchy: MeshHierarchy, pool: str) -> MorphableModel:
        return MorphableModel.neural3dmm(
            hierarchy,
            options.latent,
            pool,
            options.unit,
            wider=options.wider,
            hops=options.hops,
            dilation=options.dilation,
            variant=options.variant,
        )

    compare(build, options, "neural3dmm")


if __name__ == "__main__":
    description = "Neural3DMM with QEM pooling and with learned aggregation."
    main(tyro.cli(SpiralOptions, description=description))
