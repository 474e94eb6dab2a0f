# SPDX-License-Identifier: Apache-2.0
"""A call that works against tests/stub_comfy works on every recorded ComfyUI, and on the one that COMFYUI_PATH names.

The recorded facts are in tests/stub_comfy/contract.json, written by tests/record_contract.py.
"""

from __future__ import annotations

import pytest
from nvfp4_video.tests import record_contract

# What the stub offers although some supported host lacks it: a name, or a parameter as "name:parameter". The pack has
# to probe for these before it relies on them.
PROBED = {
    "comfy.ldm.lightricks.vae.audio_vae.VocoderWithBWE",
    "comfy.memory_management.aimdo_enabled",
    "comfy.model_management.in_training",
    "comfy.model_patcher.ModelPatcher.clone:disable_dynamic",
    "comfy.model_patcher.ModelPatcher.clone:force_deepcopy",
    "comfy.model_patcher.ModelPatcher.clone:model_override",
    "comfy.ops.cast_bias_weight:want_requant",
    "comfy.ops.mixed_precision_ops().Linear.forward_comfy_cast_weights:want_requant",
    "comfy.sd.load_diffusion_model:disable_dynamic",
    "comfy.sd.load_diffusion_model_state_dict:disable_dynamic",
    "comfy.sd.load_text_encoder_state_dicts:disable_dynamic",
}
CONTRACT = record_contract.read_contract()


def parameters(entry: str) -> dict[str, tuple[int | None, bool]]:
    """Parameter, stars included -> (position, or None if it goes by name only; whether it may be left out)."""
    found: dict[str, tuple[int | None, bool]] = {}
    by_name = False
    for position, spelled in enumerate(filter(None, entry.partition("(")[2].rstrip(")").split(", "))):
        by_name = by_name or spelled.startswith("*")
        if spelled != "*":
            found[spelled.rstrip("=")] = (None if by_name else position, spelled.endswith("=") or spelled[0] == "*")
    return found


def broken_promises(name: str, stub: str, host: str | None) -> list[str]:
    """What the stub's entry of a name allows that the host's does not."""
    if host is None:
        return [] if name in PROBED else [f"{name} does not exist"]
    if host == "value" and stub.startswith("value"):
        return []
    if stub.partition(" (")[0] != host.partition(" (")[0]:
        return [f"{name} is a {host}, the stub's a {stub}"]
    ours, theirs = parameters(stub), parameters(host)
    swallows_names = any(parameter.startswith("**") for parameter in theirs)
    swallows_positions = any(parameter.startswith("*") and parameter[1] != "*" for parameter in theirs)
    broken = []
    for parameter, (position, has_default) in ours.items():
        if parameter.startswith("*") or f"{name}:{parameter}" in PROBED:
            continue
        found = theirs.get(parameter)
        if found is None and not (swallows_names or (position is not None and swallows_positions)):
            broken.append(f"{name} has no parameter {parameter}")
        elif found and position is not None and found[0] != position:
            broken.append(f"{name} takes {parameter} at position {found[0]}, the stub at {position}")
        elif found and has_default and not found[1]:
            broken.append(f"{name} needs {parameter}, which the stub lets out")
    if not any(parameter.startswith("*") for parameter in ours):
        needed = sorted(parameter for parameter, (_, has_default) in theirs.items() if not has_default)
        broken += [f"{name} needs {missing}, which the stub does not know" for missing in needed if missing not in ours]
    return broken


def all_broken_promises(record: dict) -> list[str]:
    return [
        broken
        for name in record_contract.stub_names()
        for broken in broken_promises(name, record_contract.describe(name), record["names"].get(name))
    ]


@pytest.mark.parametrize("version", CONTRACT)
def test_every_call_on_the_stub_suits_the_recorded_host(version: str):
    assert all_broken_promises(CONTRACT[version]) == []


def test_what_the_pack_must_probe_for_is_what_some_recorded_host_lacks(monkeypatch: pytest.MonkeyPatch):
    probed = set(PROBED)
    needed = set()
    for candidate in probed:
        monkeypatch.setitem(globals(), "PROBED", probed - {candidate})
        if any(all_broken_promises(record) for record in CONTRACT.values()):
            needed.add(candidate)
    assert probed - needed == set()


def test_the_contract_covers_a_host_before_dynamic_vram_and_one_after():
    with_dynamic = {"comfy.memory_management.aimdo_enabled" in record["names"] for record in CONTRACT.values()}
    assert with_dynamic == {False, True}


@pytest.mark.parametrize(
    ("stub", "host", "broken"),
    [
        ("function (a, b=)", "function (a, b=, c=)", []),
        ("function (a, *, b=)", "function (a, c=, b=)", []),
        ("function (a, b=)", "function (a, *args, **kwargs)", []),
        ("function (a)", "function (a, b)", ["f needs b, which the stub does not know"]),
        ("function (a, b=)", "function (a, b)", ["f needs b, which the stub lets out"]),
        ("function (a, b=)", "function (a, c=, b=)", ["f takes b at position 2, the stub at 1"]),
        ("function (a, b=)", "function (a)", ["f has no parameter b"]),
        ("class (a)", "function (a)", ["f is a function (a), the stub's a class (a)"]),
        ("value diffusion_model", "value model", ["f is a value model, the stub's a value diffusion_model"]),
        ("function ()", None, ["f does not exist"]),
    ],
)
def test_a_difference_counts_only_where_a_call_on_the_stub_would_fail_on_the_host(stub, host, broken):
    assert broken_promises("f", stub, host) == broken


@pytest.mark.host
def test_every_call_on_the_stub_suits_the_real_host_and_its_record_is_current():
    version, record = record_contract.record_host()
    assert all_broken_promises(record) == []
    if version in CONTRACT:
        assert record["names"] == CONTRACT[version]["names"], f"run tests/record_contract.py with ComfyUI {version}"
