r"""CoMA, the spectral mesh autoencoder, with quadric (QEM) pooling and with learned aggregation:
the same size, the same steps, the same seed.

Reported by "Learning Feature Aggregation for Deep 3D Morphable Models" (CVPR 2021, table 2) on the
COMA faces, 8 latent channels, 300 epochs, interpolation split, mean error per vertex:

    QEM 0.939 mm    learned 0.519 mm        wider: QEM 0.682 mm    learned 0.441 mm

Reproduced on AnnyFaces (4,538 vertices, 2,271 training and 319 test meshes; at 20 frames a sequence
the test part is whole sequences that training never sees), 12 epochs of the fast recipe, one core
of an AMD EPYC (OMP_NUM_THREADS=1), seeds 0 to 2, all 8 latent channels alive:

    QEM 1.684 1.694 1.713 mm    learned 1.308 1.338 1.318 mm    PCA 1.600 mm

and with --published, seed 0: QEM 1.753 mm, learned 1.551 mm.
"""

import tyro

from pyg_attnpool import MeshHierarchy
from pyg_attnpool.comparison import Options, compare
from pyg_attnpool.models import MeshAutoencoder, coma


def main(options: Options):
    def build(hierarchy: MeshHierarchy, pool: str) -> MeshAutoencoder:
        return coma(
            hierarchy,
            pool,
            options.latent,
            options.wider,
            latent_activation="relu" if options.published else None,
            **options.attention(pool),
        )

    compare(build, options, name="coma", recipe="paper", epochs=300)


if __name__ == "__main__":
    main(tyro.cli(Options, description="CoMA with QEM pooling and with learned aggregation."))
