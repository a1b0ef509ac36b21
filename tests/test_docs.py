r"""The pages of the site: their Python runs, page by page, and their links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.mesh.meshes import icosphere

DOCS = Path(__file__).parents[1] / "docs"
MADE = {"build", "results"}  # by `make docs`
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if MADE.isdisjoint(path.relative_to(DOCS).parts)
)
RUN = [page for page in PAGES if "```python" in (DOCS / page).read_text() and page != "index.md"]


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # A page shows meshes that a reader has; here they are spheres.
    names = {"sphere": icosphere, "np": np, "__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(block, names)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = (DOCS / page).read_text()
    links = re.findall(r"\]\(([^)#:]+?\.md)\)", text)
    toc = re.findall(r"```\{toctree\}.*?\n\n(.*?)```", text, re.DOTALL)
    named = [name for block in toc for name in block.split() if name[0] != ":" and "*" not in name]
    for link in [*links, *named]:
        at = (DOCS / page).parent / link
        assert any(at.with_suffix(end).exists() for end in (".md", ".rst")), link
