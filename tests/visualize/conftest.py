import os
import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    r"""Headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("needs playwright, to drive a browser")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs one of the browsers {names}")
    # As root there is no sandbox, and without a GPU no other GL.
    args = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    args += ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=args)
