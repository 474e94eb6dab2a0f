# SPDX-License-Identifier: Apache-2.0
"""What a JSON text is that somebody wants checked, and the API prompt in it: unwrapped, or made of a saved graph.

Prompts come as the front end exports them (API format), as it saves them (nodes and links), and wrapped in requests,
answers and histories of servers: ``{"input": {"workflow": ...}}``, ``{"output": ..., "workflow": ...}``, as text in a
text, too. A prompt is told by its nodes, not by the names around it. Whatever was not understood is counted and said,
so that "nothing found" is never the answer to something that nobody read.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...checkpoint.file.header import no_collection
from ...kernels.errors import PackError
from .prompt_graph import PromptGraph
from .saved_graph import Converted, converted

API, SAVED, EMPTY = "API prompt", "saved workflow", "empty"
EXPECTED = (
    "a prompt in API format, a workflow as the front end saves it, or either of them inside a request or an answer "
    'such as {"prompt": ...} or {"input": {"workflow": ...}}'
)
_MOST_LOOKED, _DEEPEST, _LONGEST_TEXT = 2000, 8, 8 << 20
_MOST_NAMED = 5
_MAGIC = {
    b"\x89PNG": "a PNG picture",
    b"RIFF": "a WebP picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x1a\x45\xdf\xa3": "a film",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
}


class NotRead(PackError):
    """A text in which there is no prompt; the message says what it is instead, and what was expected."""


@dataclass(frozen=True)
class Reading:
    """``shape``: API, SAVED or EMPTY. ``place``: where in the text it was, "" for all of it.

    ``nodes``: how many there are that would run; ``understood``: those whose class and values are known to the check;
    ``unknown``: one phrase for each kind of thing that was not understood. ``prompt`` is in API form.
    """

    shape: str
    place: str = ""
    nodes: int = 0
    understood: int = 0
    unknown: tuple[str, ...] = ()
    prompt: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        if self.shape == EMPTY:
            return "There are no nodes in it, so nothing was checked."
        where = f", found at {self.place}" if self.place not in ("", "prompt") else ""
        if not self.unknown:
            return f"Read as: {self.shape}{where}; all {self.nodes:,} nodes understood."
        unknown = "; ".join(self.unknown)
        counts = f"{self.understood:,} of {self.nodes:,} nodes understood"
        return f"Read as: {self.shape}{where}; {counts}. Unknown: {unknown}."

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the prompt."""
        counts = {"nodes": self.nodes, "understood": self.understood, "unknown": list(self.unknown)}
        return {"shape": self.shape, "place": self.place} | counts | {"text": str(self)}


@no_collection()  # which would look at the 10,000 nodes of a prompt again and again
def read(body: bytes) -> Reading:
    """Raises NotRead for a text without a prompt in it."""
    return understand(_parsed(body))


def understand(data: Any) -> Reading:
    """Parsed JSON -> what it is. Raises NotRead."""
    prompts, graphs, all_looked = _prompts_in(data)
    if not (prompts or graphs):
        if _is_empty(data):
            return Reading(EMPTY)
        if data in ({}, [], None):
            raise NotRead(f"this is empty; expected {EXPECTED}")
        raise NotRead(f"this is {_named(data)}, with no prompt in it; expected {EXPECTED}")
    place, found = (prompts or graphs)[0]
    classes = _host_classes()
    if prompts:
        shape, made, skipped = API, Converted(found), len(prompts) - 1
    else:
        shape, made, skipped = SAVED, converted(found, classes), len(graphs) - 1
    graph = PromptGraph(made.prompt)
    total = len(made.prompt) + made.lost
    if not total:
        return Reading(EMPTY, place)
    strange = [name for name in made.prompt if name not in graph.nodes]
    missing = [node for node in graph.nodes.values() if classes is not None and node.kind not in classes]
    unread = [f"{graph.nodes[name].kind} #{name}" for name in made.unread if name in graph.nodes]
    doubtful = made.unread.keys() & graph.nodes.keys() | {node.id for node in missing}
    unknown = [
        _phrase("entry that is not a node", "entries that are not nodes", strange),
        _phrase(
            "node of a class that this ComfyUI does not have", "nodes of classes that this ComfyUI does not have",
            [node.kind for node in missing],
        ),
        _phrase("node with values that could not be read", "nodes with values that could not be read", unread),
        *made.notes,
        f"{skipped} more in the same text" if skipped else "",
        "" if all_looked else "the rest of a very large text",
    ]  # fmt: skip
    understood = len(graph.nodes) - len(doubtful)
    return Reading(shape, place, total, understood, tuple(filter(None, unknown)), made.prompt)


def _parsed(body: bytes) -> Any:
    if not body.strip(b"\xef\xbb\xbf \t\r\n\0"):
        raise NotRead(f"this is empty; expected {EXPECTED}")
    for magic, name in _MAGIC.items():
        if body.startswith(magic):
            raise NotRead(f"this is {name}; open it in ComfyUI, export the workflow in API format, and check that")
    try:
        return json.loads(body)  # of bytes: UTF-8, 16 or 32, with a byte order mark or without
    except UnicodeDecodeError:
        raise NotRead(f"this is not text; expected {EXPECTED}") from None
    except RecursionError:
        raise NotRead(f"this is nested too deeply for a prompt; expected {EXPECTED}") from None
    except ValueError as error:
        raise NotRead(f"this is not JSON ({error}); expected {EXPECTED}") from None


_Found = list[tuple[str, Mapping[str, Any]]]


def _prompts_in(data: Any) -> tuple[_Found, _Found, bool]:
    """-> API prompts, saved graphs, each with its place, the outer ones first; and whether everything was looked at."""
    prompts: _Found = []
    graphs: _Found = []
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), data)])
    for _ in range(_MOST_LOOKED):
        if not waiting:
            break
        place, value = waiting.popleft()
        if isinstance(value, str):
            value = _text_in_text(value)
        if _is_api(value):
            prompts.append((".".join(place), value))
        elif _is_saved(value):
            graphs.append((".".join(place), value))
        elif len(place) < _DEEPEST:
            waiting += [((*place, str(name)[:80]), inner) for name, inner in _inner(value)]
    return prompts, graphs, not waiting


def _inner(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for name, inner in pairs:
        if isinstance(inner, (Mapping, list)) or (isinstance(inner, str) and inner.lstrip()[:1] == "{"):
            yield name, inner


def _text_in_text(text: str) -> Any:
    if len(text) > _LONGEST_TEXT:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_api(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(entry, Mapping) and isinstance(entry.get("class_type"), str) for entry in value.values()
    )


def _is_saved(value: Any) -> bool:
    nodes = value.get("nodes") if isinstance(value, Mapping) else None
    if not isinstance(nodes, list):
        return False
    return any(isinstance(node, Mapping) and "type" in node for node in nodes) or "links" in value


def _is_empty(data: Any) -> bool:
    """``{}`` as the prompt of a request: what the front end sends of an empty canvas."""
    if not isinstance(data, Mapping) or not data:
        return False
    for _ in range(_DEEPEST):
        if not isinstance(data, Mapping) or not data:
            break
        inner = [data[name] for name in ("prompt", "output", "input", "workflow") if name in data]
        if not inner:
            return False
        data = inner[0]
    return data == {}


def _named(data: Any) -> str:
    if isinstance(data, Mapping):
        names = ", ".join(f"`{str(name)[:40]}`" for name in list(data)[:_MOST_NAMED])
        return f"an object with {names}{', ...' if len(data) > _MOST_NAMED else ''}"
    if isinstance(data, list):
        return f"a list of {len(data):,} entries"
    return "a single value"


def _phrase(one: str, more: str, names: list[str]) -> str:
    """``2 nodes of ... (a, b)``; an empty one for no names."""
    if not names:
        return ""
    counts = Counter(str(name)[:80] for name in names)
    named = ", ".join(counts if len(counts) <= _MOST_NAMED else [*list(counts)[:_MOST_NAMED], "..."])
    return f"{len(names):,} {one if len(names) == 1 else more} ({named})"


def _host_classes() -> Mapping[str, Any] | None:
    """The node classes of the host, where it runs in this process."""
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", None)
    return classes if isinstance(classes, Mapping) else None
