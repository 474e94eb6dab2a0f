# SPDX-License-Identifier: Apache-2.0
"""Numbers on the command line: types of arguments that refuse what no amount can be, `nan` and `-1` among them."""

from __future__ import annotations

import argparse
import math

# Products of a few amounts or counts stay finite, which JSON demands, and a count fits where the libraries put it.
_MOST, _MOST_COUNTED = 1e12, 2**63 - 1


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, 0)


def positive_count(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1)


def amount(text: str) -> float:
    """A number above 0, of a size that amounts have."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    if not 1 / _MOST <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from {1 / _MOST:g} to {_MOST:g}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, {least} or more")
    if value > _MOST_COUNTED:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, {_MOST_COUNTED} at most")
    return value
