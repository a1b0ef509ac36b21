r"""The pages of the site: their Python runs, page by page, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OTHERS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
MADE = {"build", "results"}  # by `make docs`
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if MADE.isdisjoint(path.relative_to(DOCS).parts)
)
RUN = [page for page in PAGES if "```python" in (DOCS / page).read_text() and page != "index.md"]

BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:\s]*)(#([^)\s]+))?\)")


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(block, names)


def anchors(path):
    r"""The anchors of the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", [*(f"docs/{page}" for page in PAGES), *OTHERS])
def test_links_between_pages_lead_somewhere(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for target, _, anchor in LINK.findall(BLOCK.sub("", text)):
        path = folder / target if target else ROOT / page
        # `make docs` copies the results.
        at = Path(str(path).replace(str(DOCS / "results"), str(ROOT / "benchmarks/results")))
        assert at.exists(), target
        assert not anchor or anchor in anchors(at), f"{target}#{anchor}"
    toc = re.findall(r"```\{toctree\}.*?\n\n(.*?)```", text, re.DOTALL)
    for name in (name for block in toc for name in block.split() if not set(":*") & set(name)):
        assert any((folder / f"{name}{end}").exists() for end in (".md", ".rst")), name
