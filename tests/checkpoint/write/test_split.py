# SPDX-License-Identifier: Apache-2.0
"""Splitting full checkpoints: names, bytes, metadata, restored weights, and every way it must refuse or stop."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.write.split import split
from nvfp4_video.kernels import reference
from nvfp4_video.kernels.format import swap_nibbles, unswizzle
from nvfp4_video.samples import synthetic
from nvfp4_video.samples.recorded import recorded
from nvfp4_video.tests.support import files
from nvfp4_video.tests.support.files import load, metadata

CONFIG = json.dumps({"vae": {"dims": 3}, "audio_vae": {}, "vocoder": {}, "transformer": {}})
METADATA = {"config": CONFIG, "license": "community", "model_version": "2.3"}
ALL = ("video_vae", "audio_vae", "text_projection", "diffusion_model", "rest")


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    return files.save(path, tensors, METADATA if metadata is None else metadata)


def true_names() -> dict[str, torch.Tensor]:
    """A full LTX-2.3 checkpoint with all its VAE names, shapes cut to 24 at most where no signature reads them."""
    keys = recorded("ltx_vae_keys")
    generator = torch.Generator().manual_seed(0)
    shapes = {f"vae.{name}": shape for name, shape in keys["video_vae"].items()} | keys["audio_vae"]
    shapes["text_embedding_projection.video_aggregate_embed.weight"] = [16, 16]
    shapes["model.diffusion_model.patchify_proj.weight"] = [16, 16]
    shapes["model.diffusion_model.video_embeddings_connector.learnable_registers"] = [16, 8]
    shapes["text_encoders.gemma.norm.weight"] = [16]
    tensors = {}
    for name, shape in shapes.items():
        known = name.startswith(("vae.decoder.up_blocks.0.res_blocks.0.conv1.", "vae.encoder.down_blocks.7.conv."))
        kept = [size if known and not axis else min(size, 24) for axis, size in enumerate(shape)]
        tensors[name] = torch.randn(kept, generator=generator).to(torch.bfloat16)
    tensors["vocoder.mel_stft.mel_basis"] = torch.randn(3, 5, generator=generator)  # an F32 of odd size among BF16
    return tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return true_names()


@pytest.fixture(scope="module")
def full(tmp_path_factory, tensors) -> Path:
    return save(tmp_path_factory.mktemp("full") / "full.safetensors", tensors)


@pytest.fixture
def targets() -> dict[str, str]:
    return {name: f"{name}.safetensors" for name in ALL}


def expected(tensors: dict, component: str) -> dict[str, torch.Tensor]:
    """What each component's own file must hold, by the names of the facts sheet."""
    audio, dit, text = ("audio_vae.", "vocoder."), "model.diffusion_model.", "text_embedding_projection."
    known = ("vae.", *audio, dit, text)
    return {
        "video_vae": {n[4:]: t for n, t in tensors.items() if n.startswith("vae.")},
        "audio_vae": {n: t for n, t in tensors.items() if n.startswith(audio)},
        "text_projection": {n: t for n, t in tensors.items() if n.startswith(text)},
        "diffusion_model": {n[len(dit) :]: t for n, t in tensors.items() if n.startswith(dit)},
        "rest": {n: t for n, t in tensors.items() if not n.startswith(known)},
    }[component]


def equal(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def test_each_component_gets_its_own_names_its_bytes_and_the_metadata(full, tensors, targets, tmp_path):
    parts = split(full, targets, base=tmp_path)
    assert [part.component for part in parts] == list(ALL)
    for part in parts:
        wanted = expected(tensors, part.component)
        assert equal(load(part.path), wanted), part.component
        assert metadata(part.path) == METADATA
        assert (part.tensors, part.restored) == (len(wanted), 0)
        assert part.nbytes == sum(tensor.nbytes for tensor in wanted.values())


def test_on_request_other_floats_become_bf16(full, tensors, tmp_path):
    (part,) = split(full, {"audio_vae": "audio.safetensors"}, base=tmp_path, dtype="bf16")
    found = load(part.path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    name = "vocoder.mel_stft.mel_basis"
    assert torch.equal(found[name], tensors[name].to(torch.bfloat16))


def test_every_tensor_of_a_new_file_is_aligned(full, tmp_path):
    (part,) = split(full, {"audio_vae": "audio.safetensors"}, base=tmp_path)
    with TensorReader(part.path) as reader:
        infos = reader.header.tensors.values()
        assert all(info.start % info.torch_dtype.itemsize == 0 for info in infos)


def test_shards_by_index_by_wildcard_and_by_one_of_their_names_split_alike(tensors, targets, tmp_path):
    names = list(tensors)
    cut = len(names) // 2
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save(tmp_path / files[0], {name: tensors[name] for name in names[:cut]})
    save(tmp_path / files[1], {name: tensors[name] for name in names[cut:]}, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[i >= cut] for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in ("model.safetensors.index.json", "model-*.safetensors", files[1]):
        out = tmp_path / source.replace("*", "x")
        for part in split(tmp_path / source, targets, base=f"{out}.d"):
            assert equal(load(part.path), expected(tensors, part.component))
            assert metadata(part.path) == METADATA | {"format": "pt"}


def test_a_config_from_a_sibling_file_is_put_in(tensors, tmp_path):
    source = save(tmp_path / "bare.safetensors", tensors, {"license": "community"})
    sibling = save(tmp_path / "sibling.safetensors", {}, {"config": CONFIG})
    (part,) = split(source, {"video_vae": "v.safetensors"}, base=tmp_path, config_from=sibling)
    assert metadata(part.path) == {"license": "community", "config": CONFIG}
    with pytest.raises(CheckpointError, match="no `config`"):
        split(source, {"video_vae": "w.safetensors"}, base=tmp_path, config_from=source)


def nvfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    flat = weight.flatten(1)
    packed = reference.quantize(flat)
    return {"weight": packed.packed, "weight_scale": packed.block_scale, "weight_scale_2": packed.global_scale}


def decoded(weight: torch.Tensor) -> torch.Tensor:
    packed = reference.quantize(weight.flatten(1))
    flat = reference.dequantize(packed)
    return flat.reshape(weight.shape)


def damaged(tensors: dict, how: str) -> tuple[dict, dict]:
    """Every kernel of the video VAE stored as ``how`` -> (tensors of the file, what restoring must give)."""
    stored, wanted = {}, {}
    for name, tensor in tensors.items():
        layer, own = name.removesuffix(".weight"), name.removeprefix("vae.")
        wanted[own] = tensor
        if name == layer or not name.startswith("vae."):
            stored[name] = tensor
        elif how == "fp8":
            stored[name] = tensor.to(torch.float8_e4m3fn)
            wanted[own] = stored[name].to(torch.bfloat16)
        elif how in ("fp8_scaled", "fp8_old", "fp8_rows", "int8"):
            top = 127 if how == "int8" else 448
            dims = tuple(range(1, tensor.ndim)) if how == "fp8_rows" else tuple(range(tensor.ndim))
            scale = tensor.float().abs().amax(dims, keepdim=True).clamp(min=1e-6) / top
            value = (tensor.float() / scale).round() if how == "int8" else tensor.float() / scale
            stored[name] = value.to(torch.int8 if how == "int8" else torch.float8_e4m3fn)
            wanted[own] = (stored[name].float() * scale).to(torch.bfloat16)
            key = "scale_weight" if how == "fp8_old" else "weight_scale"
            stored[f"{layer}.{key}"] = scale.flatten() if how == "fp8_rows" else scale.reshape(())
        elif how == "nvfp4":
            stored |= {f"{layer}.{key}": value for key, value in nvfp4(tensor).items()}
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
            wanted[own] = decoded(tensor)
        elif how == "modelopt":
            packed = reference.quantize(tensor.flatten(1))
            rows, cols = packed.shape
            stored[f"{layer}.weight"] = swap_nibbles(packed.packed[:rows])
            stored[f"{layer}.weight_scale"] = unswizzle(packed.block_scale, rows, -(-cols // 16))
            stored[f"{layer}.weight_scale_2"] = packed.global_scale
            wanted[own] = decoded(tensor)
    if how == "fp8_old":
        stored["vae.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return stored, {name: t for name, t in wanted.items() if f"vae.{name}" in tensors}


@pytest.mark.parametrize("how", ["fp8", "fp8_scaled", "fp8_old", "fp8_rows", "int8", "nvfp4", "modelopt"])
def test_a_quantised_vae_is_restored_to_bf16_and_its_scales_go(tensors, tmp_path, how):
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("vae.")}
    stored, wanted = damaged(vae | {"model.diffusion_model.patchify_proj.weight": torch.ones(16, 16)}, how)
    about = {"_quantization_metadata": json.dumps({"layers": {"vae.x": {"format": "nvfp4"}}})} if how == "nvfp4" else {}
    if how == "modelopt":
        about["quantization_config"] = json.dumps({"producer": {"name": "modelopt"}})
    source = save(tmp_path / "damaged.safetensors", stored, METADATA | about)
    (part,) = split(source, {"video_vae": "vae.safetensors"}, base=tmp_path)
    assert part.restored == sum(name.endswith(".weight") for name in vae)
    found = load(part.path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert equal(found, wanted)
    assert metadata(part.path) == METADATA


def test_an_infinite_scale_of_a_vae_is_named_and_leaves_no_file(tensors, tmp_path):
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("vae.")}
    stored, _ = damaged(vae, "fp8_scaled")
    layer = next(name for name in stored if name.endswith("weight_scale"))
    stored[layer] = torch.tensor(float("inf"))
    source = save(tmp_path / "damaged.safetensors", stored)
    with pytest.raises(CheckpointError, match=layer.rpartition(".")[0]):
        split(source, {"video_vae": "vae.safetensors"}, base=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_packed_layers_of_the_diffusion_model_stay_packed_and_declared(tmp_path):
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    source = tmp_path / "full.safetensors"
    synthetic.write(source, "comfy_header", state, config, packed, full=True)
    before = load(source)
    (part,) = split(source, {"diffusion_model": "dit.safetensors"}, base=tmp_path, dtype="bf16")
    prefix = synthetic.DIT_PREFIX
    assert equal(load(part.path), {n[len(prefix) :]: t for n, t in before.items() if n.startswith(prefix)})
    declared = json.loads(metadata(part.path)["_quantization_metadata"])["layers"]
    assert declared == {layer: {"format": "nvfp4"} for layer in packed}
    (rest,) = split(source, {"text_projection": "text.safetensors"}, base=tmp_path)
    assert "_quantization_metadata" not in metadata(rest.path)


REFUSALS = [
    ({"video_vae": "../out.safetensors"}, "outside the output folder"),
    ({"video_vae": "sub/../../out.safetensors"}, "outside the output folder"),
    ({"video_vae": "/out.safetensors"}, "outside the output folder"),
    ({"video_vae": "there.safetensors"}, "the target exists"),
    ({"video_vae": "a.safetensors", "audio_vae": "x/../a.safetensors"}, "one target"),
    ({"video_vae": "a.ckpt"}, "expected one in .safetensors"),
    ({"videovae": "a.safetensors"}, "unknown component 'videovae'"),
    ({}, "no component"),
]


@pytest.mark.parametrize(("wanted", "words"), REFUSALS)
def test_a_target_that_may_not_be_written_is_refused_before_anything_is(full, tmp_path, wanted, words):
    out = tmp_path / "out"
    out.mkdir()
    (out / "there.safetensors").write_text("old")
    with pytest.raises(CheckpointError, match=words):
        split(full, wanted, base=out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "there.safetensors"]
    assert (out / "there.safetensors").read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_folder_that_is_a_link_works_and_a_file_that_is_one_leads_nowhere(full, tensors, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    (part,) = split(full, {"video_vae": "link/vae.safetensors"}, base=tmp_path / "out")
    assert equal(load(tmp_path / "elsewhere" / "vae.safetensors"), expected(tensors, "video_vae"))
    for wanted in ("link/../../vae.safetensors", "link/../../elsewhere/v.safetensors"):
        with pytest.raises(CheckpointError, match="outside the output folder"):
            split(full, {"video_vae": wanted}, base=tmp_path / "out")
    (tmp_path / "out" / "file.safetensors").symlink_to(tmp_path / "precious.safetensors")
    with pytest.raises(CheckpointError, match="outside the output folder"):
        split(full, {"video_vae": "file.safetensors"}, base=tmp_path / "out", overwrite=True)


def test_an_existing_target_is_replaced_only_on_request_and_the_source_never(full, tensors, tmp_path):
    source = tmp_path / "full.safetensors"
    shutil.copyfile(full, source)
    (tmp_path / "vae.safetensors").write_text("old")
    (part,) = split(source, {"video_vae": "vae.safetensors"}, base=tmp_path, overwrite=True)
    assert equal(load(part.path), expected(tensors, "video_vae"))
    with pytest.raises(CheckpointError, match="the source itself"):
        split(source, {"video_vae": "full.safetensors"}, base=tmp_path, overwrite=True)


def test_a_checkpoint_without_the_component_is_refused_by_name(tmp_path):
    source = save(tmp_path / "dit.safetensors", {"model.diffusion_model.patchify_proj.weight": torch.ones(2, 2)})
    for component, words in (
        ("video_vae", "no video VAE in it"),
        ("audio_vae", "no audio VAE in it"),
        ("text_projection", "no text projection in it.*diffusion model"),
    ):
        with pytest.raises(CheckpointError, match=words):
            split(source, {component: "out.safetensors"}, base=tmp_path)


def test_of_two_vaes_the_user_names_one_and_the_other_is_part_of_the_rest(tensors, tmp_path):
    other = {f"old.{name}": tensor for name, tensor in tensors.items() if name.startswith("vae.")}
    source = save(tmp_path / "two.safetensors", tensors | other)
    wanted = {"video_vae": "vae.safetensors", "rest": "rest.safetensors"}
    with pytest.raises(CheckpointError, match="2 VAEs are in it"):
        split(source, wanted, base=tmp_path)
    vae, rest = split(source, wanted, base=tmp_path, vae_prefix="vae.")
    assert equal(load(vae.path), expected(tensors, "video_vae"))
    assert other.keys() <= load(rest.path).keys()


def test_progress_counts_all_files_and_an_interrupt_leaves_only_complete_ones(full, tensors, targets, tmp_path):
    calls = []
    split(full, targets, base=tmp_path / "a", on_bytes=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == sum(tensor.nbytes for tensor in tensors.values())
    assert calls == sorted(calls)
    first = sum(tensor.nbytes for tensor in expected(tensors, "video_vae").values())

    def interrupt(done: int, _: int) -> None:
        if done > first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(full, targets, base=tmp_path / "b", on_bytes=interrupt)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["video_vae.safetensors"]
    assert equal(load(tmp_path / "b" / "video_vae.safetensors"), expected(tensors, "video_vae"))


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit on Windows")
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_half_written(full, targets, tmp_path):
    resource = importlib.import_module("resource")  # which Windows has not
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            split(full, {"video_vae": "vae.safetensors"}, base=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_does_not_fit_as_a_whole_is_not_begun(full, targets, tmp_path, monkeypatch):
    size = full.stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=size * 2 // 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="GiB are free"):
        split(full, targets, base=tmp_path)
    assert not any(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_killed_process_leaves_the_old_target(full, tmp_path):
    target = tmp_path / "vae.safetensors"
    target.write_text("old")
    child = os.fork() if hasattr(os, "fork") else None
    if child is None:
        pytest.skip("no fork on this system")
    if child == 0:
        split(full, {"video_vae": target.name}, base=tmp_path, overwrite=True, on_bytes=lambda *_: os._exit(9))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path != target and path.suffix == ".safetensors"]
