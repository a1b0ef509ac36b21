r"""How long it takes to find the spirals of a mesh."""

import time

from benchmarks.speed.templates import blob
from pyg_attnpool.mesh import spiral_sequences


def main(num_vertices: tuple[int, ...] = (5_000, 100_000)):
    for n in num_vertices:
        template = blob(n)
        for options in ({"hops": 1}, {"hops": 2}, {"length": 9}):
            start = time.perf_counter()
            spirals = spiral_sequences(*template, **options)
            seconds = time.perf_counter() - start
            print(f"{n:8,} vertices, {options}: {spirals.shape[1]} steps, {seconds:.2f} s")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
