"""Rewrites for the site: formulas become MathML, fences lose the tests' words, links out of `docs/` go to the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

_MATH_BLOCK = re.compile(r"^( *)```math\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MATH_INLINE = re.compile(r"\$`(.+?)`\$", re.DOTALL)
_FENCE_WORDS = re.compile(r"^( *```\w+) .*$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Rewrite what a forge renders by itself."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[1]))
        if path.startswith("docs/"):
            return match[0]
        return f"]({config.repo_url.rstrip('/')}/blob/main/{path}{match[2] or ''})"

    markdown = _MATH_BLOCK.sub(lambda match: f"{match[1]}<div>{convert(match[2], display='block')}</div>", markdown)
    markdown = _MATH_INLINE.sub(lambda match: convert(match[1]), markdown)
    return _LINK.sub(link, _FENCE_WORDS.sub(r"\1", markdown))
