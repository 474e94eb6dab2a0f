# SPDX-License-Identifier: Apache-2.0
"""Wild prompts, which the guard must hand on as they came; huge ones, which must not keep the event loop waiting."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

from ...samples import shapes
from ...samples.damage import damage_json
from . import stub
from .run import FOREIGN, SLOW, WRONG, Found, Kind, Outcome, describe

NODES = 10_000
LOOP_SECONDS = 0.2
_REPEATS = 3
faults: list[str] = []  # of the guard in this process, which it would only log


def prepare(folder: Path) -> Any:
    """The guard on a vulnerable host, over the stub -> its module of routes."""
    stub.connect(folder)
    from ...host.guard import routes

    facts = stub.vulnerable_host()
    routes.probe = lambda: facts
    routes.log_fault = lambda error, doing: faults.append(describe(error))
    return routes


def case(routes: Any, rng: Random, folder: Path) -> Outcome:
    """One wild body of POST /prompt: with the guard the host gets what it gets without, but for the findings."""
    outcome, data = Outcome(), body(rng)
    faults.clear()
    before = {key: _shown(value) for key, value in data.items()}
    start = time.process_time()
    try:
        after = routes.on_prompt(data)
    except Exception as error:
        outcome.found.append(Found(FOREIGN, "guard", describe(error)))
        return outcome
    outcome.most = time.process_time() - start
    outcome.notes["with findings" if after is not data else "without findings"] += 1
    outcome.found += [Found(FOREIGN, "guard", text) for text in faults]  # the prompt went on unchecked
    if {key: _shown(value) for key, value in data.items()} != before:
        outcome.found.append(Found(WRONG, "guard", "written: the guard wrote into the prompt"))
    if after is data:
        return outcome
    for key in data.keys() | after.keys():
        if key != "extra_data" and after.get(key) is not data.get(key):
            outcome.found.append(Found(WRONG, "guard", f"changed: the host gets another {key!r}"))
    extra = dict(after.get("extra_data") or {})
    listed = extra.pop(routes.IN_HISTORY, None)
    if extra != data.get("extra_data", {}):
        outcome.found.append(Found(WRONG, "guard", "changed: the host gets other extra_data"))
    if any(finding["id"] == "not_checked" for finding in listed):
        outcome.found.append(Found(WRONG, "guard", f"not checked: {json.dumps(listed)[:400]}"))
    return outcome


def body(rng: Random) -> dict[str, Any]:
    """A body of POST /prompt: of any shape, or a real one with a few things in it changed."""
    data = shapes.wild(rng.getrandbits(48))
    if rng.random() < 0.5:
        prompt: Any = rng.choice((shapes.clip, lambda: rng.choice(list(shapes.PROMPTS.values()))(30)))()
        for _ in range(rng.choice((0, 1, 2, 5))):
            prompt = damage_json(prompt, rng)
        data["prompt"] = prompt
    return data


def _shown(value: Any) -> str:
    """Text that tells two values apart; repr() of ten to the 4400th is refused by Python."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_shown(key)}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return hex(value) if type(value) is int else repr(value)


def huge(rng: Random) -> dict[str, Any]:
    """10,000 nodes: of one slow shape, of several, or linked at random."""
    how = rng.random()
    if how < 0.5:
        return rng.choice(list(shapes.PROMPTS.values()))(NODES)
    if how < 0.75:
        prompt: dict[str, Any] = {}
        for name in rng.sample(list(shapes.PROMPTS), 4):
            made = shapes.PROMPTS[name](NODES // 4)
            prompt |= made if rng.random() < 0.5 else {f"{name}{key}": entry for key, entry in made.items()}
        return prompt
    far = rng.choice((1, 3, 50, NODES))
    return {str(i): _node(rng, i, far) for i in range(NODES)}


def _node(rng: Random, number: int, far: int) -> dict[str, Any]:
    """A node linked to others at most ``far`` before or behind it."""
    inputs = {}
    for _ in range(rng.choice((1, 2, 4))):
        other = (number + rng.randint(-far, far)) % NODES
        inputs[rng.choice(shapes.INPUTS)] = [str(other), 0] if rng.random() < 0.8 else rng.choice((24, 121, "x", 0.5))
    return shapes.node(rng.choice(shapes.KINDS), **{name: value for name, value in inputs.items() if name})


def loop_case(routes: Any, rng: Random, folder: Path) -> Outcome:
    """One huge prompt: CPU time for which the host's event loop waits, the least of three where it is too long."""
    outcome, data = Outcome(), {"prompt": huge(rng), "client_id": "someone"}
    outcome.most = float("inf")
    for _ in range(_REPEATS):
        start = time.process_time()
        routes.on_prompt(data)
        outcome.most = min(outcome.most, time.process_time() - start)
        if outcome.most <= LOOP_SECONDS:
            break
    if outcome.most > LOOP_SECONDS:
        kinds = sorted({entry["class_type"] for entry in data["prompt"].values()})[:12]
        text = f"loop: {outcome.most:.2f} s of CPU for {len(data['prompt']):,} nodes of {', '.join(kinds)[:200]!r}"
        outcome.found.append(Found(SLOW, "guard", text))
    return outcome


def minimise(routes: Any, rng: Random, folder: Path, found: Found) -> list:
    """The body, as far as JSON can say it."""
    data = {"prompt": huge(rng)} if found.what == SLOW else body(rng)
    (folder / "body.json").write_text(json.dumps(data, default=str) + "\n")
    return []


PROMPTS = Kind("wild prompts, with the guard and without", prepare, case, minimise)
LOOP = Kind(f"prompts of {NODES:,} nodes", prepare, loop_case, minimise)
