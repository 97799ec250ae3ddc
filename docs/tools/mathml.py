"""Equations as MathML, converted at build time: browsers render it without scripts and without a network."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer, under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, _skip), (_display, _skip))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


_FENCE = re.compile(r'<mo( class="math(?:open|close)")?>([‖⟨⟩])</mo>')
_NORM = re.compile(r"\\lVert(.*?)\\rVert", flags=re.DOTALL)


def _converted(node: Any, as_block: bool) -> str:
    """The equation in MathML, with two defects of docutils' converter corrected."""
    # Braces around a norm make an exponent apply to the whole of it, not to its closing bar alone. Browsers stretch
    # bars and angle brackets to the height of the line, which TeX does only for \left and \right.
    markup = tex2mathml(_NORM.sub(lambda match: f"{{{match[0]}}}", node.astext()), as_block=as_block)
    return _FENCE.sub(r'<mo stretchy="false"\1>\2</mo>', markup)


def _inline(translator: HTML5Translator, node: Any) -> None:
    translator.body.append(_converted(node, as_block=False))
    _skip(translator, node)


def _display(translator: HTML5Translator, node: Any) -> None:
    translator.body.append(f'<div class="math" role="math" aria-label="{escape(node.astext())}">')
    translator.body.append(_converted(node, as_block=True))
    translator.body.append("</div>\n")
    _skip(translator, node)


def _skip(translator: HTML5Translator, node: Any) -> None:
    from docutils.nodes import SkipNode

    raise SkipNode  # the node is done: its TeX source must not be written as well
