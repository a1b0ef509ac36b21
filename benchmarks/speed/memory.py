r"""Peak memory of training steps at COMA's sizes: 5,023 vertices, batch 16, float32."""

import torch

from benchmarks.speed import measure
from benchmarks.speed.templates import blob
from pyg_attnpool.mesh import MeshHierarchy
from pyg_attnpool.models import coma


def main(batch_size: int = 16, steps: int = 5):
    hierarchy = MeshHierarchy.from_template(blob(5023))
    x = torch.randn(batch_size, 5023, 3)
    for pool in ("qem", "attention"):
        model = coma(hierarchy, pool)

        def train(model=model):
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(steps):
                optimizer.zero_grad()
                (model(x) - x).abs().mean().backward()
                optimizer.step()

        peak = measure.peak_memory(train, "cpu")
        print(
            f"{pool:10} {hierarchy.num_vertices} batch {batch_size}, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters: "
            f"peak of the steps {'unknown' if peak is None else f'{peak / 2**30:.2f} GiB'}"
        )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
