# SPDX-License-Identifier: Apache-2.0
"""Which value belongs to which widget: a saved node stores its values by position, and only its class knows the order.

Where the host runs, its node classes say it, as /object_info does; else the node's own ``inputs`` do, in which newer
front ends list every widget. Values that do not fit are left out as a whole: a wrong one would be worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_KINDS: dict[str, tuple[type, ...]] = {
    "INT": (int, float), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,), "COMBO": (str, int, float, bool),
}  # fmt: skip
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
_SEEDS = ("seed", "noise_seed")  # which get a control from the front end, whatever their class says
_CONTROLS = ("fixed", "increment", "decrement", "randomize")
_DEEPEST = 4
_BUTTONS = ("UPLOAD", "_UI")  # ends of the types of widgets that are no inputs: a button for a file, a player


class _Widget(NamedTuple):
    """``kind``: a key of _KINDS, _DYNAMIC, or "" if unknown. ``options``: of a dynamic choice, key -> inputs."""

    name: str
    kind: str
    optional: bool = False
    options: Mapping[Any, Any] = {}


def values_of(node: Mapping[str, Any], classes: Mapping[str, Any] | None) -> tuple[dict[str, Any], bool]:
    """A saved node -> its values by widget, and whether they are all there is to know."""
    stored = node.get("widgets_values")
    if isinstance(stored, Mapping):  # some packs store them by name
        return {name: value for name, value in stored.items() if isinstance(name, str)}, True
    stored = stored if isinstance(stored, list) else []
    named = _named_by(node)
    declared = _declared(classes.get(node.get("type"))) if classes is not None else None
    if declared is not None:
        if named and [widget.name for widget in declared if "." not in widget.name and widget.name in named] != [
            name for name in named if name in {widget.name for widget in declared}
        ]:
            return {}, False  # the class has changed its order since
        found, used = _take(declared, stored)
        return (found, True) if found is not None and used <= len(stored) else ({}, not (declared or stored))
    if not named:
        return {}, not stored
    found, used = _take([_Widget(name, "") for name in named], stored)
    if found is None or used != len(stored):
        return {}, False
    return {name: value for name, value in found.items() if not named[name].endswith(_BUTTONS)}, True


def _named_by(node: Mapping[str, Any]) -> dict[str, str]:
    """The widgets that a node lists among its inputs, in their order, and the type of each."""
    found = {}
    inputs = node.get("inputs")
    for entry in inputs if isinstance(inputs, list) else ():
        widget = entry.get("widget") if isinstance(entry, Mapping) else None
        name = widget.get("name") if isinstance(widget, Mapping) else None
        if isinstance(name, str):
            found[name] = str(entry.get("type"))
    return found


def _take(widgets: list[_Widget], stored: list[Any]) -> tuple[dict[str, Any] | None, int]:
    """-> widget -> value, how many were used; None instead of the values if one does not fit its widget."""
    found: dict[str, Any] = {}
    waiting, at = list(reversed(widgets)), 0
    while waiting:
        widget = waiting.pop()
        if at >= len(stored):
            if widget.optional:
                continue
            return None, at
        value = stored[at]
        at += 1
        if not _fits(widget.kind, value):
            return None, at
        found[widget.name] = value
        if at < len(stored) and stored[at] in _CONTROLS and _may_be_controlled(widget, value):
            at += 1
        if widget.kind == _DYNAMIC and isinstance(value, str) and widget.name.count(".") < _DEEPEST:
            waiting += reversed(list(_widgets(widget.options.get(value), f"{widget.name}.")))
    return found, at


def _may_be_controlled(widget: _Widget, value: Any) -> bool:
    return widget.name.rpartition(".")[2] in _SEEDS or bool(widget.options.get("control_after_generate"))


def _fits(kind: str, value: Any) -> bool:
    if kind in ("", _DYNAMIC) or value is None:
        return True
    if isinstance(value, bool) and kind in ("INT", "FLOAT"):
        return False
    return isinstance(value, _KINDS[kind])


def _declared(node_class: Any) -> list[_Widget] | None:
    """The widgets of a node class in their order; None for a class that is not there or does not tell."""
    try:
        return list(_widgets(node_class.INPUT_TYPES(), ""))
    except Exception:  # another pack's code
        return None


def _widgets(types: Any, prefix: str) -> Iterator[_Widget]:
    """What INPUT_TYPES returns, or an option of a dynamic choice has for inputs -> widgets."""
    for part in ("required", "optional"):
        entries = types.get(part) if isinstance(types, Mapping) else None
        for name, spec in entries.items() if isinstance(entries, Mapping) else ():
            kind, *rest = spec if isinstance(spec, (tuple, list)) and spec else (None,)
            settings = rest[0] if rest and isinstance(rest[0], Mapping) else {}
            kind = _kind_of(kind, settings)
            if kind is None or settings.get("forceInput"):
                continue
            options: dict[Any, Any] = {"control_after_generate": settings.get("control_after_generate")}
            if kind == _DYNAMIC:
                choices = settings.get("options") or ()
                options |= {choice["key"]: choice["inputs"] for choice in choices if isinstance(choice, Mapping)}
            yield _Widget(prefix + name, kind, part == "optional", options)


def _kind_of(kind: Any, settings: Mapping[str, Any]) -> str | None:
    """The kind of widget that an input gets; None for one that takes links only."""
    if isinstance(kind, (list, tuple)):
        return "COMBO"
    if not isinstance(kind, str):
        return None
    if kind == _DYNAMIC or settings.get("widgetType"):
        return kind if kind == _DYNAMIC else ""
    kinds = kind.split(",")  # "FLOAT,INT": the first has the widget
    if not set(kinds) <= _KINDS.keys():
        return None
    return kinds[0] if len(kinds) == 1 else ""
