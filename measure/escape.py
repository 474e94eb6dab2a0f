# SPDX-License-Identifier: Apache-2.0
"""Text of others (names, licences, metadata of files) on its way out: one function for each kind of place.

``visible``   terminals, logs, and whatever draws text as text: reports on nodes, messages of exceptions, pictures
``html``      what some front ends put into the page as HTML: progress texts on nodes (before 1.45 without cleaning it)
``markdown``  a line or a table cell of a model card

All of them show what has no shape of its own: control characters, and with them the sequences that terminals obey,
overrides of the writing direction, characters without width, and halves of surrogate pairs become \\x1b, \\u202e and
so on. And they leave out the middle of what is longer than anybody reads: a beginning (which file, which layer) and an
end (what to do) stay. Data stay data: JSON of routes and of --json, headers, outputs that other nodes read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from html import escape

LONGEST_LINE, LONGEST_CELL = 2_000, 300
_LONGEST_TEXT = 200_000
_HTML = re.compile(r"[<&\"]|(?<=\[)\[")
# What Markdown, with the extensions of sites where models are published, takes for more than a character. Underscores
# within a word mean nothing, and names are full of them.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")


def visible(text: str, longest: int = LONGEST_LINE) -> str:
    """Text of any number of lines -> the same as nothing but text; ``longest``: characters in a line."""
    return "\n".join(line(part, longest) for part in _cut(text, _LONGEST_TEXT).split("\n"))


def line(text: str, longest: int = LONGEST_LINE) -> str:
    """Text -> one line of nothing but text: line breaks are shown, too."""
    text = _cut(text, longest)
    return text if text.isprintable() else "".join(map(_shown, text))


def report(lines: Iterable[str]) -> str:
    """Lines -> a text of these lines and no others, whatever the names in them hold."""
    return "\n".join(map(line, lines))


def html(text: str, longest: int = LONGEST_LINE) -> str:
    """Text -> what is shown alike as HTML and as text: no element, and none of the links written [[label|address]].

    Not ``escape``: newer front ends escape such a text themselves, and its entities would be read as they stand.
    """
    return _HTML.sub(lambda found: f"\\x{ord(found[0]):02x}", visible(text, longest))


def markdown(text: str, longest: int = LONGEST_CELL) -> str:
    """Text -> one line of Markdown that shows it: no HTML, picture, link, emphasis or cell of a table begins in it."""
    text = re.sub(r"\s+", " ", _cut(text, longest), flags=re.ASCII)
    return _MARKDOWN.sub(r"\\\g<0>", escape(line(text), quote=False))


def _shown(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) == "Zs":  # spaces of all widths, which Japanese names have
        return char
    return char.encode("unicode_escape").decode("ascii")


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    head = 2 * longest // 3
    return f"{text[:head]} [... {len(text) - longest:,} characters ...] {text[head - longest :]}"
