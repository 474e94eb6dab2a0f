# SPDX-License-Identifier: Apache-2.0
"""The nodes as ComfyUI sees them: what they list, load, report, and when the host has to run them again."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.identify.dialects import DIALECTS
from nvfp4_video.nodes.model import SAME_FILE, NVFP4ModelLoader
from nvfp4_video.samples import synthetic
from safetensors.torch import load_file, save_file

LAYER = "transformer_blocks.2.attn1.to_q"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small LTX-2.3 in the comfy dialect."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    synthetic.write(path, "comfy_markers", *synthetic.small_ltx23())
    return path


@pytest.fixture
def put(stub_comfy, tmp_path: Path, file: Path):
    """put(folder, name) -> path of a copy of the small model in that model folder."""

    def copy(folder: str, name: str) -> Path:
        target = tmp_path / "models" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(file, target))

    return copy


def inputs(required: bool = True) -> dict[str, dict]:
    """Input -> its options, as the host shows them."""
    shown = NVFP4ModelLoader.INPUT_TYPES()
    return {name: options for name, (_, options) in shown["required" if required else "optional"].items()}


def fingerprint(model_name="model.safetensors", compute="bf16", dialect="auto", **options) -> str:
    return NVFP4ModelLoader.fingerprint_inputs(model_name, compute, dialect, **options)


def test_the_extension_offers_the_model_loader(pack, stub_comfy):
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    schemas = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}
    outputs = schemas["NVFP4ModelLoader"].outputs
    assert [output.io_type for output in outputs] == ["MODEL", "STRING"]


def test_both_model_folders_are_listed_once_and_only_safetensors(put, tmp_path: Path):
    put("diffusion_models", "b.safetensors")
    put("diffusion_models", "both.safetensors")
    put("diffusion_models", "ltx/c.SFT")
    put("checkpoints", "both.safetensors")
    put("checkpoints", "a.safetensors")
    put("vae", "vae.safetensors")
    for name in ("d.ckpt", "e.pt", "f.gguf", "g.txt"):
        put("diffusion_models", name)
    names = ["b.safetensors", "both.safetensors", os.path.join("ltx", "c.SFT"), "a.safetensors"]
    assert inputs()["model_name"]["options"] == names
    assert inputs(required=False)["config_from"]["options"] == [SAME_FILE, *names]


def test_with_no_model_at_all_the_node_still_shows(stub_comfy):
    assert inputs()["model_name"]["options"] == []
    assert inputs(required=False)["config_from"]["options"] == [SAME_FILE]


def test_every_choice_starts_on_what_needs_no_knowledge(stub_comfy):
    required, optional = inputs(), inputs(required=False)
    assert required.keys() == {"model_name", "compute", "dialect"}
    assert optional.keys() == {"backend", "config_from", "layer_compute", "attention", "make_nvfp4"}
    assert required["dialect"]["options"] == ["auto", *DIALECTS]
    assert (required["compute"]["default"], required["dialect"]["default"]) == ("bf16", "auto")
    assert (optional["backend"]["default"], optional["config_from"]["default"]) == ("auto", SAME_FILE)
    assert optional["backend"]["options"] == ["auto", "triton", "torch"]
    assert optional["make_nvfp4"]["default"] is False
    assert all(option["advanced"] for name, option in optional.items() if name != "make_nvfp4")
    assert all(option["tooltip"] for option in (required | optional).values())


@pytest.mark.parametrize("folder", ["diffusion_models", "checkpoints"])
def test_a_file_of_either_folder_is_loaded_and_reported(folder: str, put):
    path = put(folder, "model.safetensors")
    patcher, report = NVFP4ModelLoader.execute("model.safetensors", "bf16", "auto").args
    module = patcher.model.diffusion_model.get_submodule(LAYER)
    assert torch.equal(module.weight._qdata, load_file(path)[f"{LAYER}.weight"])
    assert report.startswith("model.safetensors: LTX-2.3")
    assert "dialect: comfy" in report


def test_widgets_reach_the_loader(put):
    put("diffusion_models", "model.safetensors")
    _, report = NVFP4ModelLoader.execute("model.safetensors", "bf16", "comfy", backend="torch").args
    assert "dialect: comfy (stated by the user)" in report
    assert "torch backend (asked for)" in report
    with pytest.raises(CheckpointError, match="choose another dialect"):
        NVFP4ModelLoader.execute("model.safetensors", "bf16", "modelopt")
    with pytest.raises(ValueError, match="triton backend cannot run"):
        NVFP4ModelLoader.execute("model.safetensors", "bf16", "auto", backend="triton")


def test_a_name_in_both_folders_means_the_one_in_diffusion_models(put):
    put("checkpoints", "model.safetensors").write_bytes(b"")
    put("diffusion_models", "model.safetensors")
    assert NVFP4ModelLoader.execute("model.safetensors", "bf16", "auto").args[0] is not None


def test_a_config_can_be_taken_from_a_file_of_either_folder(put):
    path = put("diffusion_models", "model.safetensors")
    save_file(load_file(path), path)  # the host's own way of losing the header
    put("checkpoints", "lender.safetensors")
    with pytest.raises(CheckpointError, match="set `config_from`"):
        NVFP4ModelLoader.execute("model.safetensors", "bf16", "auto", config_from=SAME_FILE)
    _, report = NVFP4ModelLoader.execute("model.safetensors", "bf16", "auto", config_from="lender.safetensors").args
    assert "config taken from lender.safetensors" in report


def test_a_file_deleted_after_the_list_was_made_is_named_with_the_folders(put):
    path = put("diffusion_models", "model.safetensors")
    assert inputs()["model_name"]["options"] == ["model.safetensors"]
    path.unlink()
    for call in (fingerprint, lambda: NVFP4ModelLoader.execute("model.safetensors", "bf16", "auto")):
        with pytest.raises(FileNotFoundError, match="^model.safetensors is in none of .*diffusion_models, .*check"):
            call()


def test_a_name_cannot_lead_out_of_the_folders(put, tmp_path: Path):
    put("vae", "model.safetensors")
    with pytest.raises(FileNotFoundError, match="is in none of"):
        NVFP4ModelLoader.execute("../vae/model.safetensors", "bf16", "auto")


def test_the_host_runs_the_node_again_if_a_file_or_an_option_changed(put):
    path = put("diffusion_models", "model.safetensors")
    lender = put("checkpoints", "lender.safetensors")
    first = fingerprint()
    assert fingerprint() == first
    seen = {first, fingerprint(dialect="comfy"), fingerprint(backend="torch"), fingerprint(compute="fp8")}
    seen.add(fingerprint(config_from="lender.safetensors"))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    seen.add(fingerprint())
    os.truncate(path, stat.st_size - 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.add(fingerprint())
    os.utime(lender, ns=(stat.st_atime_ns, 1))
    seen.add(fingerprint(config_from="lender.safetensors"))
    assert len(seen) == 8


@pytest.mark.parametrize("linked", ["model_name", "compute", "dialect", "backend", "config_from"])
def test_a_linked_input_of_unknown_value_does_not_stop_the_fingerprint(linked: str, put):
    put("diffusion_models", "model.safetensors")
    assert fingerprint(**{linked: None}) not in ("", None)
    assert fingerprint(**{linked: None}) == fingerprint(**{linked: None})
