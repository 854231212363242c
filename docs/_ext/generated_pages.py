"""Sphinx extension: a line ``<!-- generated: NAME -->`` of a page becomes what the code says today.

What each name stands for is in ``page_parts``; here is only how it gets into a page. A name that does
not exist, and a generator that nothing asks for, end the build.
"""

from __future__ import annotations

import re
from typing import Any

import page_parts
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    used: set[str] = set()

    def fill(_app: Sphinx, docname: str, source: list[str]) -> None:
        def part(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in page_parts.PARTS:
                raise ExtensionError(
                    f"{docname}: nothing generates {name!r}; known: {sorted(page_parts.PARTS)}"
                )
            used.add(name)
            return page_parts.PARTS[name]()

        source[0] = _MARK.sub(part, source[0])

    def check_used(_app: Sphinx, _env: Any) -> None:
        if used and used != set(page_parts.PARTS):
            raise ExtensionError(f"no page asks for {sorted(set(page_parts.PARTS) - used)}")

    app.connect("source-read", fill)
    app.connect("env-updated", check_used)
    return {"version": "1", "parallel_read_safe": False}
