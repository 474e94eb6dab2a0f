# SPDX-License-Identifier: Apache-2.0
"""The launch guard: a prompt and the host's facts -> findings, and what they look like to a user.

Nothing here refuses, changes or runs anything; routes.py and the NVFP4LaunchGuard node act on the findings.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...checkpoint.file.header import no_collection
from ...measure.escape import line, report
from ..border import log_fault
from ..doctor.cards import is_nvidia
from . import rules_host
from .kinds import GUARD_NODE
from .prompt_graph import PromptGraph
from .rules import RULES
from .view import ERROR, INFO, WARNING, Finding, OutOfTime, View

__all__ = [
    "ERROR", "INFO", "WARNING", "Finding", "check", "check_host", "describe", "not_in_time", "one_line",
    "policy_in_graph",
]  # fmt: skip

logger = logging.getLogger(__name__)

WARN, CURE, BLOCK = "warn", "cure", "block"
POLICIES = (WARN, CURE, BLOCK)
NOT_CHECKED = "not_checked"
MOST_FINDINGS = 100
_MOST_NAMED = 8
_ORDER = (ERROR, WARNING, INFO)


@no_collection()  # which would look at the 10,000 nodes of a prompt again and again
def check(
    prompt: Any, facts: Mapping[str, Any], targets: Collection[str] | None = None, limit: float = math.inf
) -> list[Finding]:
    """API prompt or its graph, facts of probe() -> findings on what will run, the worst first. Never raises.

    ``targets``: the output nodes that will run, where only some do. What is unknown gives no finding. Rules that fail
    are named in one finding, and so are those for which ``limit`` (seconds) leaves no time.
    """
    until = time.monotonic() + limit
    found: list[Finding] = []
    failed: list[str] = []
    late: list[str] = []
    reference, more = "", False
    try:
        graph = _graph(prompt)
        outputs = _outputs(graph, targets)
        view = View(graph if outputs is None else graph.restricted_to(outputs), facts, until)
    except Exception as error:
        return [_failed(["reading the prompt"], log_fault(error, "reading the prompt"))]
    for rule in RULES:
        try:
            view.keep_time()
            for count, finding in enumerate(rule(view), 1):
                found.append(finding)
                if count == MOST_FINDINGS:
                    more = True
                    break
        except OutOfTime:
            late.append(rule.__name__)
        except Exception as error:
            failed.append(rule.__name__)
            reference = reference or log_fault(error, rule.__name__)
    found.sort(key=lambda finding: _ORDER.index(finding.severity))
    if len(found) > MOST_FINDINGS or more:
        why = f"Of one kind, and of all together, {MOST_FINDINGS} are listed."
        found[MOST_FINDINGS:] = [
            Finding("more", WARNING, "There is more to say on this prompt.", why, "Mend the others first.")
        ]
    if failed:
        found.append(_failed(failed, reference))
    if late:
        found.append(not_in_time(limit, late))
    return found


def _graph(prompt: Any) -> PromptGraph:
    return prompt if isinstance(prompt, PromptGraph) else PromptGraph(prompt)


def not_in_time(limit: float, left_out: Iterable[str] = ()) -> Finding:
    """The finding of a check that took longer than ``limit`` seconds; ``left_out``: the rules it did not come to."""
    names = ", ".join(left_out)
    return Finding(
        NOT_CHECKED,
        WARNING,
        "This prompt was checked in part only." if names else "This prompt was not checked.",
        f"Checking took longer than {limit:g} s{f'; left out: {names}' if names else ''}. Reading model files from a "
        "slow disk is the usual reason.",
        "Open NVFP4 Doctor, which waits longer, or queue again: what was read is remembered.",
    )


def nothing_to_check() -> Finding:
    """The finding of a prompt without nodes, so that nobody takes it for a sound one."""
    return Finding(
        NOT_CHECKED,
        INFO,
        "There was nothing to check.",
        "There are no nodes in the prompt.",
        "Open a workflow, or send one.",
    )


def _failed(rules: list[str], reference: str) -> Finding:
    return Finding(
        NOT_CHECKED,
        WARNING,
        "This prompt was checked in part only.",
        f"Failed: {', '.join(rules)}. It is a fault of NVFP4 Video, not of the prompt.",
        f"Please report it with the lines of ComfyUI's log that have the reference {reference}.",
    )


def _outputs(graph: PromptGraph, targets: Collection[str] | None) -> Collection[str] | None:
    """The nodes for whose sake the host will run others; None, that is all, where it cannot be told.

    A prompt without an output, which the host will refuse, is judged as a whole too: somebody is still building it.
    """
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", None)
    if not isinstance(classes, Mapping):
        return targets
    output = {kind: _is_output(classes, kind) for kind in {node.kind for node in graph.nodes.values()}}
    names = [node.id for node in graph.nodes.values() if output[node.kind]]
    return (names or None) if targets is None else set(names).intersection(targets)


def _is_output(classes: Mapping[str, Any], kind: str) -> bool:
    """As the host asks; a class that is not there, which the host may replace by another, counts as one."""
    try:
        return kind not in classes or getattr(classes[kind], "OUTPUT_NODE", False) is True
    except Exception:  # V3 nodes compute it, and another pack's may fail; the host will say so
        return True


def check_host(facts: Mapping[str, Any]) -> list[Finding]:
    """Facts of probe() -> what is wrong with the host whatever it is asked to run; nothing on a healthy one."""

    def fact(name: str) -> Any:
        return getattr(facts.get(name), "value", None)

    found = []
    streams, dynamic = fact("async_offload_streams"), fact("dynamic_vram")
    if fact("prefetch_crash") is True and dynamic is not False and streams != 0:
        found.append(
            Finding(
                "prefetch_crash",
                WARNING,
                "This ComfyUI stops in the middle of sampling LTX-2 when the whole model is on the GPU.",
                "It is a checkout of 2 to 4 May 2026, or a fork of one, with the prefetch of commit 783782d5.",
                "Update ComfyUI (fixed by commit c47633f3), or put NVFP4 Launch Guard with policy `cure` behind the "
                "model loader.",
            )
        )
    if fact("joint_noise_crash") is True:
        whose = rules_host.whose_noise(fact)
        pack = whose.partition("/")[0]
        found.append(
            Finding(
                "replaced_noise",
                WARNING,
                f"{pack} has replaced ComfyUI's noise by one that cannot take joint audio and video.",
                f"comfy.sample.prepare_noise is {whose}'s; it was tried with a joint latent.",
                f"Update or disable {pack} to sample LTX-2 with sound.",
            )
        )
    crash = fact("joint_sampling_crash") or ()
    if crash:
        packs = ", ".join(dict.fromkeys(whose.partition("/")[0] for _, whose in crash))
        found.append(
            Finding(
                "replaced_sampling",
                WARNING,
                f"Sampling functions of {packs} in the place of ComfyUI's cannot take joint audio and video.",
                f"{', '.join(f'{name} ({whose})' for name, whose in crash)}; tried with a joint latent.",
                f"Update or disable {packs} to sample LTX-2 with sound.",
            )
        )
    cuda, capability = fact("torch_cuda"), fact("capability")
    able = isinstance(capability, tuple) and capability >= (10, 0) and is_nvidia(fact)
    if able and isinstance(cuda, tuple) and cuda < (13, 0):
        found.append(
            Finding(
                "old_cuda",
                WARNING,
                "The FP4 tensor cores of this GPU are not used.",
                f"PyTorch here is built for CUDA {'.'.join(map(str, cuda))}; comfy-kitchen's FP4 kernels need 13.",
                "Install PyTorch for CUDA 13.",
            )
        )
    return found


def policy_in_graph(prompt: Any) -> str | None:
    """The strictest policy among the NVFP4LaunchGuard nodes of a prompt or its graph, or None without such a node."""
    graph = _graph(prompt)
    found = {graph.value(node.id, "policy") for node in graph.of_kind(GUARD_NODE)}
    if not found:
        return None
    return next((policy for policy in (BLOCK, CURE) if policy in found), WARN)


def one_line(finding: Finding) -> str:
    """For a log: severity, sentence, remedy, nodes."""
    return line(f"{finding.severity}: {finding.title} {finding.remedy}{_at(finding)}")


def describe(findings: Iterable[Finding]) -> str:
    """For a node or a console: every finding with its reason and remedy."""
    lines = [(f"{one.severity}: {one.title}{_at(one)}", f"  {one.why}", f"  {one.remedy}") for one in findings]
    return report(itertools.chain(*lines)) if lines else "nothing found"


def _at(finding: Finding) -> str:
    if not finding.nodes:
        return ""
    named = ", ".join(finding.nodes[:_MOST_NAMED]) + (", ..." if len(finding.nodes) > _MOST_NAMED else "")
    return f" (node{'s' if len(finding.nodes) > 1 else ''} {named})"
