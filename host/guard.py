"""The launch guard: a prompt and the host's facts -> findings, and what they look like to a user.

Nothing here refuses, changes or runs anything; routes.py and the NVFP4LaunchGuard node act on the findings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .guard_rules import RULES
from .guard_view import ERROR, GUARD_NODE, INFO, WARNING, Finding, View
from .prompt_graph import PromptGraph

__all__ = ["ERROR", "INFO", "WARNING", "Finding", "check", "check_host", "describe", "one_line", "policy_in_graph"]

WARN, CURE, BLOCK = "warn", "cure", "block"
POLICIES = (WARN, CURE, BLOCK)
_ORDER = (ERROR, WARNING, INFO)


def check(prompt: Any, facts: Mapping[str, Any], targets: Collection[str] | None = None) -> list[Finding]:
    """API prompt, facts of probe() -> findings, the worst first.

    ``targets``: the output nodes that will run, where only some do. What is unknown gives no finding.
    """
    graph = PromptGraph(prompt)
    if targets is not None:
        graph = graph.restricted_to(targets)
    view = View(graph, facts)
    found = [finding for rule in RULES for finding in rule(view)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


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
    cuda, capability = fact("torch_cuda"), fact("capability")
    if isinstance(cuda, tuple) and isinstance(capability, tuple) and capability >= (10, 0) and cuda < (13, 0):
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
    """The strictest policy among the prompt's NVFP4LaunchGuard nodes, or None without such a node."""
    graph = PromptGraph(prompt)
    found = {graph.value(node.id, "policy") for node in graph.of_kind(GUARD_NODE)}
    if not found:
        return None
    return next((policy for policy in (BLOCK, CURE) if policy in found), WARN)


def one_line(finding: Finding) -> str:
    """For a log: severity, sentence, remedy, nodes."""
    return f"{finding.severity}: {finding.title} {finding.remedy}{_at(finding)}"


def describe(findings: Iterable[Finding]) -> str:
    """For a node or a console: every finding with its reason and remedy."""
    parts = [f"{found.severity}: {found.title}{_at(found)}\n  {found.why}\n  {found.remedy}" for found in findings]
    return "\n".join(parts) if parts else "nothing found"


def _at(finding: Finding) -> str:
    if not finding.nodes:
        return ""
    return f" (node{'s' if len(finding.nodes) > 1 else ''} {', '.join(finding.nodes)})"
