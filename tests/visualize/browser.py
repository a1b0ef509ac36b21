r"""Pages in a browser."""

from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(browser, path, **kwargs):
    r"""A page that reaches nothing but its file, and has no errors."""
    problems = []
    page = browser.new_page(reduced_motion="reduce", **kwargs)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    own = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else problems.append(r.url))
    page.goto(Path(path).as_uri())
    page.wait_for_function("(window.viewer ?? window.report) !== undefined")
    yield page
    page.close()
    assert not problems
