r"""The site: `make docs` builds it into docs/build."""

import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# The page of the benchmarks links to the committed results.
shutil.copytree(
    ROOT / "benchmarks/results",
    ROOT / "docs/results",
    ignore=shutil.ignore_patterns("*.json"),
    dirs_exist_ok=True,
)

import pyg_attnpool  # noqa: E402

project = "pyg_attnpool"
author = "The pyg_attnpool maintainers"
copyright = f"2026, {author}"
version = release = pyg_attnpool.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
napoleon_custom_sections = [("Shapes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say them
autosummary_generate = False
default_role = "any"
# Names of a docstring that are no page of their own.
nitpicky = False
intersphinx_timeout = 10
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://pytorch.org/docs/stable", None),
    "torch_geometric": ("https://pytorch-geometric.readthedocs.io/en/latest", None),
    "numpy": ("https://numpy.org/doc/stable", None),
}
try:
    socket.create_connection(("docs.python.org", 443), timeout=3).close()
except OSError:  # without a network the site has no links to these sites
    intersphinx_mapping = {}
# One file, which draws formulas without a network.
mathjax = ROOT / "build/node/node_modules/mathjax/es5/tex-svg.js"
if mathjax.exists():
    html_static_path, mathjax_path = [str(mathjax)], mathjax.name
html_theme = "furo"
html_title = f"pyg_attnpool {version}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
