# SPDX-License-Identifier: Apache-2.0
"""What `inspect` says of whole, partial, foreign and broken checkpoints, and that its picture shows the same bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.dtypes import ITEM_BYTES
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.torch_dtypes import DTYPES
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.kernels.format import block_scale_shape, packed_shape
from nvfp4_video.samples import synthetic
from nvfp4_video.samples.recorded import recorded
from nvfp4_video.tests.support.files import load as load_file
from nvfp4_video.tests.support.files import save as save_tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A full-size LTX-2.3 in NVFP4 without marks: every name, shape and byte count, and a hole for the data."""
    entries, end = {}, 0

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

    for name, shape in recorded("ltxav_keys")["keys"].items():
        layer, parts = synthetic.DIT_PREFIX + name.removesuffix(".weight"), name.split(".")
        in_blocks = parts[0] == "transformer_blocks" and 2 <= int(parts[1]) <= 45
        if in_blocks and len(shape) == 2 and name.endswith(".weight"):
            add(f"{layer}.weight", "U8", packed_shape(tuple(shape)))
            add(f"{layer}.weight_scale", "F8_E4M3", block_scale_shape(tuple(shape)))
            add(f"{layer}.weight_scale_2", "F32", ())
        else:
            add(synthetic.DIT_PREFIX + name, "BF16", tuple(shape))
    vaes = recorded("ltx_vae_keys")
    for name, shape in ({f"vae.{n}": s for n, s in vaes["video_vae"].items()} | vaes["audio_vae"]).items():
        add(name, "BF16", tuple(shape))
    metadata = {"config": json.dumps(recorded("ltx23_config"))}
    text = json.dumps({"__metadata__": metadata} | entries).encode()
    path = tmp_path_factory.mktemp("published") / "ltx-2.3-nvfp4.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_published_checkpoint_is_described_from_its_header_alone(published):
    found = inspect_checkpoint(published)
    keys = recorded("ltx_vae_keys")
    parameters = {part: sum(math.prod(shape) for shape in shapes.values()) for part, shapes in keys.items()}
    assert found.kind == "full checkpoint: LTX-2.3 diffusion model, LTX 2.3 video VAE, LTX 2.3 audio VAE"
    assert {part.name: part.parameters for part in found.parts} == {
        "diffusion_model": 21_005_004_544,
        "video_vae": parameters["video_vae"],
        "audio_vae": parameters["audio_vae"],
    }
    header = 8 + int.from_bytes(published.open("rb").read(8), "little")
    assert sum(part.nbytes for part in found.parts) == published.stat().st_size - header
    assert found.dialect == "comfy"
    assert list(found.blocks) == [*map(str, range(48)), "outside the blocks"]
    quantised = [block for block, sizes in found.blocks.items() if "NVFP4" in sizes]
    assert quantised == [str(block) for block in range(2, 46)]
    assert found.blocks["2"]["NVFP4"][0] == found.blocks["0"]["BF16"][0]
    quantised = sum(sizes["NVFP4"][0] for sizes in found.blocks.values() if "NVFP4" in sizes)
    assert found.missing == (f"markers or a header entry for {quantised:,} quantized layers (NVFP4 Repair adds them)",)
    assert "NVFP4 Repair makes it loadable" in found.stock["diffusion_model"]
    assert found.stock["video_vae"] == found.stock["audio_vae"] == "loads it"
    assert found.loaders["diffusion_model"] == "NVFP4 Model Loader"
    text = str(found)
    assert "2 to 45, each" in text
    assert "21.01 B" in text
    assert json.loads(json.dumps(found.as_dict()))["dialect"] == "comfy"


@pytest.fixture(scope="module")
def model():
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config)


STOCK = {
    "comfy_markers": ("comfy", "loads it"),
    "comfy_header": ("comfy", "loads it"),
    "comfy_header_unprefixed": ("comfy", "checkpoint loaders do not find"),
    "metadata_less": ("comfy", "size mismatch"),
    "modelopt": ("modelopt", "does not recognise the layers"),
    "modelopt_layerwise": ("modelopt", "does not recognise the layers"),
    "modelopt_swizzled": ("modelopt_swizzled", "noise, without an error"),
    "compressed_tensors": ("compressed_tensors", "KeyError"),
    "lightx2v": ("lightx2v", "does not recognise the layers"),
    "bf16": (None, "loads it"),
}


@pytest.mark.parametrize("kind", STOCK)
def test_each_dialect_is_named_with_what_stock_comfyui_does_with_it(tmp_path, model, kind):
    path = tmp_path / f"{kind}.safetensors"
    synthetic.write(path, kind, *model)
    found = inspect_checkpoint(path)
    dialect, stock = STOCK[kind]
    assert found.dialect == dialect
    assert stock in found.stock["diffusion_model"]
    assert ("NVFP4 Model Loader" == found.loaders["diffusion_model"]) == (kind != "bf16")
    assert found.formats.get("NVFP4", (0, 0))[0] == (0 if kind == "bf16" else len(model[2]))


def test_an_open_dialect_is_reported_with_the_widget_that_decides(tmp_path, model):
    path = tmp_path / "open.safetensors"
    synthetic.write(path, "metadata_less", model[0], model[1] | {"_class_name": "Unknown"}, model[2])
    found = inspect_checkpoint(path)
    assert found.dialect is None
    assert "modelopt_swizzled" in found.evidence
    assert "dialect widget" in found.loaders["diffusion_model"]
    assert any("declared dialect" in text for text in found.missing)
    assert "dialect: open" in str(found)
    assert inspect_checkpoint(path, dialect="comfy").dialect == "comfy"


@pytest.mark.parametrize("config", ['{"vae": {}}', '{"transformer": {}}', "{"])
def test_a_config_that_does_not_describe_the_model_is_missing(tmp_path, model, config):
    path = tmp_path / "odd.safetensors"
    synthetic.write(path, "comfy_markers", *model)
    save_tensors(path, load_file(path), {"config": config})
    found = inspect_checkpoint(path)
    assert any("without which ComfyUI misbuilds it: the header's `config`" in text for text in found.missing)
    assert "guesses the model's settings" in found.stock["diffusion_model"]


@pytest.mark.parametrize("prefix", ["net.", "my.own."])
def test_a_full_checkpoint_under_a_prefix_of_others_is_taken_apart(tmp_path, model, prefix):
    path = tmp_path / "full.safetensors"
    synthetic.write(path, "comfy_markers", *model, full=True)
    names = {name.replace(synthetic.DIT_PREFIX, prefix): tensor for name, tensor in load_file(path).items()}
    parts = {part.name: part for part in inspect_checkpoint(path).parts}
    found = {part.name: part for part in inspect_checkpoint(save_tensors(path, names, {"config": "{}"})).parts}
    assert found.keys() == parts.keys() and found["diffusion_model"].prefix == prefix
    assert all(found[name].tensors == parts[name].tensors for name in parts)


def save(path: Path, shapes: dict[str, tuple], metadata: dict | None = None, dtypes: dict | None = None) -> Path:
    tensors = {n: torch.zeros(s, dtype=DTYPES[(dtypes or {}).get(n, "BF16")]) for n, s in shapes.items()}
    return save_tensors(path, tensors, metadata)


VIDEO = {
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (1024, 1, 1, 1, 1),
    "encoder.down_blocks.7.conv.conv.weight": (128, 1, 1, 1, 1),
    "per_channel_statistics.mean-of-means": (128,),
    "per_channel_statistics.std-of-means": (128,),
}
CONFIG = {"config": '{"vae": {}}'}
TAE = {"decoder.22.bias": (48,), "decoder.1.weight": (8, 128, 3, 3)}
FOREIGN_LOADER = "VAELoader, for models of its own family"
VAES = [
    (VIDEO, CONFIG, "loads it", "NVFP4 VAE Loader"),
    (VIDEO, {}, "RuntimeError", "NVFP4 VAE Loader"),
    ({f"vae.{n}": s for n, s in VIDEO.items()}, CONFIG, "No VAE weights detected", "NVFP4 VAE Loader"),
    ({n: s for n, s in VIDEO.items() if "std" not in n}, CONFIG, "garbage", "NVFP4 VAE Loader"),
    (TAE, {}, "half the size", "NVFP4 VAE Loader with allow_preview, for previews only"),
    ({"decoder.conv_in.weight": (512, 16, 3, 3)}, {}, "expected 16 channels, got 128", FOREIGN_LOADER),
]


@pytest.mark.parametrize(("shapes", "metadata", "stock", "loader"), VAES)
def test_a_vae_file_is_described_with_its_faults(tmp_path, shapes, metadata, stock, loader):
    found = inspect_checkpoint(save(tmp_path / "vae.safetensors", shapes, metadata))
    assert stock in found.stock["video_vae"]
    assert found.loaders == {"video_vae": loader}
    assert [part.name for part in found.parts] == ["video_vae"]


def test_a_cast_vae_inside_a_checkpoint_is_reported(tmp_path):
    shapes = {f"vae.{name}": shape for name, shape in VIDEO.items()} | {"model.diffusion_model.x.weight": (2, 2)}
    name = "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
    found = inspect_checkpoint(save(tmp_path / "full.safetensors", shapes, CONFIG, {name: "F8_E4M3"}))
    assert "does not dequantize it" in found.stock["video_vae"]
    assert found.formats["FP8"] == (1, 1024)


def test_a_lora_an_empty_file_and_something_unknown_are_called_by_name(tmp_path):
    lora = save(tmp_path / "l.safetensors", {"diffusion_model.a.lora_A.weight": (4, 4)})
    assert "LoRA" in inspect_checkpoint(lora).kind
    empty = save(tmp_path / "e.safetensors", {})
    assert "no tensors" in inspect_checkpoint(empty).kind
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "gone.safetensors")
