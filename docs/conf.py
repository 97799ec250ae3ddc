"""Configuration of Sphinx: pages in Markdown, references generated from the code, nothing fetched from a network."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
# Sphinx runs this file by itself: without this line `docs` and the packages beside it cannot be imported.
sys.path.insert(0, str(DOCS.parent))

from docs import gallery  # noqa: E402
from docs.tools import generate  # noqa: E402

project = "pnanalysis"
author = "The pnanalysis developers"
copyright = author
release = version = metadata.version("pnanalysis")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docs.tools.mathml"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build", "_figures", "tools"]

html_theme = "furo"
html_title = f"pnanalysis {version}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False

# In "ndarray, shape (n,)" the word shape is none of the attributes that several classes call so.
suppress_warnings = ["ref.python"]

# Docstrings give the types, in words and with shapes; annotations would repeat them.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 100


def _fill_page(app: Any, name: str, content: list[str]) -> None:
    """Insert the generated parts of a page, and drop figures that could not be drawn; Sphinx reads ``content[0]``."""
    page = DOCS / f"{name}.md"
    content[0] = gallery.without_missing(page, generate.fill_in(content[0]))


def _escape_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite what reStructuredText would misread in a docstring, in place."""
    # Citation labels are global in Sphinx, so every docstring's [1] would clash: citations become plain text, and the
    # references a numbered list. An initial as in "A. Author" would begin a list of its own, so its dot is escaped.
    # In tables the columns stay where they are.
    for pattern, by in (
        (r"\[(\d+)\]_(  +)", r"[\1] \2"),
        (r"\[(\d+)\]_", r"[\1]"),
        (r"^(\s*)\.\. \[\d+\] ", r"\1#. "),
        (r"^(\s*[A-Z])\. ", r"\1\\. "),
    ):
        lines[:] = [re.sub(pattern, by, line) for line in lines]
    # |x| would be taken for a substitution.
    lines[:] = [line if "`" in line else re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def _draw_figures(app: Any) -> None:
    """Run the pages that show figures, before Sphinx looks for the images."""
    for page in gallery.pages():
        gallery.make(page)


def setup(app: Any) -> None:
    """Connect the steps from a file to a page."""
    app.connect("builder-inited", _draw_figures)
    app.connect("source-read", _fill_page)
    # Before napoleon (priority 500), which would parse the references as they were.
    app.connect("autodoc-process-docstring", _escape_docstring, priority=100)
