# SPDX-License-Identifier: Apache-2.0
"""Numbers on the command line: types of arguments that refuse what no amount can be, `nan` and `-1` among them."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, 0)


def positive_count(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1)


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, {least} or more")
    return value
