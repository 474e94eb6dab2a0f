# SPDX-License-Identifier: Apache-2.0
"""Ways to break a quantised file, each found by name; what a file may lack; how far off its numbers may be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from nvfp4_video.checkpoint.file.shards import open_checkpoint
from nvfp4_video.checkpoint.identify import host_layer
from nvfp4_video.checkpoint.verify import compare as module
from nvfp4_video.checkpoint.verify import independent, weight_error
from nvfp4_video.checkpoint.verify.verify import summary, verify
from nvfp4_video.checkpoint.write.plan import AMAX, QuantizeSettings
from nvfp4_video.checkpoint.write.quantize import quantize_checkpoint
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.kernels import reference
from nvfp4_video.tests.support.files import load, metadata
from nvfp4_video.tests.support.quantize_sources import METADATA, PREFIX, linears, save, tiny, to_fp8

AT = f"{PREFIX}transformer_blocks.1."
LAYER, BIAS = f"{AT}attn1.to_q", f"{AT}attn1.to_q.bias"
NORM, GATE = f"{AT}attn1.q_norm.weight", f"{AT}attn1.to_gate_logits.weight"
MARKER = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source whose block 0 has FP8 layers that stay FP8, and quantised from it: whole and model."""
    path = tmp_path_factory.mktemp("account")
    tensors = tiny()
    for layer in linears(tensors):
        if "transformer_blocks.0." in layer:
            codes, scale = to_fp8(tensors[f"{layer}.weight"])
            tensors |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale, f"{layer}.input_scale": scale * 3}
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    source = save(path / "source.safetensors", tensors)
    keep = Options(keep_first_last=1)
    quantize_checkpoint(source, path / "whole.safetensors", QuantizeSettings(search=AMAX, options=keep))
    model = QuantizeSettings(search=AMAX, options=keep, only_model=True)
    quantize_checkpoint(source, path / "model.safetensors", model)
    return path


def broken(folder, tmp_path, change, name="whole", meta=None):
    """The file after ``change(tensors)``, verified."""
    tensors = load(folder / f"{name}.safetensors")
    change(tensors)
    meta = metadata(folder / f"{name}.safetensors") if meta is None else meta
    return verify(save(tmp_path / "broken.safetensors", tensors, meta), folder / "source.safetensors")


def drop(*parts):
    def change(tensors):
        found = [name for name in tensors if any(part in name for part in parts)]
        assert found
        for name in found:
            del tensors[name]

    return change


def put(name, make):
    def change(tensors):
        tensors[name] = make(tensors.get(name))

    return change


def all_zero(tensors):
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            tensors[name] = torch.zeros_like(tensor)


def nul_markers(tensors):
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            tensors[name] = torch.zeros_like(tensor)


FP8 = f"{PREFIX}transformer_blocks.0.attn1.to_q"
BREAKS = {
    "a block deleted": (drop("transformer_blocks.2."), "missing", "transformer_blocks.2.attn1.to_q.weight"),
    "all biases deleted": (drop(".bias"), "missing", "transformer_blocks.1.attn1.to_q.bias"),
    "all BF16 tensors zeroed": (all_zero, "changed", "transformer_blocks.1.attn1.q_norm.weight"),
    "markers of NUL": (nul_markers, "faults", "transformer_blocks.1.attn1.to_q: its `comfy_quant` marker"),
    "one marker of NUL": (
        put(f"{LAYER}.comfy_quant", lambda t: torch.zeros_like(t)), "faults", "transformer_blocks.1.attn1.to_q: its"
    ),
    "one marker deleted": (drop(f"{LAYER}.comfy_quant"), "faults", "nothing declares its format"),
    "the audio branch deleted": (drop("audio_attn1", "audio_adaln"), "missing", "audio_adaln_single.linear.weight"),
    "the connector deleted": (drop("video_embeddings_connector"), "missing", "video_embeddings_connector"),
    "the VAE deleted": (drop("vae.decoder", "vae.encoder", "vae.per"), "missing", "vae.decoder.up_blocks"),
    "the audio VAE deleted": (drop("audio_vae.", "vocoder."), "missing", "audio_vae.per_channel"),
    "a tensor of the VAE deleted": (drop("vae.per_channel_statistics.std"), "missing", "std-of-means"),
    "a VAE tensor altered": (
        put("vae.encoder.down_blocks.1.conv.conv.bias", lambda t: t + 1), "changed", "vae.encoder"
    ),
    "a bias in another dtype": (put(BIAS, lambda t: t.float()), "faults", "it is F32 of shape (64,), in"),
    "a norm of another shape": (put(NORM, lambda t: t[None]), "faults", "(1, 64), in the source BF16 of shape (64,)"),
    "a bias cut short": (put(BIAS, lambda t: t[:-1].clone()), "faults", "it is BF16 of shape (63,)"),
    "a kept matrix transposed": (put(GATE, lambda t: t.T.contiguous()), "faults", "it is BF16 of shape (64, 32)"),
    "a tensor too many": (put(f"{AT}attn1.to_k.bias", lambda _: torch.zeros(64)), "extra", "attn1.to_k.bias"),
    "an input scale of NaN": (
        put(f"{LAYER}.input_scale", lambda _: torch.tensor(float("nan"))), "faults", "its `input_scale` is nan"
    ),
    "a negative input scale": (
        put(f"{LAYER}.input_scale", lambda _: torch.tensor(-1.0)), "faults", "its `input_scale` is -1.0"
    ),
    "an FP8 layer's input scale deleted": (drop(f"{FP8}.input_scale"), "missing", "blocks.0.attn1.to_q.input_scale"),
    "an FP8 layer's input scale altered": (put(f"{FP8}.input_scale", lambda t: t * 2), "changed", "input_scale"),
    "an FP8 layer's scale altered": (put(f"{FP8}.weight_scale", lambda t: t * 2), "changed", "to_q.weight_scale"),
    "an FP8 layer with other options": (
        put(f"{FP8}.comfy_quant", lambda _: torch.tensor(
            list(b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'), dtype=torch.uint8)),
        "faults", "it is declared",
    ),
    "two biases exchanged": (put(BIAS, lambda t: t.flip(0)), "changed", "transformer_blocks.1.attn1.to_q.bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_file_is_not_in_order_and_what_is_wrong_is_named(kind, folder, tmp_path):
    change, where, words = BREAKS[kind]
    found = broken(folder, tmp_path, change)
    assert not found.ok
    assert any(words in line for line in getattr(found, where)), summary(found)
    assert "NOT in order" in summary(found)


def test_the_unbroken_files_are_in_order(folder):
    whole = verify(folder / "whole.safetensors", folder / "source.safetensors")
    assert whole.ok and not whole.left_out and whole.sampled == 3, summary(whole)
    assert whole.as_dict()["ok"] is True


def test_only_a_file_of_the_model_alone_may_lack_the_vaes_and_that_is_said(folder, tmp_path):
    found = verify(folder / "model.safetensors", folder / "source.safetensors")
    assert found.ok and found.left_out == ("video VAE", "audio VAE and vocoder"), summary(found)
    assert "without the source's video VAE, audio VAE and vocoder" in summary(found)
    half = broken(folder, tmp_path, put("vae.encoder.down_blocks.1.conv.conv.bias", lambda _: torch.zeros(7)), "model")
    assert not half.ok


def test_a_lost_or_altered_config_is_a_fault_and_its_spacing_is_none(folder, tmp_path):
    def same(tensors):
        pass

    assert any("lacks it" in fault for fault in broken(folder, tmp_path, same, meta={}).faults)
    other = METADATA | {"config": json.dumps({"transformer": {}})}
    assert any("not that of the source" in fault for fault in broken(folder, tmp_path, same, meta=other).faults)
    spaced = METADATA | {"config": json.dumps(json.loads(METADATA["config"]), indent=3)}
    assert broken(folder, tmp_path, same, meta=spaced).ok


def test_header_entries_are_the_source_s_but_for_those_that_tell_how_a_file_is_stored(folder, tmp_path):
    def same(tensors):
        pass

    own = {"quantization_config": '{"quant_method": "x"}', "format": "pt", "another": "tool"}
    assert broken(folder, tmp_path, same, meta=METADATA | own).ok
    altered = broken(folder, tmp_path, same, meta=METADATA | {"license": "mine"})
    assert altered.faults == ("header entry `license`: it is not that of the source",)
    without = {key: text for key, text in METADATA.items() if key != "note"}
    assert broken(folder, tmp_path, same, meta=without).faults == ("header entry `note`: the file lacks it",)


def test_a_layer_that_cannot_be_compared_is_not_called_good(folder, tmp_path):
    twin = shutil.copy(folder / "whole.safetensors", tmp_path / "twin.safetensors")
    found = verify(folder / "whole.safetensors", twin)
    copies = [name for name in load(folder / "whole.safetensors") if not name.endswith(".comfy_quant")]
    assert found.ok and found.identical == len(copies), "a file against its copy: every tensor is the same"
    tensors = tiny()
    codes = {f"{LAYER}.weight": torch.ones(64, 64, dtype=torch.int8), f"{LAYER}.weight_scale": torch.tensor(0.1)}
    marker = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    packed = reference.quantize(tensors[f"{AT}ff.net.0.proj.weight"].float())
    parts = {"weight": packed.packed, "weight_scale": packed.block_scale, "weight_scale_2": packed.global_scale}
    codes |= {f"{AT}ff.net.0.proj.{key}": tensor for key, tensor in (parts | {"comfy_quant": MARKER}).items()}
    file = save(tmp_path / "int8.safetensors", tensors | codes | {f"{LAYER}.comfy_quant": marker})
    found = verify(file, save(tmp_path / "source.safetensors", tensors))
    assert not found.ok and any("scaled INT8" in fault and "not compared" in fault for fault in found.faults)


def fp8_file(tmp_path, dtype, factor):
    """One layer in FP8 with a scale that is off by ``factor``, one in NVFP4 -> the check of the former."""
    tensors = tiny()
    codes, scale = to_fp8(tensors[f"{LAYER}.weight"], dtype)
    name = "float8_e4m3fn" if dtype == torch.float8_e4m3fn else "float8_e5m2"
    marker = torch.tensor(list(b'{"format": "%s"}' % name.encode()), dtype=torch.uint8)
    packed = reference.quantize(tensors[f"{AT}ff.net.0.proj.weight"].float())
    parts = {"weight": packed.packed, "weight_scale": packed.block_scale, "weight_scale_2": packed.global_scale}
    changed = {f"{AT}ff.net.0.proj.{key}": tensor for key, tensor in (parts | {"comfy_quant": MARKER}).items()}
    changed |= {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": scale * factor, f"{LAYER}.comfy_quant": marker}
    file = save(tmp_path / "fp8.safetensors", tensors | changed)
    found = verify(file, save(tmp_path / "source.safetensors", tensors))
    return next(check for check in found.layers if check.format == "FP8")


@pytest.mark.parametrize(
    ("dtype", "factor", "good"),
    [
        (torch.float8_e4m3fn, 1.0, True),
        (torch.float8_e4m3fn, 1.05, False),
        (torch.float8_e5m2, 1.0, True),
        (torch.float8_e5m2, 1.1, False),
    ],
)
def test_an_fp8_layer_may_have_the_error_of_its_dtype_and_no_more(dtype, factor, good, tmp_path):
    check = fp8_file(tmp_path, dtype, factor)
    assert (check.verdict == "") is good, check


@pytest.mark.parametrize(("factor", "good"), [(1.0, True), (1.015, True), (1.05, False)])
def test_a_layer_that_nvfp4_holds_exactly_may_be_off_by_a_fiftieth_and_no_more(factor, good, tmp_path):
    exact = torch.tensor([6.0, 4, 3, 2, 1.5, 1, 0.5, 0]).repeat(64, 8) * 2**-6
    tensors = tiny() | {f"{LAYER}.weight": exact.bfloat16()}
    packed = reference.quantize(exact)
    assert torch.equal(reference.dequantize(packed, torch.float32), exact)
    parts = {"weight": packed.packed, "weight_scale": packed.block_scale, "comfy_quant": MARKER}
    parts["weight_scale_2"] = packed.global_scale * factor
    file = save(tmp_path / "exact.safetensors", tensors | {f"{LAYER}.{key}": tensor for key, tensor in parts.items()})
    (check,) = verify(file, save(tmp_path / "source.safetensors", tensors)).layers
    assert check.error == pytest.approx(factor - 1, abs=1e-4) and (check.verdict == "") is good


@pytest.mark.parametrize("size", [1e-19, 1e-25, 1e-30])
def test_the_energy_of_tiny_weights_is_no_zero(size):
    values = torch.full((4, 16), size)
    assert weight_error.energy(values).item() == pytest.approx(64 * float(values[0, 0]) ** 2)
    assert weight_error.ratio(weight_error.energy(values * 0.5), weight_error.energy(values)) == pytest.approx(0.5)


def test_a_layer_of_tiny_weights_decoded_as_zero_is_lost_and_not_equal(tmp_path):
    tensors = tiny()
    tensors[f"{LAYER}.weight"] = torch.full((64, 64), 1e-25, dtype=torch.bfloat16)
    packed = reference.quantize(torch.zeros(64, 64))
    parts = {"weight": packed.packed, "weight_scale": packed.block_scale, "comfy_quant": MARKER}
    parts["weight_scale_2"] = packed.global_scale
    file = save(tmp_path / "zero.safetensors", tensors | {f"{LAYER}.{key}": tensor for key, tensor in parts.items()})
    found = verify(file, save(tmp_path / "source.safetensors", tensors))
    assert found.layers[0].error == pytest.approx(1.0) and not found.ok


@pytest.mark.parametrize("what", ["nibbles", "scales", "source"])
def test_a_mistake_of_the_pack_s_own_readers_is_found_by_the_second_reading(what, folder, monkeypatch):
    if what == "source":
        true = module.FloatRows._converted
        monkeypatch.setattr(module.FloatRows, "_converted", lambda self, *span: true(self, *span) * 1.01)
    else:
        true = host_layer.host_layer

        def wrong(*args, **kwargs):
            record = true(*args, **kwargs)
            packed, scale = record.packed, record.block_scale
            if what == "nibbles":
                packed = host_layer.swap_nibbles(packed)
            else:
                scale = scale.view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
            return type(record)(packed, scale, record.global_scale, record.shape)

        monkeypatch.setattr(host_layer, "host_layer", wrong)
    found = verify(folder / "whole.safetensors", folder / "source.safetensors")
    assert any("read a second time" in fault for fault in found.faults)


def test_the_second_reading_s_table_of_e4m3_is_torch_s():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float().numpy()
    assert independent.np.array_equal(independent._e4m3(codes.numpy()), expected, equal_nan=True)


def test_what_safetensors_itself_reads_otherwise_is_a_fault(folder, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes((folder / "whole.safetensors").read_bytes())
    checkpoint = open_checkpoint(path)
    assert independent.structure_faults(checkpoint) == []
    save(path, {"other": torch.zeros(3)})
    assert "other tensors" in independent.structure_faults(checkpoint)[0]
    path.write_bytes(b"\xff" * 20)
    assert "safetensors cannot open it" in independent.structure_faults(checkpoint)[0]
