# SPDX-License-Identifier: Apache-2.0
"""A real ComfyUI starts with the pack, and knows its nodes."""

from __future__ import annotations

import pytest
from nvfp4_video.tests.real.harness import PACK_FOLDER, ComfyUI, HostError

pytestmark = pytest.mark.host


def test_the_pack_imports_into_a_real_comfyui(host: ComfyUI):
    # Nodes of the host's own may fail here, as those that need OpenGL do; only lines about the pack count.
    mentioned = [line for line in host.log().splitlines() if PACK_FOLDER in line]
    assert any(line.strip().endswith(PACK_FOLDER) for line in mentioned), f"the host did not try it; log:\n{host.log()}"
    assert [line for line in mentioned if "FAILED" in line or "Cannot import" in line] == []


def test_the_host_offers_the_model_loader_in_the_pack_s_category(host: ComfyUI):
    info = host.object_info("NVFP4ModelLoader")
    assert info, f"the host does not know NVFP4ModelLoader; its log:\n{host.log()}"
    assert info["category"] == "NVFP4"
    assert info["output"] == ["MODEL", "STRING"]
    assert {"model_name", "compute", "dialect"} <= info["input"]["required"].keys()


def test_the_host_runs_a_prompt_and_reports_refusals_by_node(host: ComfyUI):
    latent = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    save = {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "boot"}}
    entry = host.queue({"1": latent, "2": save})
    assert entry["outputs"]["2"]["latents"][0]["filename"].startswith("boot")
    assert list((host.base / "output").glob("boot*.latent"))
    with pytest.raises(HostError, match=r"node 1 \(EmptyLatentImage\): Value 0 smaller than min"):
        host.queue({"1": latent | {"inputs": latent["inputs"] | {"batch_size": 0}}, "2": save})
