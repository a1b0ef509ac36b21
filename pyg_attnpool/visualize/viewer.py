r"""A morphable model as one web page that needs no network: the mesh, a slider for every latent
dimension and the frozen decoder. :obj:`web/` holds the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from pyg_attnpool.datasets.inputs import as_meshes, blocks
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import encode_all, vertex_distances
from pyg_attnpool.models.plan import Step, decoder_plan, run_plan
from pyg_attnpool.units import metres
from pyg_attnpool.visualize.page import fill_page, read_page

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

TOLERANCE = 1e-4  # of a decoded vertex, relative to the size of the template
QUANTISED = ("weight", "scale", "value", "residual")  # biases and means stay float32
STEPS = {step.__name__: step for step in get_args(Step)}


def write_viewer(
    model: MorphableModel,
    path: str | Path,
    meshes: Any = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> float:
    r"""Writes a model as one HTML page: sliders, random meshes, the way from one mesh to another,
    displacement or error as colour, and the mesh as a file in the model's unit.

    The page holds the decoder as 16-bit integers, or as 32-bit floats where these do not keep it
    within 1e-4 of the size of the template. It is read back and compared with the model before it
    takes its name.

    Args:
        model (MorphableModel): A model around a :class:`~pyg_attnpool.models.MeshAutoencoder` with
            Chebyshev or spiral convolutions, or around a :class:`~pyg_attnpool.models.PCA`.
        path (str or Path): The file to write.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list, optional): Meshes
            :obj:`[M, N, C]` in metres that the page offers, with their errors. If :obj:`None`, it
            offers the mean and four samples. (default: :obj:`None`)
        names (list, optional): Their names. (default: :obj:`None`)
        title (str, optional): The heading; by default the name of the file.
            (default: :obj:`None`)

    Returns:
        The largest difference to the model, relative to the diagonal of the template.

    Raises:
        ValueError: If the decoder holds a layer that the page cannot run, or the meshes do not fit.
        RuntimeError: If the page would compute something that differs by more than 1e-4.

    Example:
        >>> from pyg_attnpool.visualize import write_viewer
        >>> difference = write_viewer(model, "page.html", meshes[:2], title="Blobs")
    """
    content = _describe(model, meshes, names, Path(path).stem if title is None else title)
    codes = _extremes(model)
    with torch.no_grad():
        expected = _decode(model, codes).numpy()
    size = np.linalg.norm(np.ptp(model.template.double().numpy(force=True), axis=0))
    for quantised in (True, False):
        page = fill_page("viewer", content["title"], content, QUANTISED if quantised else ())
        out = run_plan(read_viewer(page)["plan"], codes.numpy())
        difference = np.abs(out[..., :3] - expected).max() / size
        if difference <= TOLERANCE / 2:  # the page's own rounding needs the other half
            break
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"Expected a page that decodes as the model does, within {TOLERANCE:g} of the size of "
            f"the template (got a difference of {difference:g}): {path} is not written"
        )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return float(difference)


def read_viewer(page: str) -> dict[str, Any]:
    r"""Reads back what :func:`write_viewer` has stored in the text of a page.

    Returns:
        A dictionary with the :obj:`plan` that :func:`~pyg_attnpool.models.plan.run_plan` runs,
        :obj:`faces`, :obj:`latent` statistics, :obj:`meshes` and names.

    Raises:
        ValueError: If the text is no such page.

    Example:
        >>> from pyg_attnpool.visualize import read_viewer, write_viewer
        >>> difference = write_viewer(model, "page.html", meshes[:2])
        >>> sorted(read_viewer(open("page.html").read()))[:3]  # doctest: +SKIP
    """
    return read_page(page, STEPS)


@torch.no_grad()
def moved_by_dimension(model: MorphableModel) -> Tensor:
    r"""How far the surface moves, in the mean, between -2 and +2 standard deviations of every
    latent dimension :obj:`[latent_channels]`, in millimetres."""
    mean, std = (t.detach().cpu().double() for t in (model.latent_mean, model.latent_std))
    steps = torch.diag(2 * std)
    ends = _decode(model, mean + steps), _decode(model, mean - steps)
    return vertex_distances(*ends).mean(dim=-1)


# What the page shows ##################################################################


@torch.no_grad()
def _describe(
    model: MorphableModel, meshes: Any, names: Sequence[str] | None, title: str
) -> dict[str, Any]:
    mean, std, covariance = (
        t.detach().cpu().double() for t in (model.latent_mean, model.latent_std, model.latent_cov)
    )
    # The symmetric root: the covariance of dimensions that never vary has no Cholesky factor.
    values, vectors = torch.linalg.eigh(covariance)
    factor = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    return {
        "title": title,
        "unit": model.unit,
        "metres": metres(model.unit),
        "plan": decoder_plan(model),
        "faces": model.faces.numpy(force=True),
        "latent": {
            "mean": mean.tolist(),
            "std": std.tolist(),
            "factor": factor.tolist(),
            "moved": moved_by_dimension(model).tolist(),
        },
        "meshes": [
            {"name": "Mean", "code": mean.tolist(), "residual": None},
            *_stored(model, mean, factor, meshes, names),
        ],
    }


def _stored(
    model: MorphableModel, mean: Tensor, factor: Tensor, meshes: Any, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    if meshes is None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(4, len(mean), generator=generator, dtype=torch.double) @ factor + mean
        residuals = [None] * len(codes)
        given = [f"Sample {i + 1}" for i in range(len(codes))]
    else:
        codes = encode_all(model, meshes).cpu().double()
        truth = torch.cat([x.cpu().double() for x in blocks(as_meshes(meshes), 64)])
        residuals = [r.numpy() for r in truth[..., :3] - _decode(model, codes)]
        given = [f"Mesh {i + 1}" for i in range(len(codes))]
    if names is not None:
        if meshes is None or len(names) != len(given):
            count = 0 if meshes is None else len(given)
            raise ValueError(f"Expected {count} 'names', one per mesh (got {len(names)})")
        given = [str(name) for name in names]
    return [
        {"name": name, "code": code.tolist(), "residual": residual}
        for name, code, residual in zip(given, codes, residuals, strict=True)
    ]


def _decode(model: MorphableModel, codes: Tensor) -> Tensor:
    # The coordinates, a few meshes at a time.
    parts = [model.decode(z.to(model.mean)) for z in codes.split(64)]
    return torch.cat(parts)[..., :3].cpu().double()


def _extremes(model: MorphableModel) -> Tensor:
    # The ends of every slider, and random codes.
    mean, std = (t.detach().cpu().double() for t in (model.latent_mean, model.latent_std))
    ends = torch.diag(3 * std)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(8, len(mean), generator=generator, dtype=torch.double)
    return torch.cat([mean.unsqueeze(0), mean + ends, mean - ends, mean + std * noise])
