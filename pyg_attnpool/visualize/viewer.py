r"""A morphable model as one web page that needs no network: the mesh, a slider for every latent
dimension and the frozen decoder. :obj:`web/` holds the page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy import ndarray
from scipy.sparse import csr_array
from torch import Tensor

from pyg_attnpool.datasets.inputs import as_meshes, blocks
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import encode_all
from pyg_attnpool.models.plan import Linear, Step, Sum, decoder_plan, run_plan
from pyg_attnpool.units import metres

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
        page = _page(content, quantised)
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
    blocks = re.findall(r'<script type="[^"]*" id="(model|arrays)">(.*?)</script>', page, re.S)
    found = dict(blocks)
    if set(found) != {"model", "arrays"}:
        raise ValueError(f"Expected a page of `write_viewer` (got blocks {sorted(found)})")
    description = json.loads(found["model"])
    data = gzip.decompress(base64.b64decode(found["arrays"]))
    arrays = []
    for entry in description["arrays"]:
        count = int(np.prod(entry["shape"]))
        array = np.frombuffer(data, entry["dtype"], count, entry["offset"]).reshape(entry["shape"])
        arrays.append(array * entry["scale"] if entry["scale"] else array)
    return _restored(description["content"], arrays)


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
    steps = torch.diag(2 * std)
    moved = (_decode(model, mean + steps) - _decode(model, mean - steps)).norm(dim=-1).mean(dim=-1)
    return {
        "title": title,
        "unit": model.unit,
        "metres": metres(model.unit),
        "plan": _plan(model),
        "faces": model.faces.numpy(force=True),
        "latent": {
            "mean": mean.tolist(),
            "std": std.tolist(),
            "factor": factor.tolist(),
            # How far the surface moves between -2 and +2 standard deviations, in millimetres.
            "moved": (1000 * moved).tolist(),
        },
        "meshes": [
            {"name": "Mean", "code": mean.tolist(), "residual": None},
            *_stored(model, mean, factor, meshes, names),
        ],
    }


def _plan(model: MorphableModel) -> list[Step]:
    plan = decoder_plan(model)
    if any(isinstance(step, Linear | Sum) for step in plan[1:]):  # the page's take the code alone
        raise ValueError(
            f"Expected a MeshAutoencoder or PCA for a page (got "
            f"{type(model.autoencoder).__name__}, whose perceptrons it does not run)"
        )
    return plan


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


# How the page stores it ###############################################################


def _page(content: dict[str, Any], quantised: bool) -> str:
    arrays = _Arrays(quantised)
    description = {"content": arrays.described("", content), "arrays": arrays.entries}
    # No text of the model may end its block.
    described = json.dumps(description).replace("<", "\\u003c")
    data = base64.b64encode(gzip.compress(bytes(arrays.data), 9, mtime=0)).decode()
    template = (files("pyg_attnpool.visualize") / "web" / "viewer.html").read_text("utf-8")
    for mark, text in (
        ("<!--title-->", html.escape(content["title"])),
        ("<!--model-->", f'<script type="application/json" id="model">{described}</script>'),
        ("<!--arrays-->", f'<script type="application/gzip" id="arrays">{data}</script>'),
    ):
        template = template.replace(mark, text, 1)
    return template


class _Arrays:
    # All arrays of a page in one block of bytes. Equal ones, such as a matrix of two layers, once.
    def __init__(self, quantised: bool):
        self.quantised = quantised
        self.entries: list[dict[str, Any]] = []
        self.data = bytearray()
        self.known: dict[tuple[Any, ...], int] = {}

    def described(self, name: str, value: Any) -> Any:
        r"""A value as JSON holds it, with its arrays set aside."""
        if isinstance(value, ndarray):
            return {"array": self._add(value, self.quantised and name in QUANTISED)}
        if isinstance(value, csr_array):
            parts = {"rowptr": value.indptr, "col": value.indices, "value": value.data}
            parts = {key: self.described(key, part) for key, part in parts.items()}
            return {**parts, "shape": list(value.shape)}
        if is_dataclass(value):
            parts = {f.name: self.described(f.name, getattr(value, f.name)) for f in fields(value)}
            return {"op": type(value).__name__, **parts}
        if isinstance(value, dict):
            return {key: self.described(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.described(name, item) for item in value]
        return value

    def _add(self, array: ndarray, quantised: bool) -> int:
        scale = 0.0
        if array.dtype.kind == "f" and quantised:
            scale = float(np.abs(array).max(initial=0)) / 32767 or 1.0
            array = np.rint(array / scale).astype("<i2")
        elif array.dtype.kind == "f":
            array = array.astype("<f4")
        else:
            low, high = array.min(initial=0), array.max(initial=0)
            array = array.astype("<u2" if 0 <= low and high < 2**16 else "<i4")
        content = np.ascontiguousarray(array).tobytes()
        key = (array.dtype.str, array.shape, scale, hashlib.sha256(content).digest())
        if key not in self.known:
            self.known[key] = len(self.entries)
            entry = {"dtype": array.dtype.name, "shape": list(array.shape), "scale": scale}
            self.entries.append({**entry, "offset": len(self.data)})
            self.data += content + bytes(-len(content) % 4)  # every array begins at a whole word
        return self.known[key]


def _restored(node: Any, arrays: list[ndarray]) -> Any:
    if isinstance(node, list):
        return [_restored(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if "array" in node:
        return arrays[node["array"]]
    node = {key: _restored(item, arrays) for key, item in node.items()}
    if "rowptr" in node:
        return csr_array((node["value"], node["col"], node["rowptr"]), shape=node["shape"])
    step = STEPS.get(node.pop("op", None))
    return node if step is None else step(**node)
