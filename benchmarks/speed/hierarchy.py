r"""Quality and speed of mesh simplification.

Quality is the mean distance of the original vertices to the coarse surface, over that of the
simplification which the authors of CoMA and of the paper use, on the meshes of the golden file.
"""

import time
from pathlib import Path

import numpy as np

from benchmarks.speed.templates import blob
from pyg_attnpool.mesh import MeshHierarchy, decimate
from pyg_attnpool.mesh.closest import closest_points

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "qem.npz"


def main(large: int = 100_000):
    golden = np.load(GOLDEN, allow_pickle=False)
    for kind in ("closed", "open"):
        vertices, faces = golden[f"{kind}_vertices"].astype(float), golden[f"{kind}_faces"]
        counts = [len(golden[f"{kind}_level{level}_vertices"]) for level in (1, 2)]
        kept = np.arange(len(vertices))
        for level, (index, coarse) in enumerate(decimate(vertices, faces, counts), start=1):
            kept = kept[index]
            _, _, distance = closest_points(vertices, vertices[kept], coarse)
            ratio = distance.mean() / golden[f"{kind}_level{level}_mean_distance"]
            print(f"{kind:6} {len(vertices)} -> {len(kept)} vertices: mean distance x {ratio:.3f}")

    start = time.perf_counter()
    hierarchy = MeshHierarchy.from_template(blob(5023))
    print(f"{hierarchy}: {time.perf_counter() - start:.1f} s, up and down included")

    template = blob(large)
    start = time.perf_counter()
    decimate(*template, [large // 4])
    print(f"{large:,} -> {large // 4:,} vertices: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
