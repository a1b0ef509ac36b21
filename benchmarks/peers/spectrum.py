r"""How hard a set is, before any network sees it: what principal components leave of test meshes,
and on which lengths of the template meshes differ:

    python -m benchmarks.peers.spectrum --data faces "detailed faces"

Writes :obj:`spectrum.md` to the folder of results."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse.linalg import eigsh
from torch import Tensor

from benchmarks.peers.data import SETS
from pyg_attnpool.datasets.anny.detail import operators
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import vertex_distances

COMPONENTS = (2, 4, 8, 16, 32, 64, 128)
BANDS = (1, 10, 30, 100, 300, 600)  # numbers of eigenvectors, the constant one first

PUBLISHED = """\
Published beside it: of COMA's unseen expressions at latent size 8, PCA leaves 1.6 to 2.0 mm where
CoMA leaves 0.96 to 1.38 (table 8 of the attention pooling paper)."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.spectrum")
    parser.add_argument("--data", nargs="+", choices=SETS, default=["faces", "detailed faces"])
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"))
    options = parser.parse_args(arguments)
    errors, bands = [], []
    for name in options.data:
        dataset = SETS[name].build(options.root)
        train, _, test = (dataset.read(part) for part in dataset.split())
        found = pca_errors(train, test, COMPONENTS)
        errors.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |")
        found = band_sizes(train, *dataset.template)
        bands.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |")
        print(errors[-1], bands[-1], sep="\n", flush=True)
    ranges = [f"{a + 1} to {b}" for a, b in pairwise(BANDS)]
    text = "\n".join(
        [
            "# What the sets are like",
            "",
            f"    {shlex.join(['python', '-m', 'benchmarks.peers.spectrum', *sys.argv[1:]])}",
            "",
            "Mean error (mm) of test meshes by the number of principal components:",
            "",
            "| | " + " | ".join(map(str, COMPONENTS)) + " |",
            "|---" * (len(COMPONENTS) + 1) + "|",
            *errors,
            "",
            PUBLISHED,
            "",
            "How far training meshes are from their mean (mm, root of the mean square), by the "
            "eigenvectors of the template's Laplacian, from long to short waves:",
            "",
            "| | 1 | " + " | ".join(ranges) + f" | from {BANDS[-1] + 1} |",
            "|---" * (len(BANDS) + 2) + "|",
            *bands,
            "",
        ]
    )
    options.output.mkdir(parents=True, exist_ok=True)
    with replacing(options.output / "spectrum.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def pca_errors(train: Tensor, test: Tensor, components: Sequence[int]) -> list[float]:
    r"""The mean distance in mm that so many principal components leave, in double precision."""
    x = train.double().flatten(1)
    mean = x.mean(dim=0)
    x, y = x - mean, test.double().flatten(1) - mean
    values, vectors = torch.linalg.eigh(x @ x.t())
    most = max(components)
    basis = (x.t() @ vectors[:, -most:]) / values[-most:].sqrt()
    code = y @ basis
    errors = []
    for num in components:
        out = code[:, most - num :] @ basis[:, most - num :].t()
        both = (meshes.view(len(y), -1, 3) for meshes in (out, y))  # about the mean
        errors.append(vertex_distances(*both).mean().item())
    return errors


def band_sizes(meshes: Tensor, vertices: ndarray, faces: ndarray) -> list[float]:
    r"""The root mean square in mm of displacements from the mean mesh, by bands of eigenvectors of
    the Laplacian of the template; what is left beyond the last one comes last."""
    mass, stiffness = operators(vertices, faces)
    weight = torch.from_numpy(mass.diagonal() / mass.diagonal().sum())
    start = np.random.default_rng(0).standard_normal(len(vertices))
    # About a small negative number: the Laplacian itself has no inverse.
    sigma = -1e-3 * stiffness.diagonal().sum() / mass.diagonal().sum()
    _, basis = eigsh(stiffness, BANDS[-1], mass, sigma=sigma, v0=start)
    basis = torch.from_numpy(basis * mass.diagonal().sum() ** 0.5)
    few = meshes[:: max(1, len(meshes) // 500)].double()
    away = few - few.mean(dim=0)
    total = (away.square().sum(dim=-1) * weight).sum(dim=1).mean()
    code = torch.einsum("nk,bnc->bkc", basis * weight[:, None], away)
    energy = code.square().sum(dim=-1).mean(dim=0)
    parts = [energy[a:b].sum() for a, b in zip((0, *BANDS), BANDS, strict=False)]
    left = (total - energy.sum()).clamp(min=0)
    return [1000 * float(part) ** 0.5 for part in (*parts, left)]


if __name__ == "__main__":
    main()
