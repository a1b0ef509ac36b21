r"""Commands that end in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

from pyg_attnpool.cli.shared import Folder, MaybeOutput, read_meshes_of, read_model


def view(
    model: Folder,
    *,
    output: MaybeOutput = None,
    data: Path | None = None,
    title: str | None = None,
    open: bool = True,
) -> None:
    """Writes a model as one web page, with a slider for every latent dimension, and opens it.

    Example: pyg-attnpool view faces/

    Args:
        output: The page; by default beside the folder and named as it is.
        data: Folder of registered meshes which the page offers, with the error of each: a few, as
            each adds to the page. By default it offers samples of the model.
        title: Its heading; by default the name of the folder.
        open: Open the page in the browser.
    """
    found = read_model(model)
    folder = model.resolve()
    page = folder.with_name(f"{folder.name}.html") if output is None else output
    if page.suffix.lower() != ".html":
        raise ValueError(f"Expected a page ending in '.html' (got {page})")
    meshes = None if data is None else read_meshes_of(found, data)
    found.export(page, title=title or folder.name, meshes=meshes)
    show(page, open)


def show(page: Path, wanted: bool) -> None:
    r"""Opens a page, where there is a screen, or says where it is."""
    # A browser in the terminal would take the terminal over, and cannot draw the page.
    screen = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    opened = wanted and screen and webbrowser.open(page.resolve().as_uri())
    print(page if opened or not wanted else f"Open {page} in a browser")
