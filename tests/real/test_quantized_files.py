# SPDX-License-Identifier: Apache-2.0
"""Files the quantiser writes load in stock ComfyUI's loaders and in ours, and all of them sample the same latents.

quantized_in_process.py gathers the facts in the host's own Python, once for the tests above; those at the end queue the
node in a running server.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.verify.verify import verify
from nvfp4_video.tests.real import quantized_in_process
from nvfp4_video.tests.real.harness import ComfyUI, facts_in_host
from nvfp4_video.tests.real.quantized_in_process import KINDS
from nvfp4_video.tests.support.quantize_sources import PREFIX, save, tiny

LOADERS = ("unet_model", "unet_whole", "checkpoint_whole", "ours_model", "ours_whole")


@pytest.fixture(scope="module")
def all_facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Kind of source -> what quantized_in_process.py found."""
    folder = str(tmp_path_factory.mktemp("quantized"))
    facts = facts_in_host(Path(quantized_in_process.__file__), folder, mark=quantized_in_process.MARK, timeout=900)
    if facts["ltx"] is None:
        pytest.skip(f"ComfyUI {facts['version']} builds the embeddings connectors in their released size only")
    return facts


def facts_of(all_facts: dict, kind: str) -> dict:
    found = all_facts[kind]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_finds_every_quantised_layer(all_facts, kind):
    found = facts_of(all_facts, kind)
    assert found["layers"] > 50 and found["finite"]
    assert {name: loader["nvfp4"] for name, loader in found["loaders"].items()} == dict.fromkeys(
        LOADERS, found["layers"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_all_loaders_sample_the_same_latents(all_facts, kind):
    found = facts_of(all_facts, kind)
    assert {name: loader["equal_first"] for name, loader in found["loaders"].items()} == dict.fromkeys(LOADERS, True)


def test_a_file_made_of_bf16_samples_the_latents_of_its_decoded_weights_bit_for_bit(all_facts):
    found = facts_of(all_facts, "bf16")
    assert all(loader["equal_decoded"] for loader in found["loaders"].values())
    assert all(loader["fp8"] == 0 for loader in found["loaders"].values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bf16"])
def test_fp8_layers_that_stay_are_known_as_such_to_every_loader(all_facts, kind):
    found = facts_of(all_facts, kind)
    counts = {loader["fp8"] for loader in found["loaders"].values()}
    assert len(counts) == 1
    if all_facts["ltx"] == "ltx23":
        assert counts.pop() > 0
    assert all(loader["difference"] < 0.05 for loader in found["loaders"].values())


def node(name: str, **inputs: object) -> dict:
    widgets = {"contents": "whole checkpoint", "quality": "fast", "name": "", "overwrite": False}
    widgets |= {"protect_audio": False, "protect_cross_attention": False, "estimate_only": False}
    return {"1": {"class_type": "NVFP4Quantize", "inputs": {"file_name": name} | widgets | inputs}}


def test_the_node_writes_a_verified_file_and_shows_its_report(host: ComfyUI):
    source = save(host.base / "models" / "checkpoints" / "to_quantize.safetensors", tiny())
    shown = host.queue(node(source.name))["outputs"]["1"]["text"][0]
    target = host.base / "output" / "checkpoints" / "to_quantize_nvfp4.safetensors"
    assert "20 in NVFP4" in shown and "sha256" in shown
    assert verify(target, source).ok
    assert target.with_suffix(".md").is_file()
    names = host.object_info("CheckpointLoaderSimple")["input"]["required"]["ckpt_name"]
    assert target.name in json.dumps(names)


def test_a_cancelled_node_leaves_no_model_and_goes_on_when_it_is_queued_again(host: ComfyUI):
    tensors, generator = tiny(), torch.Generator().manual_seed(0)
    for block in range(48):
        name = f"{PREFIX}transformer_blocks.{block}.ff.net.0.proj.weight"
        tensors[name] = torch.randn(1024, 1024, generator=generator).bfloat16()
    source = save(host.base / "models" / "checkpoints" / "to_cancel.safetensors", tensors)
    target = host.base / "output" / "checkpoints" / "to_cancel_nvfp4.safetensors"
    journal = target.with_name(target.name + ".part.journal")
    prompt = host.post("/prompt", {"prompt": node(source.name, quality="best"), "client_id": "cancel"})["prompt_id"]
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_text().count("sha256") > 5):
        assert time.monotonic() < deadline, "the node did not start"
        time.sleep(0.01)
    host.post("/interrupt", {})
    while prompt not in (history := host.get(f"/history/{prompt}")):
        assert time.monotonic() < deadline, "the node did not stop"
        time.sleep(0.05)
    assert any(event == "execution_interrupted" for event, _ in history[prompt]["status"]["messages"])
    assert not target.exists() and journal.is_file()
    kept = journal.read_text().count("sha256")
    host.queue(node(source.name, quality="best"))
    assert kept > 5 and not journal.exists() and target.is_file()
