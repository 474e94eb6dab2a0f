# SPDX-License-Identifier: Apache-2.0
"""Evaluates a prompt's nodes by the tables of this folder, each node once, without recursion.

A row of a table is a function of ``Given``, what a node is given, and returns its outputs; ``chooses`` marks rows that
hand on one of their inputs instead, whatever it carries. What no row names, what misses an input, what a formula
cannot take, and what needs itself is unknown, which is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..links import LEAST, MOST, Link, Node, as_link

UNKNOWN: tuple = ()
PLAIN = frozenset((str, int, float, bool, type(None)))  # the types of nearly all values that are no links
_LONGEST_NUMBER = 40
_MOST_FILES = 16  # pictures and films whose headers are read, of one prompt

class Unknown(Exception):
    """A formula lacks something."""


# With it, what goes wrong with wild numbers in any of the formulas.
_FORMULA_ERRORS = (Unknown, ArithmeticError, ValueError, TypeError, KeyError, IndexError, AttributeError)


class _Wanted(Exception):
    """A formula needs the outputs of a node that has not been evaluated, the exception's argument."""


class Row(NamedTuple):
    """``outputs``: Given -> the node's outputs in order; ``source``: where its code is."""

    outputs: Callable[[Given], Iterable[Any]]
    source: str


class Choice(NamedTuple):
    """``chosen``: Given -> what the node hands on: the name of an input, a link from elsewhere, or a list of links.

    A list has an entry for each output. ``sides``: how the names of its inputs begin of which the host runs only the
    chosen one.
    """

    chosen: Callable[[Given], str | Link | None | list[Link | Bundle | None]]
    source: str
    sides: tuple[str, ...] = ()


class Bundle(NamedTuple):
    """A pipe or a context: what it holds, by name."""

    links: Mapping[str, Link]


class Given:
    """What one node is given. Whatever is asked for and not known ends the formula, unless it says otherwise."""

    __slots__ = ("_values", "node")

    def __init__(self, node: Node, values: Values):
        self.node, self._values = node, values

    def has(self, name: str) -> bool:
        """Whether the input is given at all."""
        return name in self.node.inputs

    def maybe(self, name: str) -> Any:
        """The value of an input, None if it is absent or unknown."""
        given = self.node.inputs.get(name)
        return given if type(given) in PLAIN else self._values.of(given)

    def value(self, name: str) -> Any:
        """The value of an input."""
        found = self.maybe(name)
        if found is None:
            raise Unknown
        return found

    def number(self, name: str) -> int | float:
        """An input as a number, text that spells one too, as the host takes it."""
        found = as_number(self.value(name))
        if found is None:
            raise Unknown
        return found

    def integer(self, name: str) -> int:
        """An input as a whole number, cut off as the host does for an input of the type INT."""
        return int(self.number(name))

    def flag(self, name: str) -> bool:
        """An input as true or false."""
        found = self.value(name)
        if not isinstance(found, (bool, int, float)):
            raise Unknown
        return bool(found)

    def a(self, kind: type, name: str) -> Any:
        """The value of an input that has to be of this type."""
        found = self.value(name)
        if not isinstance(found, kind):
            raise Unknown
        return found

    def link(self, name: str) -> Link | None:
        """The link at an input."""
        return as_link(self.node.inputs.get(name))

    def file(self, kind: str, name: str) -> Any:
        """What is known of the file that an input names, by the reader of this kind."""
        return self._values.file(kind, self.a(str, name))

    def stored(self, name: object) -> Link | None:
        """What a SetNode keeps under this name."""
        return self._values.stored(name)


def link_or_literal(given: Any) -> tuple[Link | None, Any]:
    """An input as it was sent -> its link, or its value, None for a list of values; a value may be wrapped."""
    if not isinstance(given, (list, tuple)) and isinstance(given, Mapping):
        given = given.get("__value__")
    if isinstance(given, (list, tuple)):
        return as_link(given), None
    return None, None if isinstance(given, Mapping) else given


def as_number(value: Any) -> int | float | None:
    """A value -> the number it is or spells, None for none or one that nobody can mean."""
    if type(value) is int:  # nearly always
        return value if -MOST <= value <= MOST else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if isinstance(value, str):
            value = float(value[:_LONGEST_NUMBER])
        size = abs(float(value))
    except (ValueError, OverflowError):
        return None
    return value if size == 0 or LEAST <= size <= MOST else None


class Values:
    """The outputs of a prompt's nodes, each found when it is first asked for."""

    def __init__(
        self,
        nodes: Mapping[str, Node],
        rows: Mapping[str, Row],
        choices: Mapping[str, Choice],
        readers: Mapping[str, Callable[[str], Any]],
    ):
        self._nodes, self._rows, self._choices, self._readers = nodes, rows, choices, readers
        self._files: dict[tuple[str, str], Any] = {}
        self._outputs: dict[str, tuple] = {}
        self._chosen: dict[str, list[Link | Bundle | _Literal | None]] = {}
        self._stored: dict[str, Link] | None = None

    def at(self, link: Link | None) -> Any:
        """The value on a link, None if it is unknown."""
        if link is None:
            return None
        name, slot = link
        if name not in self._outputs:
            if name not in self._nodes:
                return None
            self._evaluate(name)
        outputs = self._outputs[name]
        return outputs[slot] if 0 <= slot < len(outputs) else None

    def chosen(self, link: Link) -> Link | None:
        """The link that an output hands on, None where it does not or of which it is unknown."""
        name, slot = link
        chosen = self._chosen.get(name)
        if chosen is None:
            node = self._nodes.get(name)
            choice = self._choices.get(node.kind) if node is not None else None
            if choice is None:
                return None
            chosen = self._choose(Given(node, self), choice)
        found = chosen[slot] if 0 <= slot < len(chosen) else None
        return found if type(found) is Link else None

    def file(self, kind: str, name: str) -> Any:
        """What a reader says of a file; of a prompt that names many, the first few are looked at."""
        key = kind, name
        if key not in self._files:
            if len(self._files) >= _MOST_FILES:
                return None
            self._files[key] = self._readers[kind](name)
        return self._files[key]

    def read(self, given: Any) -> Any:
        """The value of an input as it was sent."""
        try:
            return self.of(given)
        except _Wanted as wanted:
            self._evaluate(*wanted.args)
            return self.of(given)

    def of(self, given: Any) -> Any:
        """As ``read``, within a formula: ``_Wanted`` for what has to be evaluated before."""
        if type(given) is list and len(given) == 2 and type(given[0]) is str and type(given[1]) is int:
            name, slot = given  # nearly always
        else:
            link, literal = link_or_literal(given)
            if link is None:
                return literal
            name, slot = link
        outputs = self._outputs.get(name)
        if outputs is not None:
            return outputs[slot] if 0 <= slot < len(outputs) else None
        if name not in self._nodes:
            return None
        raise _Wanted(name)

    def stored(self, name: object) -> Link | None:
        """What a SetNode keeps under a name; the first of two that share one, as the front end resolves them."""
        if self._stored is None:
            self._stored = {}
            for node in self._nodes.values():
                if node.kind in _SETTERS and (key := stored_name(node)) is not None:
                    link = next((link for value in node.inputs.values() if (link := as_link(value))), None)
                    if link is not None:
                        self._stored.setdefault(key, link)
        return self._stored.get(name) if isinstance(name, str) else None

    def _output(self, link: Link) -> Any:
        outputs = self._outputs[link.node]
        return outputs[link.slot] if 0 <= link.slot < len(outputs) else None

    def _evaluate(self, start: str) -> None:
        """Evaluate a node and what it needs: one that lacks something waits until that is there."""
        waiting, open_ = [Given(self._nodes[start], self)], {start}
        while waiting:
            given = waiting[-1]
            node = given.node.id
            if node not in self._outputs:
                try:
                    self._outputs[node] = self._formula(given)
                except _Wanted as wanted:
                    (needed,) = wanted.args
                    if needed in open_:
                        self._outputs[needed] = UNKNOWN  # it needs itself
                    else:
                        waiting.append(Given(self._nodes[needed], self))
                        open_.add(needed)
                    continue
            waiting.pop()
            open_.discard(node)

    def _formula(self, given: Given) -> tuple:
        kind = given.node.kind
        try:
            if (choice := self._choices.get(kind)) is not None:
                return self._pass_on(given, choice)
            row = self._rows.get(kind)
            return tuple(map(_meant, row.outputs(given))) if row is not None else UNKNOWN
        except _FORMULA_ERRORS:
            return UNKNOWN

    def _choose(self, given: Given, choice: Choice) -> list[Link | Bundle | _Literal | None]:
        """What a node hands on, without what that carries."""
        while True:
            try:
                return self._choice_of(given, choice)
            except _Wanted as wanted:
                self._evaluate(*wanted.args)
            except _FORMULA_ERRORS:
                self._chosen[given.node.id] = []

    def _choice_of(self, given: Given, choice: Choice) -> list[Link | Bundle | _Literal | None]:
        """What a node hands on, an entry for each output."""
        node = given.node
        known = self._chosen.get(node.id)
        if known is None:
            found = choice.chosen(given)
            if type(found) is str:
                found = given.link(found) or _Literal(given.maybe(found))
            known = self._chosen[node.id] = found if type(found) is list else [found]
        return known

    def _pass_on(self, given: Given, choice: Choice) -> tuple:
        outputs: list[Any] = []
        for found in self._choice_of(given, choice):
            if type(found) is _Literal:
                found = _meant(found.value)
            elif type(found) is Link:
                if found.node in self._outputs:
                    found = self._output(found)
                elif found.node in self._nodes:
                    raise _Wanted(found.node)
                else:
                    found = None
            outputs.append(found)
        return tuple(outputs)


class _Literal(NamedTuple):
    """A value that was sent in a link's place."""

    value: Any


_SETTERS = ("SetNode", "easy setNode")


def stored_name(node: Node) -> str | None:
    """The name under which a SetNode keeps, or a GetNode finds, a value: its one text."""
    return next((value for value in node.inputs.values() if isinstance(value, str)), None)


def _meant(value: Any) -> Any:
    """A number that nobody can mean -> None; everything else as it is."""
    return value if isinstance(value, bool) or not isinstance(value, (int, float)) else as_number(value)
