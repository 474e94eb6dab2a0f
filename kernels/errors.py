# SPDX-License-Identifier: Apache-2.0
"""The one kind of error that is the user's to solve. It lies in the lowest ring, since every ring raises it.

At the borders (nodes, commands, routes) such an error, and one of the file system, is shown as it is; any other one is
a fault of the pack, and is shown as such.
"""

from __future__ import annotations

SHORT = "nvfp4_video"  # the host shows an error's module and class; the folders of the pack say nothing to its users
_LONGEST = 120  # characters of a foreign error in one of our lines


class PackError(ValueError):
    """What was asked for, or a file, cannot be used. One line: what was found, where, what was expected, what to do."""

    __module__ = SHORT

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.__module__ = SHORT


def first_line(error: Exception) -> str:
    """What an error says in its first line, cut where that is long, or its class if it says nothing: for a log."""
    return (str(error).splitlines() or [""])[0][:_LONGEST] or type(error).__name__


def one_line(text: str) -> str:
    """The text with its line breaks, which names from files may have, written as ``\\n`` and the like."""
    return "".join(repr(char)[1:-1] if char.splitlines() == [""] else char for char in text)
