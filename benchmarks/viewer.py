r"""The page of a morphable model in headless Chromium: its size, its vertices against Python's, and
the time of a frame without the graphics card's part, on one thread."""

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tyro
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks import report
from benchmarks.speed.templates import blob, random_model
from pyg_attnpool import MeshHierarchy
from pyg_attnpool.models import MorphableModel

RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, Any] = {
    "modal": MorphableModel.modal,
    "modal, latent size 32": lambda hierarchy: MorphableModel.modal(hierarchy, 32),
    "CoMA, attention": MorphableModel.coma,
    "CoMA, attention, wider": lambda hierarchy: MorphableModel.coma(hierarchy, wider=True),
    "Neural3DMM, attention": MorphableModel.neural3dmm,
    "PCA, 32 components": lambda hierarchy: MorphableModel.pca(hierarchy, 32),
}
TIMED = """([call, repeat]) => {
    const run = new Function(`viewer.${call}`);
    return Array.from({ length: repeat }, () => {
        const start = performance.now();
        run();
        return performance.now() - start;
    });
}"""
NOTES = (
    "decode: from the latent code to vertices. frame: decode, normals and colours of vertices; the "
    "graphics card's part is not in it.",
    "Times are the median, and in brackets the fastest, of single calls: the clock of a page ticks "
    "every 0.1 ms, and other work on the machine slows most calls.",
    "difference: the largest of five random codes, relative to the diagonal of the template.",
    "Weights are random: time and size depend on the architecture alone.",
)


def main(
    num_vertices: tuple[int, ...] = (5023, 12000),
    repeat: int = 200,
    seed: int = 0,
    output: Path = RESULTS,
):
    r"""Writes pages, opens them and prints their times.

    Args:
        num_vertices: Sizes of templates.
        repeat: Calls that are timed.
        seed: Of weights and codes.
        output: Folder of the results.
    """
    rows = []
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        page = browser.new_page()
        for size in num_vertices:
            hierarchy = MeshHierarchy.from_template(blob(size))
            for name, make in MODELS.items():
                torch.manual_seed(seed)
                model = random_model(make(hierarchy), hierarchy)
                rows.append({"model": name, "vertices": size})
                rows[-1] |= measured(page, model, Path(folder) / "page.html", repeat)
                print(rows[-1])
        about = report.machine("cpu") | {"browser": f"Chromium {browser.version}", "seed": seed}
    table = [
        {
            "model": row["model"],
            "vertices": f"{row['vertices']:,}",
            "page": f"{row['megabytes']:.2f} MB",
            "difference": f"{row['difference']:.1e}",
            **{
                name: f"{row[f'{name}_ms']:.1f} ms ({row[f'fastest_{name}_ms']:.1f})"
                for name in ("decode", "frame")
            },
        }
        for row in rows
    ]
    print(report.write(output, "viewer", report.command(), rows, {"One page": table}, about, NOTES))


@contextmanager
def chromium() -> Iterator[Browser]:
    r"""A headless browser, with WebGL by the processor."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise SystemExit(f"Expected one of the browsers {names} (got none)")
    args = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    args += ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=browser, args=args)


def measured(page: Page, model: MorphableModel, path: Path, repeat: int) -> dict[str, float]:
    model.export(path)
    page.goto(path.as_uri())
    page.wait_for_function("window.viewer !== undefined")
    page.locator("[value=displacement]").check()
    diagonal = (model.template.amax(0) - model.template.amin(0)).norm()
    difference = 0.0
    for code in torch.randn(5, model.latent_channels):
        found = page.evaluate(
            "code => { viewer.setCode(code); return [...viewer.stage.position] }", code.tolist()
        )
        with torch.no_grad():
            (expected,) = model.decode(code.unsqueeze(0))
        error = (torch.tensor(found).view(-1, 3) - expected).abs().max() / diagonal
        difference = max(difference, error.item())
    if not difference < 1e-4:
        raise RuntimeError(f"Expected a difference below 1e-4 (got {difference:g})")
    times = {}
    for name, call in (("decode_ms", "decode()"), ("frame_ms", "refresh()")):
        page.evaluate(TIMED, [call, 50])  # until the page's code is compiled
        taken = page.evaluate(TIMED, [call, repeat])
        times |= {name: statistics.median(taken), f"fastest_{name}": min(taken)}
    return {"megabytes": path.stat().st_size / 1e6, "difference": difference, **times}


if __name__ == "__main__":
    tyro.cli(main)
