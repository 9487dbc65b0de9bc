"""What strangers wrote (prompts, completions, names, errors of a server), shown as text: in a terminal, in Markdown.

Where a page is written as HTML, `html.escape` does the same there.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

# What begins a mark in Markdown; in a table `|` ends the cell.
_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_~[]|"})
# Unicode's categories of what steers a terminal or the text's order, or breaks a line.
_BLOCKED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d\u00ad"  # of Cf: Persian, emoji and words hold them


def _is_blocked(c: str) -> bool:
    return not c.isprintable() and c not in _JOINERS and unicodedata.category(c) in _BLOCKED


def printable(text: str) -> str:
    """The text without control characters (a completion may hold a terminal's escapes); newlines become signs."""
    return "".join(c if not _is_blocked(c) else {"\n": "⏎", "\t": " "}.get(c, "�") for c in text)


def printable_lines(text: str) -> str:
    """The same, but line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def markdown(text: str) -> str:
    """The text on one line of Markdown that shows it: no mark or HTML in it is obeyed; a bare URL may become a link."""
    return html.escape(printable(text), quote=False).translate(_MARKS)


def url_shown(url: str) -> str:
    """Without what may be a secret: its user and password, and all from the query on."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])


def json_text(data: Any, indent: int | None = None) -> str:
    """Strict JSON that reads well and writes no control character to a terminal, those that JSON allows neither."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, default=str, allow_nan=False)
    # the only breaks and blanks outside of strings are those of the indent
    return "".join(c if not _is_blocked(c) or c == "\n" else json.dumps(c)[1:-1] for c in text)
