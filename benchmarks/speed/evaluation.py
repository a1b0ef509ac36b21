r"""Peak memory and time of an evaluation by the number of meshes, with the exact median: one mesh
again and again, which takes no memory itself, against another."""

import time

import torch

from benchmarks.speed import measure
from benchmarks.speed.templates import blob
from pyg_attnpool.models import MorphableModel


def main(num_vertices: int = 5023, num_meshes: tuple[int, ...] = (1000, 4000, 10_000)):
    vertices, faces = blob(num_vertices)
    model = MorphableModel.pca((vertices, faces), latent_channels=8)
    mesh = torch.from_numpy(vertices).float() + 0.003 * torch.randn(1, num_vertices, 3)
    model.evaluate(mesh)  # what the first call allocates for good
    for number in num_meshes:
        found, meshes = {}, mesh.expand(number, -1, -1)
        start = time.perf_counter()
        peak = measure.peak_memory(lambda: found.update(model.evaluate(meshes)), "cpu")  # noqa: B023
        held = 4 * number * num_vertices / 2**20
        print(
            f"{number:,} meshes of {num_vertices:,} vertices: {time.perf_counter() - start:.1f} s, "
            f"peak {'unknown' if peak is None else f'{peak / 2**20:,.0f} MiB'} "
            f"(all distances {held:,.0f} MiB), median {found['median']:.6f} mm"
        )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
