"""Sphinx: the pages in Markdown, references made from the code, no network."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
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

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 100


def _fill_in(app: Any, name: str, content: list[str]) -> None:
    page = DOCS / f"{name}.md"
    content[0] = gallery.without_missing(page, generate.fill_in(content[0]))


def _mend(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Numbered references become a list; "A. Author" begins none; bars in plain text are bars."""
    for pattern, by in ((r"\[(\d+)\]_", r"[\1]"), (r"^(\s*)\.\. \[\d+\] ", r"\1#. "), (r"^(\s*[A-Z])\. ", r"\1\\. ")):
        lines[:] = [re.sub(pattern, by, line) for line in lines]
    lines[:] = [line if "`" in line else re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def _make_figures(app: Any) -> None:
    for page in gallery.pages():
        gallery.make(page)


def setup(app: Any) -> None:
    """What happens on the way from a file to a page."""
    app.connect("builder-inited", _make_figures)
    app.connect("source-read", _fill_in)
    app.connect("autodoc-process-docstring", _mend, priority=100)
