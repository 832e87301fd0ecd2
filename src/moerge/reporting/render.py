"""From sections to one HTML file that needs nothing else: style, script, drawings and data are inside.

Text from files is escaped by Jinja; a content security policy lets only this page's own script run, should that ever fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from moerge import figures
from moerge.reporting.blocks import Figure, Section

_HERE = Path(__file__).parent / "page"
_CODE = re.compile(r"`([^`\n]+)`")


def render(title: str, sections: Sequence[Section], data: Mapping[str, Any]) -> str:
    """The page. `data` is embedded as JSON, in the element `moerge-report`."""
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, auto_reload=False)
    environment.filters["inline"] = inline
    numbers = count(1)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        glance=[sentence for section in sections for sentence in section.glance],
        version=version("moerge"),
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=_hash(script),
        embedded=Markup(embedded_json(data)),
        new_id=lambda: f"figure-{next(numbers)}",
        drawn=drawn,
    )


def drawn(block: Figure, name: str) -> figures.Inline | None:
    """The chart as SVG whose ids begin with `name`, None without matplotlib or where its numbers are too large to draw."""
    if not figures.available():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return figures.inline(block.draw(), f"{name}-")
        except (ArithmeticError, ValueError):
            return None


def inline(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def embedded_json(data: Mapping[str, Any]) -> str:
    """JSON that no HTML parser finds a tag or a comment in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
