# SPDX-License-Identifier: Apache-2.0
"""Which nodes a node of a prompt needs: of those alone that are asked about, of each once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .links import Link, Node, as_link, make_link
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
        choice, sides = self._choices.get(kind), ()
        if choice is not None and choice.sides and (chosen := self._chosen(make_link((name, 0)))):
            sides = choice.sides
            if chosen.node in nodes:
                found.append(chosen.node)
        for side, value in inputs.items():
            if sides and str(side).startswith(sides):
                continue
            if type(value) is list and len(value) == 2 and type(value[0]) is str and type(value[1]) is int:
                parent = value[0]  # nearly always; the rest is as_link's to tell
            elif type(value) in PLAIN or (link := as_link(value)) is None:
                continue
            else:
                parent = link.node
            if parent in nodes:
                found.append(parent)
        self[name] = found
        return found
