# SPDX-License-Identifier: Apache-2.0
"""Which nodes a node of a prompt needs: of those alone that are asked about, of each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .links import Link, Node, as_link
from .values.evaluate import PLAIN, Choice


class Parents(dict[str, list[str]]):
    """Node -> the nodes that it has links to, found when it is first asked for; one may be named twice.

    ``chosen``: what a node of ``choices`` hands on. The host runs no other side of a decided switch.
    """

    def __init__(
        self, nodes: Mapping[str, Node], choices: Mapping[str, Choice], chosen: Callable[[Link], Link | None]
    ):
        super().__init__()
        self._nodes, self._choices, self._chosen = nodes, choices, chosen

    def __missing__(self, name: str) -> list[str]:
        _, kind, inputs = self._nodes[name]
        nodes, found = self._nodes, []
        given: Iterable[Any] = inputs.values()
        choice = self._choices.get(kind)
        if choice is not None and choice.sides and (chosen := self._chosen(Link(name, 0))):
            given = [value for side, value in inputs.items() if not str(side).startswith(choice.sides)]
            if chosen.node in nodes:
                found.append(chosen.node)
        for value in given:
            if type(value) is list and len(value) == 2 and type(value[0]) is str and type(value[1]) is int:
                parent = value[0]  # nearly always; the rest is as_link's to tell
            elif type(value) in PLAIN:
                continue
            elif (link := as_link(value)) is not None:
                parent = link.node
            else:
                continue
            if parent in nodes:
                found.append(parent)
        self[name] = found
        return found
