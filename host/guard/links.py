# SPDX-License-Identifier: Apache-2.0
"""What a prompt in API form is made of: nodes, and the links between them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

LEAST, MOST = 1e-9, 1e12  # no input of a node that the guard knows takes numbers beyond, and products stay finite


class Link(NamedTuple):
    """Output ``slot`` of node ``node``."""

    node: str
    slot: int


class Node(NamedTuple):
    """One node of the prompt; ``inputs`` holds literals and links as they were sent, ``kind`` its class name."""

    id: str
    kind: str
    inputs: Mapping[str, Any]


# A prompt has thousands, and a named tuple's own way of making one takes twice as long.
make_node = partial(tuple.__new__, Node)
make_link = partial(tuple.__new__, Link)


def as_link(value: Any) -> Link | None:
    """``["<id>", slot]`` -> Link; None for everything else, a list of values included."""
    if type(value) is list and len(value) == 2 and type(value[0]) is str and type(value[1]) is int:
        return make_link(value)  # nearly always
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    node, slot = value
    if type(node) is str and type(slot) is int:
        return make_link((node, slot))
    if type(node) is int and type(slot) is int and abs(node) < MOST:
        return Link(str(node), slot)
    return None
