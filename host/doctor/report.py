# SPDX-License-Identifier: Apache-2.0
"""The host report: facts, verdict for each loaded model, findings and the recommended launch, as JSON and as text.

It is the body of GET /nvfp4/report and what the `doctor` command prints, so it holds no paths and no names of users.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import PurePath
from typing import Any

from ...measure import escape
from .facts import Fact, gib, why
from .probe import probe
from .profiles import launch_profile

SCHEMA = 1
NO_NVFP4 = "none"
_LINEAR = f"{__package__.rpartition('.')[0]}.compute.linear"  # whose layers are ours; not imported for its name
_PATHS = {
    "fast": "on the fast path", "slow": "on a slow path", "unknown": "on an unknown path", NO_NVFP4: "without NVFP4",
}  # fmt: skip
_RESIDENT = 0.95  # of a model's bytes; the rest may be what the host keeps back for itself


def report(facts: Mapping[str, Fact] | None = None, findings: Iterable = (), reading: Any = None) -> dict:
    """Facts, by default those of now, and findings of the guard -> the report, ready for JSON.

    ``reading``: what a prompt was taken for, if one was checked (host/guard/reading.py).
    """
    facts = probe() if facts is None else facts
    names = ("id", "group", "label", "text", "known", "source")
    return {
        "schema": SCHEMA,
        "facts": [{name: getattr(fact, name) for name in names} for fact in facts.values()],
        "models": models(facts),
        "findings": [finding if isinstance(finding, dict) else finding.as_dict() for finding in findings],
        "launch": launch_profile(facts).as_dict(),
    } | ({} if reading is None else {"reading": reading.as_dict()})


def text(report: Mapping) -> str:
    """The report as lines for a terminal, a node or a bug report."""
    lines = [headline(report), ""]
    for group, facts in groupby(report["facts"], key=lambda fact: fact["group"]):
        lines += [group, *(f"  {fact['label']}: {fact['text']}" for fact in facts), ""]
    lines.append("Loaded models")
    for model in report["models"]:
        verdict = "no NVFP4" if model["verdict"] == NO_NVFP4 else model["verdict"]
        lines += [f"  {model['name']}: {verdict} ({model['text']})", f"    {model['why']}"]
    lines += [] if report["models"] else ["  none"]
    lines += ["", "Findings"]
    for finding in report["findings"]:
        lines += [f"  {finding['severity']}: {finding['title']}", f"    {finding['why']}", f"    {finding['remedy']}"]
        lines += [f"    nodes: {', '.join(finding['nodes'])}"] if finding.get("nodes") else []
    reading = report.get("reading")
    lines += [f"  {reading['text']}"] if reading else []
    if not report["findings"]:
        lines.append("  none in what was understood" if reading and reading["unknown"] else "  none")
    launch = report["launch"]
    lines += ["", f"Recommended launch, {launch['name']}", f"  {launch['command']}"]
    lines += [f"  {flag['flag']}: {flag['why']} ({flag['evidence']})" for flag in launch["flags"]]
    lines += [f"  {launch['note']}"] if launch["note"] else []
    lines += ["", "Other flags of this ComfyUI"] if launch["others"] else []
    lines += [f"  {flag['flag']}: {flag['what']}" for flag in launch["others"]]
    return escape.report(lines)


def headline(report: Mapping) -> str:
    """What the report comes to: how many findings of each severity, how many models on which path."""
    findings = Counter(finding["severity"] for finding in report["findings"])
    paths = Counter(model["verdict"] for model in report["models"])
    found = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in findings.items())
    models = ", ".join(f"{count} {_PATHS[verdict]}" for verdict, count in paths.items())
    return f"{found or 'nothing'} found; models: {models or 'none loaded'}"


def models(facts: Mapping[str, Fact]) -> list[dict[str, str]]:
    """Loaded models -> name, verdict ("fast", "slow", "unknown", "none"), text, why: is this one on the fast path?

    "none" is a model without NVFP4 layers, for which the question is none.
    """
    management = sys.modules.get("comfy.model_management")
    patchers = [loaded.model for loaded in list(getattr(management, "current_loaded_models", ()))]
    return [_describe(patcher, facts) for patcher in patchers if patcher is not None]


def _describe(patcher, facts: Mapping[str, Fact]) -> dict[str, str]:
    name = _name(patcher)
    try:
        every = [m for m in patcher.model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
        layers = [m for m in every if m.__dict__.get("quant_format") == "nvfp4"]
        dynamic = bool(getattr(patcher, "is_dynamic", bool)())
        size, loaded = patcher.model_size(), patcher.loaded_size()
        text = f"{len(layers):,} of {len(every):,} layers in NVFP4, DynamicVRAM {'on' if dynamic else 'off'}, "
        text += f"{gib(loaded)} of {gib(size)} on the GPU{_attention(patcher)}"
        if not layers:
            return _model(name, NO_NVFP4, text, _other_formats(every))
        verdict, reason = _compute_verdict(layers, facts)
        # A dynamic model that has not run yet has nothing on the GPU; that says nothing.
        if verdict == "fast" and 0 < loaded < _RESIDENT * size:
            verdict, reason = "slow", f"{gib(size - loaded)} lie outside the GPU's memory and are copied in every step"
        return _model(name, verdict, text, reason)
    except Exception as error:  # a report must come whatever a model of a custom node does
        return _model(name, "unknown", "could not be examined", why(error))


def _attention(patcher) -> str:
    """This pack's choice of attention as the end of a sentence, with what trials of this process have found."""
    module = sys.modules.get(f"{__package__.rpartition('.')[0]}.compute.attention")
    override = getattr(patcher, "model_options", {}).get("transformer_options", {}).get("optimized_attention_override")
    if module is None or not isinstance(override, module.Attention):
        return ""
    found = Counter(trial.winner for trial in module.trials()) if override.choice == module.AUTO else {}
    shapes = ", ".join(f"{name} for {count} shape{'s' * (count > 1)}" for name, count in found.items())
    return f", attention {override.choice}{f': {shapes}' if shapes else ''}"


def _name(patcher) -> str:
    """The files a model was loaded from and its class; the class alone where its loader kept no note of them."""
    kind, note = type(patcher.model).__name__, getattr(patcher, "cached_patcher_init", None)
    # (loader, arguments): the host's loaders and ours take the file first, those of text encoders a list of files.
    arguments = note[1] if isinstance(note, tuple) and len(note) > 1 else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else None
    paths = first if isinstance(first, (list, tuple)) else [first]
    files = [PurePath(path).name for path in paths if isinstance(path, (str, PurePath))]
    return f"{' + '.join(files)} ({kind})" if files else kind


def _other_formats(layers: list) -> str:
    """What the layers of a model without NVFP4 are stored in."""
    counts = Counter(layer.__dict__.get("quant_format") or "not quantized" for layer in layers)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
    return f"there is no NVFP4 weight to dequantize: {listed}" if listed else "it has no layers that could be NVFP4"


def _model(name: str, verdict: str, text: str, reason: str) -> dict[str, str]:
    return {"name": name, "verdict": verdict, "text": text, "why": reason}


def _compute_verdict(layers: list, facts: Mapping[str, Fact]) -> tuple[str, str]:
    """NVFP4 Linears of one model -> verdict, reason."""
    own = [layer for layer in layers if type(layer).__module__ == _LINEAR]
    if reason := _slow_lora(layers):
        return "slow", reason
    if len(own) == len(layers):
        from .. import residency  # needs ComfyUI, which a report of a machine without it does not

        if unknown := str(residency.check()):
            return "slow", unknown
        backend = facts["own_backend"]
        verdict = {"triton": "fast", "torch": "slow"}.get(backend.value, "unknown")
        return verdict, f"weights are dequantized by this pack's kernels: {backend.text}{_lora_of_own(layers)}"
    compute = facts["nvfp4_compute"]
    whole = sum(bool(layer.__dict__.get("_full_precision_mm")) for layer in layers)
    if compute.value == "fp4" and not whole:
        return "fast", f"ComfyUI computes {compute.text}, activations quantized as well"
    if compute.value == "fp4":
        return "slow", f"ComfyUI dequantizes the weights of {whole:,} layers; load the file with NVFP4 Model Loader"
    if not compute.known:
        return "unknown", compute.text
    return "slow", f"ComfyUI's own way: {compute.text}; load the file with NVFP4 Model Loader"


def _slow_lora(layers: list) -> str:
    """What a LoRA costs where the host computes with the weight, or an empty string."""
    from .. import residency

    every, brought = (sum(map(found, layers)) for found in (residency.in_every_step, residency.while_brought))
    if every:
        text = f"a LoRA is computed into the weight in every step in {every:,} of {len(layers):,} layers"
    elif brought:
        text = (
            f"ComfyUI packs the weight again with a LoRA in it in {brought:,} of {len(layers):,} layers, and computes"
        )
        text += " them its own way"
    else:
        return ""
    return text + _reasons(layers)


def _lora_of_own(layers: list) -> str:
    """How LoRAs are computed that cost no step more than their own matmuls, as the end of a sentence."""
    branches = [branch for layer in layers if (branch := layer.__dict__.get("nvfp4_lora")) is not None]
    packed = sum(bool(layer.__dict__.get("nvfp4_lora_refused")) for layer in layers)
    text = ""
    if branches:
        size, eighth = sum(branch.nbytes for branch in branches) / 1e9, sum(branch.packed for branch in branches)
        text = f"; a LoRA is computed beside the packed weight in {len(branches):,} layers, {size:.2f} GB"
        text += f", {eighth:,} in 8 bits" if eighth else ""
    return text + (f"; ComfyUI packed a LoRA into {packed:,} layers{_reasons(layers)}" if packed else "")


def _reasons(layers: list) -> str:
    """Why LoRAs went the host's way, the most frequent reason first."""
    counts = Counter(reason for layer in layers if (reason := layer.__dict__.get("nvfp4_lora_refused")))
    return f" ({'; '.join(reason for reason, _ in counts.most_common(3))})" if counts else ""
