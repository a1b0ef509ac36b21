r"""Table 8: extrapolation. Every expression in turn is in no training mesh and makes up the test
part; spectral, 8 latent dimensions."""

import tyro
from experiments import Experiment, Options, Setting, Table, pca, spectral, sweep

from pyg_attnpool.datasets import MeshDataset

MODELS = {"PCA": pca(), "QEM": spectral("qem"), "attention": spectral("attention")}


def expressions(dataset: MeshDataset) -> Table:
    if dataset.expression is None:
        raise ValueError("Expected meshes with known 'expression', as faces or coma (got none)")
    return {
        expression: {
            name: Setting(model, split={"kind": "extrapolation", "expression": expression})
            for name, model in MODELS.items()
        }
        for expression in sorted(set(dataset.expression))
    }


def main(options: Options):
    experiment = Experiment(
        "table8",
        "Extrapolation",
        expressions,
        rows="expression",
        statistics=("mean", "std", "median"),
        steps=700,
    )
    sweep(experiment, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
