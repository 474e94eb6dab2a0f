# SPDX-License-Identifier: Apache-2.0
"""Cures that are a value: which widget of which node takes which one. The front end's Apply button sets them.

A fix is offered only where every value of it can be set: on a widget of the node itself, or on the one primitive node
that an input is linked to. What is computed from other values has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .prompt_graph import PromptGraph

_PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat")  # ComfyUI's, with one widget `value`


class Fix(NamedTuple):
    """Set widget ``input`` of node ``node`` (an id in the API prompt) to ``value``."""

    node: str
    input: str
    value: float


def fixes_of(graph: PromptGraph, wanted: Iterable[tuple[str, str, float]]) -> tuple[Fix, ...]:
    """(node, input, value) of a cure -> the widgets that must change; empty if one of the values has no widget."""
    found: dict[tuple[str, str], Fix] = {}
    for node, name, value in wanted:
        if graph.number(node, name) == value:
            continue
        link = graph.source(node, name)
        if link is not None and graph.nodes[link.node].kind in _PRIMITIVES:
            node, name = link.node, "value"
        if not _settable(graph, node, name) or found.setdefault((node, name), fix := Fix(node, name, value)) != fix:
            return ()
    return tuple(found.values())


def _settable(graph: PromptGraph, node: str, name: str) -> bool:
    given = graph.nodes[node].inputs.get(name)
    return isinstance(given, (int, float)) and not isinstance(given, bool)
