# SPDX-License-Identifier: Apache-2.0
"""Quantising files: bytes of what is quantised and of what is not, every kind of source, and every way to refuse."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from nvfp4_video.checkpoint.file.container import TensorReader
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.write import quantize as quantize_module
from nvfp4_video.checkpoint.write import weights
from nvfp4_video.checkpoint.write.card import PROVENANCE
from nvfp4_video.checkpoint.write.estimate import estimate
from nvfp4_video.checkpoint.write.plan import AMAX, MSE, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.cli import main
from nvfp4_video.kernels import reference
from nvfp4_video.kernels.format import PackedWeight
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.quantize_sources import (
    CONFIG,
    METADATA,
    PREFIX,
    linears,
    save,
    sparse_ltx23,
    tiny,
    to_fp8,
)

FAST = QuantizeSettings(search=AMAX)
LAYER = PREFIX + "transformer_blocks.1.attn1.to_q"
GATE = PREFIX + "transformer_blocks.1.attn1.to_gate_logits"
MARKER = b'{"format": "nvfp4"}'


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def decoded(found: dict, layer: str, shape) -> torch.Tensor:
    parts = (found[f"{layer}.{key}"] for key in ("weight", "weight_scale", "weight_scale_2"))
    return reference.dequantize(PackedWeight(*parts, tuple(shape)), torch.float32)


def check_layer(found: dict, layer: str, original: torch.Tensor, search: str = AMAX) -> None:
    """The bytes must be those of the reference quantiser for these numbers."""
    wanted = reference.quantize(original.float(), search=search)
    assert torch.equal(found[f"{layer}.weight"], wanted.packed), layer
    assert torch.equal(found[f"{layer}.weight_scale"].view(torch.uint8), wanted.block_scale.view(torch.uint8)), layer
    assert torch.equal(found[f"{layer}.weight_scale_2"], wanted.global_scale) and wanted.global_scale.shape == ()
    assert bytes(found[f"{layer}.comfy_quant"].tolist()) == MARKER


def test_matrices_of_the_blocks_become_nvfp4_and_all_else_is_copied_byte_for_byte(source, tensors, tmp_path):
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    found = load(tmp_path / "t.safetensors")
    layers = linears(tensors)
    for layer in layers:
        check_layer(found, layer, tensors[f"{layer}.weight"])
    kept = tensors.keys() - {f"{layer}.weight" for layer in layers}
    assert all(found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name]) for name in kept)
    suffixes = ("weight", "weight_scale", "weight_scale_2", "comfy_quant")
    assert found.keys() == kept | {f"{layer}.{key}" for layer in layers for key in suffixes}
    assert record["layers"] == len(layers) == 4 * 5


def test_the_file_is_aligned_hashed_and_tells_where_it_comes_from(source, tmp_path):
    target = tmp_path / "t.safetensors"
    record = quantize_checkpoint(source, target, FAST)
    with TensorReader(target) as reader:
        assert all(i.start % i.torch_dtype.itemsize == 0 for i in reader.header.tensors.values())
    assert record["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert record["nbytes"] == target.stat().st_size
    entries = metadata(target)
    told = json.loads(entries.pop(PROVENANCE))
    assert entries == METADATA
    sha = hashlib.sha256(source.read_bytes()).hexdigest()
    assert told["source"] == [{"file": "source.safetensors", "sha256": sha}]
    assert (told["recipe"], told["search"], told["layers"], told["licence"]) == ("LTX-2.3", "amax", 20, "community")
    assert told["tool"].startswith("NVFP4 Video")
    assert str(tmp_path) not in json.dumps(told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors", "t.md", "t.safetensors"]


def test_the_search_is_the_default_and_has_less_error_than_block_maxima(tmp_path, tensors):
    few = {n: t for n, t in tensors.items() if "transformer_blocks" not in n or ".0.attn1." in n}
    source = save(tmp_path / "few.safetensors", few)
    assert QuantizeSettings().search == MSE
    quantize_checkpoint(source, tmp_path / "best.safetensors")
    quantize_checkpoint(source, tmp_path / "fast.safetensors", FAST)
    best, fast = load(tmp_path / "best.safetensors"), load(tmp_path / "fast.safetensors")
    (layer,) = linears(few)
    original = few[f"{layer}.weight"].float()
    check_layer(best, layer, original, MSE)
    errors = [(decoded(found, layer, original.shape) - original).square().sum() for found in (best, fast)]
    assert errors[0] < 0.85 * errors[1]
    assert (tmp_path / "best.safetensors").stat().st_size == (tmp_path / "fast.safetensors").stat().st_size


@pytest.mark.parametrize("search", [AMAX, MSE])
def test_a_matrix_taken_in_pieces_gives_the_bytes_of_the_whole_one(tmp_path, monkeypatch, search):
    monkeypatch.setitem(weights._CHUNK, "cpu", 128 * 48)
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(300, 48, generator=generator) * torch.linspace(0.01, 1, 300)[:, None]).to(torch.bfloat16)
    tensors = tiny(blocks=1) | {LAYER.replace(".1.", ".0.") + ".weight": weight}
    source = save(tmp_path / "s.safetensors", tensors)
    options = Options(keep=(r"^(?!.*attn1\.to_q)",))
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", QuantizeSettings(search=search, options=options))
    assert record["layers"] == 2  # attn1.to_q and audio_attn1.to_q
    check_layer(load(tmp_path / "t.safetensors"), LAYER.replace(".1.", ".0."), weight, search)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_and_fp32_are_taken_as_they_are(tmp_path, dtype):
    tensors = tiny(dtype=dtype)
    quantize_checkpoint(save(tmp_path / "s.safetensors", tensors), tmp_path / "t.safetensors", FAST)
    found = load(tmp_path / "t.safetensors")
    check_layer(found, LAYER, tensors[f"{LAYER}.weight"])
    assert found[PREFIX + "proj_out.weight"].dtype == dtype


def fp8_file(tensors: dict, how: str) -> tuple[dict, dict, dict]:
    """-> tensors of an FP8 file, its metadata, and what its weights mean: name -> FP32."""
    dtype = torch.float8_e5m2 if how == "e5m2" else torch.float8_e4m3fn
    stored, meant, listed = {}, {}, {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or not name.startswith(PREFIX) or tensor.ndim != 2:
            stored[name] = tensor
            continue
        value, scale = to_fp8(tensor, dtype)
        if how == "plain":
            value, scale = tensor.to(dtype), torch.ones(())
        if how == "rows":
            scale = (tensor.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-12)
            value = (tensor.float() / scale).to(dtype)
        stored[name], meant[name] = value, value.float() * scale
        content = {"format": "float8_e5m2" if how == "e5m2" else "float8_e4m3fn"}
        if how in ("markers", "e5m2"):
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.5)}
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
        elif how == "old":
            stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        elif how in ("header", "rows"):
            stored[f"{layer}.weight_scale"] = scale
            listed[layer] = content
    if how == "old":
        stored[PREFIX + "scaled_fp8"] = torch.zeros(2, dtype=dtype)
    about = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": listed})} if listed else {}
    return stored, METADATA | about, meant


@pytest.mark.parametrize("how", ["markers", "header", "old", "plain", "rows", "e5m2"])
def test_an_fp8_source_is_multiplied_by_its_scale_before_it_is_quantised(tmp_path, tensors, how):
    stored, about, meant = fp8_file(tensors, how)
    source = save(tmp_path / "s.safetensors", stored, about)
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    found = load(tmp_path / "t.safetensors")
    for layer in linears(tensors):
        check_layer(found, layer, meant[f"{layer}.weight"])
        original = tensors[f"{layer}.weight"].float()
        error = (decoded(found, layer, original.shape) - original).norm() / original.norm()
        assert error < 0.13, layer  # NVFP4 costs 0.095, FP8 beforehand 0.03; a lost scale would give far more
        assert not {f"{layer}.{key}" for key in ("input_scale", "scale_weight", "scale_input")} & found.keys()
    assert record["layers"] == 20


@pytest.mark.parametrize("how", ["markers", "header", "old", "plain", "rows"])
def test_fp8_layers_that_the_recipe_keeps_stay_fp8_and_are_declared_by_a_marker(tmp_path, tensors, how):
    stored, about, _ = fp8_file(tensors, how)
    quantize_checkpoint(save(tmp_path / "s.safetensors", stored, about), tmp_path / "t.safetensors", FAST)
    found = load(tmp_path / "t.safetensors")
    assert found[f"{GATE}.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(found[f"{GATE}.weight"].view(torch.uint8), stored[f"{GATE}.weight"].view(torch.uint8))
    assert "_quantization_metadata" not in metadata(tmp_path / "t.safetensors")
    assert PREFIX + "scaled_fp8" not in found
    if how == "plain":
        assert not any(name.startswith(f"{GATE}.") and not name.endswith(".weight") for name in found)
        return
    key = "scale_weight" if how == "old" else "weight_scale"
    assert torch.equal(found[f"{GATE}.weight_scale"], stored[f"{GATE}.{key}"])
    marker = json.loads(bytes(found[f"{GATE}.comfy_quant"].tolist()))
    full = {"full_precision_matrix_mult": True} if how in ("old", "rows") else {}
    assert marker == {"format": "float8_e4m3fn"} | full
    assert (f"{GATE}.input_scale" in found) == (how == "markers")
    assert f"{GATE}.scale_input" not in found


def test_a_header_entry_keeps_what_it_says_of_layers_outside_the_model(tmp_path, tensors):
    stored, _, _ = fp8_file(tensors, "header")
    text = {"text_encoders.gemma.layer": {"format": "nvfp4"}, GATE: {"format": "float8_e4m3fn"}}
    about = METADATA | {"_quantization_metadata": json.dumps({"layers": text})}
    quantize_checkpoint(save(tmp_path / "s.safetensors", stored, about), tmp_path / "t.safetensors", FAST)
    kept = json.loads(metadata(tmp_path / "t.safetensors")["_quantization_metadata"])
    assert kept["layers"] == {"text_encoders.gemma.layer": {"format": "nvfp4"}}


def test_only_the_diffusion_model_loses_its_prefix_and_keeps_the_metadata(source, tensors, tmp_path):
    quantize_checkpoint(source, tmp_path / "t.safetensors", QuantizeSettings(search=AMAX, only_model=True))
    found = load(tmp_path / "t.safetensors")
    assert not any(name.startswith(("vae.", "vocoder.", PREFIX)) for name in found)
    check_layer(found, LAYER.removeprefix(PREFIX), tensors[f"{LAYER}.weight"])
    assert metadata(tmp_path / "t.safetensors")["config"] == CONFIG


def test_shards_by_index_wildcard_and_name_give_the_tensors_of_the_single_file(source, tensors, tmp_path):
    quantize_checkpoint(source, tmp_path / "one.safetensors", FAST)
    wanted = load(tmp_path / "one.safetensors")
    names, folder = list(tensors), tmp_path / "shards"
    folder.mkdir()
    files = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save(folder / file, {name: tensors[name] for name in part})
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    for number, name in enumerate(("m.safetensors.index.json", "m-*.safetensors", files[1])):
        target = tmp_path / f"t{number}.safetensors"
        record = quantize_checkpoint(folder / name, target, FAST)
        found = load(target)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(raw(found[n]), raw(wanted[n])) for n in wanted)
        hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
        assert record["sources"] == hashes


def test_zero_layers_odd_shapes_and_other_dimensions_are_handled(tmp_path, tensors):
    at = PREFIX + "transformer_blocks.2"
    odd = {
        f"{at}.attn1.to_q.weight": torch.zeros(64, 64).bfloat16(),
        f"{at}.attn2.to_k.weight": torch.randn(30, 100).bfloat16(),
        f"{at}.conv.weight": torch.randn(4, 4, 3).bfloat16(),
        f"{at}.audio_attn1.to_q.weight": torch.randn(30, 32).bfloat16(),
    }
    source = save(tmp_path / "s.safetensors", tensors | odd)
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    found = load(tmp_path / "t.safetensors")
    zero = f"{at}.attn1.to_q"
    assert not decoded(found, zero, (64, 64)).any() and found[f"{zero}.weight_scale_2"] == 1.0
    assert torch.equal(found[f"{at}.attn2.to_k.weight"], odd[f"{at}.attn2.to_k.weight"])
    assert torch.equal(found[f"{at}.conv.weight"], odd[f"{at}.conv.weight"])
    check_layer(found, f"{at}.audio_attn1.to_q", odd[f"{at}.audio_attn1.to_q.weight"])  # 30 rows padded to 32
    assert any("multiple of 16" in reason for reason in record["kept"])


def test_activation_statistics_weight_the_columns_and_must_fit(source, tensors, tmp_path):
    layer = "transformer_blocks.1.attn1.to_q"
    options = Options(keep=(r"^(?!.*1\.attn1\.to_q)",))
    energy = torch.linspace(0, 4, 64).square()
    statistics = save(tmp_path / "stats.safetensors", {layer: energy}, {})
    quantize_checkpoint(source, tmp_path / "t.safetensors", QuantizeSettings(options=options, calibration=statistics))
    found, original = load(tmp_path / "t.safetensors"), tensors[f"{LAYER}.weight"].float()
    wanted = reference.quantize(original, search=MSE, column_weight=energy)
    assert torch.equal(found[f"{LAYER}.weight"], wanted.packed)
    assert not torch.equal(wanted.packed, reference.quantize(original, search=MSE).packed)
    for name, stats, words in (
        ("other", {layer: torch.ones(63)}, "another model"),
        ("none", {"x": torch.ones(64)}, "statistics of none"),
        ("negative", {layer: -energy}, "not negative"),
    ):
        file = save(tmp_path / f"{name}.safetensors", stats, {})
        with pytest.raises(CheckpointError, match=words):
            quantize_checkpoint(source, tmp_path / "u.safetensors", QuantizeSettings(options=options, calibration=file))
    with pytest.raises(CheckpointError, match="block maxima take no"):
        quantize_checkpoint(source, tmp_path / "u.safetensors", QuantizeSettings(search=AMAX, calibration=statistics))


def test_a_config_is_taken_from_another_file(tmp_path, tensors, source):
    bare = save(tmp_path / "bare.safetensors", tensors, {})
    quantize_checkpoint(bare, tmp_path / "t.safetensors", QuantizeSettings(search=AMAX, config_from=source))
    assert metadata(tmp_path / "t.safetensors")["config"] == CONFIG


def test_the_estimate_is_the_size_to_the_byte_and_writes_nothing(source, tmp_path):
    found = estimate(source, tmp_path / "t.safetensors", FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
    record = quantize_checkpoint(source, tmp_path / "t.safetensors", FAST)
    assert (found["nbytes"], found["layers"], found["kept"]) == (record["nbytes"], record["layers"], record["kept"])
    assert found["seconds"] > 0 and found["fits"]


@pytest.mark.skipif(sys.platform == "win32", reason="files are not sparse on Windows by themselves")
def test_a_full_size_ltx23_fp8_checkpoint_shrinks_by_a_third(tmp_path):
    source = sparse_ltx23(tmp_path / "ltx.safetensors")
    found = estimate(source, tmp_path / "t.safetensors")
    assert 29.0e9 < found["source_bytes"] < 29.3e9
    assert 19.4e9 < found["nbytes"] < 19.6e9
    assert 0.32 <= found["shrinks_by"] <= 0.34
    assert found["layers"] == 48 * 28
    published = estimate(source, tmp_path / "t.safetensors", QuantizeSettings(options=Options(keep_first_last=2)))
    assert 2.1e9 < published["nbytes"] - found["nbytes"] < 2.3e9


def test_the_command_quantises_estimates_and_refuses(source, tmp_path, capsys):
    target = tmp_path / "t.safetensors"
    assert main(["quantize", str(source), str(target), "--fast", "--estimate", "--json"]) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert main(["quantize", str(source), str(target), "--fast", "--device", "cpu", "--keep", "attn2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["layers"] == 16 < estimated["layers"] == 20
    assert Path(record["card"]).is_file() and record["path"] == str(target)
    assert main(["quantize", str(source), str(target), "--fast"]) == 2
    assert "the target exists" in capsys.readouterr().err
    assert main(["quantize", str(source), str(target), "--keep-first-last", "-1"]) == 2
    assert main(["quantize", str(source), str(tmp_path / "u.safetensors"), "--fast", "--only", "diffusion_model"]) == 0
    assert "20 in NVFP4" in capsys.readouterr().out


def test_an_interrupted_command_says_that_it_can_be_gone_on_with(source, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_module, "_stream", interrupted)
    assert main(["quantize", str(source), str(tmp_path / "t.safetensors"), "--fast"]) == 130
    assert "run it again to go on, t.safetensors.part is kept" in capsys.readouterr().err
