r"""Parameter counts of both families in both settings, in training and frozen, at COMA's sizes."""

from benchmarks.speed.templates import blob
from pyg_attnpool import MeshHierarchy, freeze
from pyg_attnpool.models import coma, neural3dmm


def main(num_vertices: int = 5023, latent: int = 8):
    hierarchy = MeshHierarchy.from_template(blob(num_vertices))
    print(f"{hierarchy}, latent size {latent}")
    for model_fn in (coma, neural3dmm):
        for wider in (False, True):
            counts = []
            for pool in ("qem", "attention"):
                model = model_fn(hierarchy, pool, latent, wider)
                counts.append(sum(p.numel() for p in model.parameters()))
            counts.append(sum(p.numel() for p in freeze(model).parameters()))
            print(
                f"{model_fn.__name__:10} {'wider' if wider else 'simple':6}  "
                "qem {:,}  attention {:,}  frozen {:,}".format(*counts)
            )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
