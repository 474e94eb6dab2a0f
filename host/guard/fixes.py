# SPDX-License-Identifier: Apache-2.0
"""Cures that are values: which widget of which node takes which one. The front end's Apply button sets them.

A fix is offered only where every value of it can be set: on a widget of the node itself, or on the one primitive node
that an input is linked to. What is computed from other values has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .prompt_graph import PromptGraph

Value = float | str | bool
_PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat")  # ComfyUI's, with one widget `value`


class Fix(NamedTuple):
    """Set widget ``input`` of node ``node`` (an id in the API prompt) to ``value``."""

    node: str
    input: str
    value: Value


def fixes_of(graph: PromptGraph, wanted: Iterable[tuple[str, str, Value]]) -> tuple[Fix, ...]:
    """(node, input, value) of a cure -> the widgets that must change; empty if one of the values has no widget."""
    found: dict[tuple[str, str], Fix] = {}
    for node, name, value in wanted:
        number = not isinstance(value, (str, bool))
        if number and graph.number(node, name) == value:
            continue
        link = graph.source(node, name)
        if number and link is not None and graph.nodes[link.node].kind in _PRIMITIVES:
            node, name = link.node, "value"
        settable = _is_like(graph.nodes[node].inputs.get(name), value)
        if not settable or found.setdefault((node, name), fix := Fix(node, name, value)) != fix:
            return ()
    return tuple(found.values())


def _is_like(given: object, value: Value) -> bool:
    """Whether an input has a value of its own, of the kind of this one."""
    if isinstance(value, (str, bool)):
        return isinstance(given, type(value))
    return isinstance(given, (int, float)) and not isinstance(given, bool)
