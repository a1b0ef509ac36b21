r"""Commands that end in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pyg_attnpool.cli.shared import (
    MaybeOutput,
    Model,
    check_output,
    read_meshes_of,
    read_model,
    read_training_meshes,
)

PAGE = (".html",)


def view(
    model: Model,
    *,
    output: MaybeOutput = None,
    data: Path | None = None,
    title: str | None = None,
    no_open: bool = False,
) -> None:
    """Writes a model as one web page, with a slider for every latent dimension, and opens it.

    Example: pyg-attnpool view faces/

    Args:
        output: The page; by default beside the folder and named as it is.
        data: Folder of registered meshes which the page offers, with the error of each: a few, as
            each adds to the page. By default it offers samples of the model.
        title: Its heading; by default the name of the model.
        no_open: Write the page and do not open it in the browser.
    """
    folder = Path(model).resolve()
    page = folder.with_name(f"{folder.name}.html") if output is None else output
    check_output(page, PAGE)
    found = read_model(model)
    meshes = None if data is None else read_meshes_of(found, data)
    names = None if meshes is None else meshes.name
    found.export(page, title=title or folder.name, meshes=meshes, names=names)
    show(page, not no_open)


def report(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    output: MaybeOutput = None,
    data: Path | None = None,
    no_open: bool = False,
) -> None:
    """Writes how a training or a comparison went as one web page, and opens it: learning curves,
    errors, error maps on meshes that turn, the worst meshes, latent dimensions, mappings, settings.

    Example: pyg-attnpool report faces/

    Args:
        run: Folder of a training, or of several with one template in the folders within.
        output: The page; by default report.html in the folder.
        data: Test meshes, in the unit of the model's files; by default the test part of those that
            the models were trained on.
        no_open: Write the page and do not open it in the browser.
    """
    from pyg_attnpool.visualize import find_models, write_report

    page = run / "report.html" if output is None else output
    check_output(page, PAGE)
    folders = find_models(run)
    models = {name: read_model(folder) for name, folder in folders.items()}
    if data is None:
        meshes = read_training_meshes(folders.values())
        meshes = meshes[meshes.split().test]
    else:
        meshes = read_meshes_of(next(iter(models.values())), data)
    write_report(page, models, meshes, folders, title=run.resolve().name)
    show(page, not no_open)


# What they share ######################################################################


def show(page: Path, wanted: bool) -> None:
    r"""Opens a page, where there is a screen, or says where it is."""
    # A browser in the terminal would take the terminal over, and cannot draw the page.
    screen = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    opened = wanted and screen and webbrowser.open(page.resolve().as_uri())
    print(page if opened or not wanted else f"Open {page} in a browser")
