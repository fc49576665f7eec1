"""Docstrings are plain text: what Markdown would take for a link, a tag or emphasis stays as it is written."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Indented blocks and code spans are left alone.
_MARKED = re.compile(r"^ {4}.*$|`[^`]+`|(?P<mark>[\[\]*<])", re.MULTILINE)


def escaped(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        mark = match["mark"]
        return match[0] if mark is None else "&lt;" if mark == "<" else f"\\{mark}"

    return _MARKED.sub(plain, text)


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = escaped(obj.docstring.value)
