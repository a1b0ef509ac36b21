r"""The report of a training or of a comparison, as one web page that needs no network (extra
:obj:`viz`). :obj:`web/` holds the page."""

from __future__ import annotations

import base64
import csv
import html
import io
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from pyg_attnpool.datasets.cache import progress_bar
from pyg_attnpool.datasets.inputs import as_meshes, blocks
from pyg_attnpool.datasets.mesh_dataset import MeshDataset
from pyg_attnpool.files import replacing
from pyg_attnpool.metrics import evaluating, vertex_distances
from pyg_attnpool.models.storage import describe
from pyg_attnpool.nn.base import PoolingLayer
from pyg_attnpool.units import one_warning
from pyg_attnpool.visualize.charts import COLORS, histogram, lines
from pyg_attnpool.visualize.page import fill_page
from pyg_attnpool.visualize.pictures import render, view_box
from pyg_attnpool.visualize.viewer import moved_by_dimension

if TYPE_CHECKING:
    from pyg_attnpool.models import MorphableModel

WORST = 5  # meshes that the model with the smallest error is worst at
SPREAD = 5  # further meshes that can be turned, evenly spread over all
BYTES = 2_200_000  # of all meshes that can be turned, at most: a page stays below 4 MB

Curve = dict[str, list[tuple[int, float]]]


@one_warning()
def write_report(
    path: str | Path,
    models: Mapping[str, MorphableModel],
    meshes: Any,
    folders: Mapping[str, Path] | None = None,
    title: str | None = None,
) -> None:
    r"""Writes how good models are, and how they became so: learning curves, errors and their
    distribution, error maps on meshes that can be turned, the worst meshes, what every latent
    dimension moves, the mappings between levels, settings and versions.

    Args:
        path (str or Path): The file to write.
        models (dict): Models of one template by name, such as those of one comparison.
        meshes (torch.Tensor, MeshDataset, numpy.ndarray or list): Test meshes :obj:`[M, N, C]` in
            metres, which no model has seen.
        folders (dict, optional): By name the folder that a model was trained into, as
            :obj:`output` of :func:`~pyg_attnpool.training.fit`, which holds its learning curve.
            (default: :obj:`None`)
        title (str, optional): The heading; by default the name of the folder of the file.
            (default: :obj:`None`)

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are no models, their templates differ, or meshes do not fit.

    Example:
        >>> from pyg_attnpool.visualize import write_report
        >>> write_report("report.html", {"PCA": model}, meshes[16:], title="Blobs")
    """
    path = Path(path)
    meshes = as_meshes(meshes)
    if not models:
        raise ValueError("Expected at least one model to report on (got none)")
    folders = folders or {}
    first, *others = models.values()
    if any(not torch.equal(model.faces, first.faces) for model in others):
        raise ValueError("Expected models of one template (got others)")
    rows, distances = {}, {}
    with progress_bar("Testing models", 2 * len(models)) as bar:
        for name, model in models.items():
            rows[name] = model.evaluate(meshes)
            bar.update()
            distances[name] = _distances(model, meshes)
            bar.update()
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(models)}
    names = _names(meshes)
    best = min(rows, key=lambda name: rows[name]["mean"])
    worst = torch.from_numpy(distances[best]).mean(dim=1).argsort(descending=True)[:WORST].tolist()
    shown = _shown(worst, meshes, first.num_vertices, len(models))
    title = path.resolve().parent.name if title is None else title
    sections = [
        _summary(models, rows, distances, best, len(meshes)),
        _curves({name: read_curve(folders[name]) for name in models if name in folders}, colors),
        _distribution(distances, colors),
        MAPS,
        _worst(worst, shown, names, distances, best),
        _latent(models, colors),
        _mappings(models),
        _settings(models),
    ]
    page = fill_page(
        "report",
        title,
        _content(models, meshes, names, shown, distances, colors),
        ("vertices", "residual"),
        "\n".join(sections),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def find_models(run: str | Path) -> dict[str, Path]:
    r"""The folders of the models of a run: of one training, or of several in the folders within.

    Returns:
        By name the folder that :obj:`output` of :func:`~pyg_attnpool.training.fit` was, in which
        the model is :obj:`model`.

    Raises:
        ValueError: If there is no model.

    Example:
        >>> from pyg_attnpool.visualize import find_models
        >>> model.save("runs/pca/model")
        >>> find_models("runs")
        {'pca': PosixPath('runs/pca')}
    """
    run = Path(run)
    folders = [run, *sorted(run.iterdir())] if run.is_dir() else []
    found = {folder.name: folder for folder in folders if _has_model(folder)}
    if not found:
        raise ValueError(f"Expected {run}/model or {run}/*/model (got no model)")
    return found


def _has_model(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()


def read_curve(folder: str | Path) -> Curve:
    r"""The learning curve of a training, from the logs in its folder.

    Returns:
        By the name of a column its values, each with the epoch, such as :obj:`train_loss` and
        :obj:`val_mm`; empty if there is no log.
    """
    curve: dict[str, dict[int, float]] = {}
    logs = Path(folder).glob("log/version_*/metrics.csv")
    # One log for every time that a training went on.
    for path in sorted(logs, key=lambda path: int(path.parent.name.split("_")[-1])):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name not in ("epoch", "step") and value:
                        curve.setdefault(name, {})[int(row["epoch"])] = float(value)
    return {name: sorted(values.items()) for name, values in curve.items()}


# What the models do ###################################################################


@torch.no_grad()
def _reconstructed(model: MorphableModel, meshes: Any) -> Tensor:
    with evaluating(model):
        return torch.cat([model(x.to(model.mean)).cpu().float() for x in blocks(meshes, 64)])


@torch.no_grad()
def _distances(model: MorphableModel, meshes: Any) -> ndarray:
    # Millimetres [M, N].
    with evaluating(model):
        parts = [
            vertex_distances(model(x.to(model.mean)), x.to(model.mean)).cpu().float()
            for x in blocks(meshes, 64)
        ]
    return torch.cat(parts).numpy()


def _names(meshes: Any) -> list[str]:
    if isinstance(meshes, MeshDataset):
        if meshes.name is not None:
            return list(meshes.name)
        if meshes.subject is not None and meshes.expression is not None:
            frames: Sequence[Any] = meshes.frame or [""] * len(meshes)
            parts = zip(meshes.subject, meshes.expression, frames, strict=True)
            return [
                f"{subject} {expression} {frame}".strip() for subject, expression, frame in parts
            ]
    return [f"Mesh {i + 1}" for i in range(len(meshes))]


def _shown(worst: list[int], meshes: Any, num_vertices: int, num_models: int) -> list[int]:
    # What can be turned: meshes spread over all, then the worst, as many as a page holds.
    size = 3 * 2 * num_vertices * (1 + num_models)
    room = max(2, BYTES // size)
    number = min(SPREAD, len(meshes), max(1, room - WORST))
    spread = np.linspace(0, len(meshes) - 1, number).astype(int).tolist()
    return list(dict.fromkeys([*spread, *worst]))[:room]


def _content(
    models: Mapping[str, MorphableModel],
    meshes: Any,
    names: list[str],
    shown: list[int],
    distances: dict[str, ndarray],
    colors: dict[str, str],
) -> dict[str, Any]:
    truth = torch.cat(list(blocks(meshes[torch.tensor(shown)], 64))).cpu()
    out = [_reconstructed(model, truth) for model in models.values()]
    first = next(iter(models.values()))
    # The scale ends where one vertex in twenty of all meshes lies beyond, of the worst model.
    top = max(float(np.quantile(d, 0.95)) for d in distances.values())
    return {
        "faces": first.faces.numpy(force=True),
        "models": [{"name": name, "color": colors[name]} for name in models],
        "top": top,
        "meshes": [
            {
                "name": names[index],
                "index": index,
                "vertices": x[:, :3].numpy(),
                "residuals": [{"residual": (o[i, :, :3] - x[:, :3]).numpy()} for o in out],
                "means": [float(distances[name][index].mean()) for name in models],
            }
            for i, (index, x) in enumerate(zip(shown, truth, strict=True))
        ],
    }


# Sections #############################################################################


MAPS = """<section id="maps" aria-labelledby="maps-title">
<div class="head"><h2 id="maps-title">Error maps</h2>
<div id="maps-tools"></div></div>
<p class="note">Drag to turn, arrow keys when focused; all meshes turn together.</p>
<div id="stages"></div>
<div id="legend"></div>
</section>"""


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    # Text is escaped where it is put in; numbers stand to the right.
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>"
        + "".join(
            f'<th scope="row">{cell}</th>' if j == 0 else f"<td>{cell}</td>"
            for j, cell in enumerate(row)
        )
        + "</tr>"
        for i, row in enumerate(rows)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _summary(
    models: Mapping[str, MorphableModel],
    rows: dict[str, dict[str, Any]],
    distances: dict[str, ndarray],
    best: str,
    number: int,
) -> str:
    header = ["mm per vertex", "mean", "std", "median", "95 %", "worst mesh", "parameters"]
    cells = [
        [
            html.escape(name),
            *(f"{rows[name][key]:.3f}" for key in ("mean", "std", "median")),
            f"{np.quantile(distances[name], 0.95):.3f}",
            f"{distances[name].mean(axis=1).max():.3f}",
            f"{model.num_parameters:,}",
            f"{rows[name]['alive']} of {model.latent_channels}",
        ]
        for name, model in models.items()
    ]
    first = next(iter(models.values()))
    note = (
        f"{number:,} test meshes of {first.num_vertices:,} vertices; distance of a vertex to where "
        f"it should be. A latent dimension is alive that varies among them."
    )
    order = list(models).index(best) if len(models) > 1 else None
    return _section("Errors", _table([*header, "latent alive"], cells, order), note)


def _curves(curves: dict[str, Curve], colors: dict[str, str]) -> str:
    charts = []
    for key, label in (("val_mm", "validation error (mm)"), ("train_loss", "training loss")):
        series = {}
        for name, curve in curves.items():
            points = [(epoch + 1, value) for epoch, value in curve.get(key, ())]
            if points:
                epochs, values = zip(*points, strict=True)
                series[name] = (epochs, values)
        if series:
            charts.append(lines(series, "epoch", label, colors))
    if not charts:
        return ""
    return _section("Learning curves", f'<div class="charts">{"".join(charts)}</div>')


def _distribution(distances: dict[str, ndarray], colors: dict[str, str]) -> str:
    top = max(float(np.quantile(d, 0.99)) for d in distances.values())
    at = np.linspace(0, top, 200)
    shares = {}
    for name, d in distances.items():
        ordered = np.sort(d, axis=None)
        shares[name] = at, 100 * np.searchsorted(ordered, at, side="right") / len(ordered)
    charts = [
        lines(shares, "error (mm)", "vertices within it (%)", colors),
        histogram(
            {name: d.mean(axis=1) for name, d in distances.items()},
            "mean error of a mesh (mm)",
            "meshes",
            colors,
        ),
    ]
    return _section("Distribution of errors", f'<div class="charts">{"".join(charts)}</div>')


def _worst(
    worst: list[int],
    shown: list[int],
    names: list[str],
    distances: dict[str, ndarray],
    best: str,
) -> str:
    rows = []
    for index in worst:
        name = html.escape(names[index])
        if index in shown:
            name = f'<button class="link" data-show="{index}">{name}</button>'
        rows.append([name, *(f"{d[index].mean():.3f}" for d in distances.values())])
    note = f"Where {best} has the largest mean error, in mm. A name shows its mesh above."
    return _section("Worst meshes", _table(["mesh", *distances], rows), note)


def _latent(models: Mapping[str, MorphableModel], colors: dict[str, str]) -> str:
    series: dict[str, tuple[ndarray, ndarray]] = {}
    for name, model in models.items():
        moved = np.sort(moved_by_dimension(model).numpy())[::-1]
        series[name] = np.arange(1, len(moved) + 1), moved
    chart = lines(series, "latent dimension, by size", "surface moves (mm)", colors, marker="o")
    note = (
        "How far the surface moves, in the mean, from two standard deviations below the mean code "
        "of the training meshes to two above."
    )
    return _section("Latent dimensions", f'<div class="charts">{chart}</div>', note)


def _mappings(models: Mapping[str, MorphableModel]) -> str:
    rows, finest = [], {}
    for name, model in models.items():
        for place, layer in model.autoencoder.named_modules():
            if not isinstance(layer, PoolingLayer):
                continue
            mapping = layer.mapping()
            weight = mapping.weight.detach()
            total = weight.abs().sum().clamp(min=1e-12)
            rows.append(
                [
                    html.escape(f"{name}: {place}"),
                    f"{mapping.num_source:,} → {mapping.num_target:,}",
                    f"{(weight != 0).sum() / mapping.num_target:.1f}",
                    f"{weight.min():.3f} to {weight.max():.3f}",
                    f"{100 * weight.clamp(max=0).abs().sum() / total:.0f} %",
                ]
            )
            if mapping.num_target == model.num_vertices and model.hierarchy is not None:
                finest[name] = model, mapping
    if not rows:
        return ""
    header = ["mapping", "vertices", "entries a row", "weights", "share below zero"]
    pictures = _reach(finest)
    table = _table(header, rows)
    if len(rows) > 8:
        table = f"<details><summary>All {len(rows)} mappings</summary>{table}</details>"
    note = (
        "How far away a vertex looks in the mapping to the finest level: the mean distance of the "
        "coarse vertices in its row from it, weighted by the size of their weights."
        if pictures
        else ""
    )
    return _section("Mappings between levels", pictures + table, note)


def _reach(finest: dict[str, Any]) -> str:
    reaches = {}
    for name, (model, mapping) in finest.items():
        sizes = model.hierarchy.num_vertices
        level = sizes.index(mapping.num_source) if mapping.num_source in sizes else None
        if level is None:
            continue
        fine, coarse = (torch.as_tensor(model.hierarchy.vertices[i]) for i in (0, level))
        weight = mapping.weight.detach().cpu().double().abs()
        away = (coarse[mapping.index.cpu()] - fine.unsqueeze(1)).norm(dim=-1).double()
        reach = (weight * away).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-12)
        reaches[name] = model, 1000 * reach.numpy()
    if not reaches:
        return ""
    import matplotlib

    top = max(float(np.quantile(reach, 0.99)) for _, reach in reaches.values())
    figures = []
    for name, (model, reach) in reaches.items():
        vertices = model.template.double().numpy(force=True)
        colors = matplotlib.colormaps["viridis"](np.clip(reach / (top or 1.0), 0, 1))[:, :3]
        image = render(
            vertices,
            model.faces.numpy(force=True),
            colors,
            (420, 420),
            box=view_box([vertices]),
            shade=0.35,
        )
        figures.append(
            f'<figure><img alt="" src="data:image/png;base64,{_png(image)}">'
            f"<figcaption>{html.escape(name)}<span>mean {reach.mean():.2f} mm</span></figcaption>"
            f"</figure>"
        )
    return (
        f'<div class="figures">{"".join(figures)}</div>'
        f'<div class="scale" data-top="{top:.6g}"></div>'
    )


def _png(image: ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).quantize(128).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _settings(models: Mapping[str, MorphableModel]) -> str:
    columns = {
        name: {
            **_flat(_architecture(model)),
            **_flat(model.summary),
            "unit of files": model.unit,
        }
        for name, model in models.items()
    }
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [
        [
            html.escape(key.replace("_", " ")),
            *(html.escape(column.get(key, "")) for column in columns.values()),
        ]
        for key in keys
    ]
    table = _table(["setting", *columns], rows)
    versions = " · ".join(f"{name} {version}" for name, version in _versions().items())
    return _section("Settings", table) + f'<footer class="note">{html.escape(versions)}</footer>'


def _architecture(model: MorphableModel) -> dict[str, Any]:
    found = describe(model.autoencoder)
    if not found.get("variational", True):  # what only a variational network uses
        for name in ("kl_weight", "kl_warmup", "free_bits"):
            found.pop(name)
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}: ")
        elif isinstance(value, list | tuple):
            flat[prefix + key] = ", ".join(str(v) for v in value)
        elif value is not None:
            flat[prefix + key] = str(value)
    return flat


def _versions() -> dict[str, str]:
    import torch_geometric

    from pyg_attnpool import __version__

    return {
        "pyg_attnpool": __version__,
        "torch": torch.__version__,
        "torch_geometric": torch_geometric.__version__,
        "Python": platform.python_version(),
        platform.system(): platform.machine(),
        "cores": str(os.cpu_count()),
    }
