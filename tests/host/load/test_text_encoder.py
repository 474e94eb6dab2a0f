# SPDX-License-Identifier: Apache-2.0
"""checkpoint/identify/text_encoder_signatures.py, host/load/text_encoder.py and their node on the stubbed host."""

from __future__ import annotations

import json
import re
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from nvfp4_video.checkpoint.file.header import CheckpointError, read_header
from nvfp4_video.checkpoint.identify.dialects import AUTO, DIALECTS
from nvfp4_video.checkpoint.identify.text_encoder_signatures import find_projection, find_text_encoder
from nvfp4_video.host.compute import token_graphs as text_decode
from nvfp4_video.host.compute.matmul import wrap
from nvfp4_video.host.files import SAME_FILE
from nvfp4_video.host.load.encoder_layers import restore_embeddings, text_operations
from nvfp4_video.host.load.text_encoder import load_text_encoder
from nvfp4_video.kernels import reference
from nvfp4_video.kernels.format import swap_nibbles, unswizzle
from nvfp4_video.nodes.text_encoder import NVFP4TextEncoderLoader
from safetensors.torch import save_file

HIDDEN, BLOCKS = 64, 48
LAYER = "model.layers.3.mlp.up_proj"
PROJECTION = "text_embedding_projection."
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
TOKENIZER = torch.arange(9, dtype=torch.uint8)


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 0.1).bfloat16()


def gemma(blocks: int = BLOCKS, family: int = 3) -> dict[str, torch.Tensor]:
    """A text encoder in BF16. Gemma 4 has no ``v_proj`` in every sixth block."""
    state = {"model.embed_tokens.weight": random(32, HIDDEN), "model.norm.weight": random(HIDDEN)}
    state["spiece_model" if family == 3 else "tokenizer_json"] = TOKENIZER
    for block in range(blocks):
        layer = f"model.layers.{block}."
        state |= {f"{layer}{name}.weight": random(HIDDEN) for name in NORMS}
        state |= {f"{layer}self_attn.{name}_norm.weight": random(16) for name in "qk"}
        names = [name for name in LINEARS if family == 3 or block % 6 != 5 or name != "self_attn.v_proj"]
        state |= {f"{layer}{name}.weight": random(32, HIDDEN) for name in names}
    return state


def pack(state: dict, layers: tuple[str, ...] = (LAYER,), dialect: str = "comfy") -> dict[str, torch.Tensor]:
    """The state with ``layers`` in NVFP4, marked if the dialect is the host's."""
    state = dict(state)
    for layer in layers:
        record = reference.quantize(state.pop(f"{layer}.weight").float())
        packed, scale = record.packed, record.block_scale
        if dialect == "modelopt":
            packed, scale = swap_nibbles(packed), unswizzle(scale, record.shape[0], record.shape[1] // 16)
        else:
            state[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
        parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": record.global_scale}
        state |= {f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()}
    return state


def dual(columns: int = HIDDEN * (BLOCKS + 1)) -> dict[str, torch.Tensor]:
    """The text projection of LTX-2.3."""
    widths = {"video_aggregate_embed": 32, "audio_aggregate_embed": 16}
    return {f"{PROJECTION}{name}.weight": random(width, columns) for name, width in widths.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return gemma()


@pytest.fixture
def put(stub_comfy, tmp_path: Path):
    """put(folder, name, tensors, metadata) -> path of a new file in that model folder."""

    def write(folder: str, name: str, tensors: dict, metadata: dict | None = None) -> str:
        path = tmp_path / "models" / folder / name
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
        return str(path)

    return write


@pytest.fixture
def projection(put) -> str:
    dit = {"model.diffusion_model.patchify_proj.weight": random(16, 16)}
    return put("checkpoints", "ltx.safetensors", dual() | dit)


def refusal(path: str, projection: str | None = None, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_text_encoder(path, projection, **options)
    return str(caught.value)


def layer_of(clip, name: str = LAYER) -> torch.nn.Module:
    return clip.cond_stage_model.gemma3_12b.transformer.get_submodule(name)


MODELOPT = {"quantization_config": json.dumps({"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"})}


@pytest.mark.parametrize(("dialect", "metadata"), [("comfy", None), ("modelopt", MODELOPT)])
def test_packed_layers_of_any_dialect_compute_their_decoded_weights(put, state, projection, dialect, metadata):
    path = put("text_encoders", "gemma.safetensors", pack(state, dialect=dialect), metadata)
    clip, report = load_text_encoder(path, projection)
    layer, x = layer_of(clip), torch.randn(3, HIDDEN)
    record = reference.quantize(state[f"{LAYER}.weight"].float())
    decoded = reference.dequantize(record, x.dtype)
    assert isinstance(layer.weight, QuantizedTensor)
    assert torch.equal(layer(x), x @ decoded.T)
    assert torch.equal(layer_of(clip, "model.layers.4.mlp.up_proj").weight, state["model.layers.4.mlp.up_proj.weight"])
    assert (report.dialect, report.layers["nvfp4"]) == (dialect, 1)


def test_the_host_gets_gemma_and_projection_apart_and_nothing_of_the_diffusion_model(put, state, projection):
    clip, report = load_text_encoder(put("text_encoders", "gemma.safetensors", pack(state)), projection)
    assert clip.projection.keys() == dual().keys()
    assert torch.equal(clip.tokenizer["spiece_model"], TOKENIZER)
    assert clip.embedding_directory[0].endswith("embeddings")
    assert "projection: LTX-2.3 or later, 32 + 16 wide, from ltx.safetensors" in str(report)


def test_connectors_of_the_first_checkpoints_go_with_the_projection(put, state):
    connector = "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q."
    tensors = {f"{PROJECTION}aggregate_embed.weight": random(32, HIDDEN * (BLOCKS + 1)), f"{connector}bias": random(16)}
    other = put("checkpoints", "ltx2.safetensors", tensors | {"vae.encoder.weight": random(2, 2)})
    clip, report = load_text_encoder(put("text_encoders", "gemma.safetensors", pack(state)), other)
    assert clip.projection.keys() == tensors.keys()
    assert "projection: LTX-2, 32 wide" in str(report)


def test_a_packed_projection_is_read_and_its_logical_width_counts(put, state):
    layer = f"{PROJECTION}video_aggregate_embed"
    other = put("checkpoints", "ltx.safetensors", pack(dual(), (layer,)))
    clip, _ = load_text_encoder(put("text_encoders", "gemma.safetensors", state), other)
    assert tuple(clip.projection[f"{layer}.weight"].shape) == (32, HIDDEN * (BLOCKS + 1))


def test_gemma_4_brings_its_own_projection(put):
    path = put("text_encoders", "gemma4.safetensors", pack(gemma(family=4)) | dual())
    clip, report = load_text_encoder(path)
    assert report.family == "Gemma 4 12B"
    assert clip.projection.keys() == dual().keys()


def test_layers_that_stay_fp8_leave_the_activations_alone(put, state, projection):
    weight = state[f"{LAYER}.weight"]
    fp8 = {f"{LAYER}.weight": weight.to(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.tensor(1.0)}
    fp8[f"{LAYER}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    path = put("text_encoders", "mixed.safetensors", pack(state, ("model.layers.9.mlp.up_proj",)) | fp8)
    clip, report = load_text_encoder(path, projection)
    assert layer_of(clip)._full_precision_mm
    assert report.layers == {"BF16": 335, "nvfp4": 1, "float8_e4m3fn": 1}


def test_a_packed_embedding_becomes_bf16_with_a_warning(put, state, projection):
    path = put("text_encoders", "gemma.safetensors", pack(state, ("model.embed_tokens",)))
    clip, report = load_text_encoder(path, projection)
    record = reference.quantize(state["model.embed_tokens.weight"].float())
    decoded = reference.dequantize(record)
    assert clip.tokens.keys() == {"model.embed_tokens.weight"}
    assert torch.equal(clip.tokens["model.embed_tokens.weight"], decoded)
    assert "token embedding was NVFP4" in report.warnings[0]


def test_an_fp8_embedding_keeps_its_scale_on_a_host_that_would_drop_it(put, state, projection):
    key, scale = "model.embed_tokens", torch.tensor(2.0**-6)
    fp8 = (state[f"{key}.weight"].float() / scale).to(torch.float8_e4m3fn)
    tensors = pack(state) | {f"{key}.weight": fp8, f"{key}.weight_scale": scale}
    clip, report = load_text_encoder(put("text_encoders", "gemma.safetensors", tensors), projection)
    assert clip.tokens.keys() == {f"{key}.weight"}
    assert torch.equal(clip.tokens[f"{key}.weight"], (fp8.float() * scale).bfloat16())
    assert "token embedding was FP8" in report.warnings[0]


def test_the_cpu_can_be_asked_for_and_the_patcher_can_load_again(put, state, projection):
    path = put("text_encoders", "gemma.safetensors", pack(state))
    clip, report = load_text_encoder(path, projection, device="cpu")
    assert clip.options["load_device"] == clip.options["offload_device"] == torch.device("cpu")
    factory, arguments = clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not clip.patcher.model
    layer = again.model.gemma3_12b.transformer.get_submodule(LAYER)
    assert torch.equal(layer.weight._qdata, layer_of(clip).weight._qdata)
    assert "token loop: block by block, this ComfyUI cannot capture graphs of it" in str(report)
    with pytest.raises(ValueError, match="unknown device 'gpu'; expected default or cpu"):
        load_text_encoder(path, projection, device="gpu")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: gemma(34), "this is Gemma 3 4B; expected a Gemma 3 12B .*trained with no other: .*set `type`"),
        (lambda: gemma(60), "this is Gemma 4 31B"),
        (lambda: gemma(47), "this is a Gemma of 47 layers"),
        (lambda: {k: v for k, v in gemma(26).items() if "q_norm" not in k}, "this is Gemma 2"),
        (lambda: {k.replace("model.", "language_model.model.", 1): v for k, v in gemma(2).items()}, "transformers lib"),
        (lambda: {"encoder.block.0.layer.0.SelfAttention.q.weight": random(2, 2)}, "this is a T5 text encoder"),
        (lambda: {"text_model.encoder.layers.0.mlp.fc1.weight": random(2, 2)}, "this is a CLIP text encoder"),
        (lambda: {"model.layers.0.self_attn.q_proj.weight": random(2, 2)}, "this is a text encoder, but no Gemma"),
        (lambda: {"model.diffusion_model.patchify_proj.weight": random(2, 2)}, "this is a checkpoint"),
        (lambda: {"decoder.conv_in.weight": random(2, 2)}, "this is a VAE"),
        (lambda: {"model.layers.0.mlp.up_proj.lora_A.weight": random(2, 2)}, "this is a LoRA; .*LoraLoader"),
        (lambda: dual(), "this is a text projection, without a text encoder; .*choose it as `projection`"),
        (lambda: {"x": random(2)}, "no text encoder is in it"),
        (lambda: {k: v for k, v in gemma().items() if k != "spiece_model"}, r"no tokenizer \(`spiece_model`\)"),
        (lambda: {k: v for k, v in gemma().items() if "s.7.mlp.down" not in k}, "no `model.layers.7.mlp.down_proj`"),
        (lambda: {k: v for k, v in gemma().items() if "layers.20." not in k}, "no `model.layers.20.self_attn.q_proj`"),
    ],
)
def test_a_file_that_is_no_text_encoder_of_ltx_is_refused_by_name(put, projection, tensors, message):
    found = refusal(put("text_encoders", "file.safetensors", tensors()), projection)
    assert found.startswith("file.safetensors: ")
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.diffusion_model.patchify_proj.weight": random(2, 2)}, "other.safetensors: it has no text projection"),
        (dual(HIDDEN * 35), "takes 2240 numbers a token; expected 3,136, the hidden states of Gemma 3 12B"),
        ({f"{PROJECTION}weight": random(8)}, r"has shape \(8,\); expected a matrix"),
    ],
)
def test_a_projection_that_is_missing_or_of_another_model_is_refused(put, state, tensors, message):
    path = put("text_encoders", "gemma.safetensors", pack(state))
    assert re.search(message, refusal(path, put("checkpoints", "other.safetensors", tensors)))


def test_without_a_projection_the_refusal_says_where_to_find_one(put, state):
    found = refusal(put("text_encoders", "gemma.safetensors", pack(state)))
    assert "no text projection" in found and "choose the full checkpoint" in found


def test_an_undeclared_dialect_is_never_guessed_and_the_widget_decides(put, state, projection):
    bare = {k: v for k, v in pack(state).items() if not k.endswith("comfy_quant")}
    path = put("text_encoders", "bare.safetensors", bare)
    assert "neither markers nor the header say" in refusal(path, projection)
    assert "unknown dialect 'best'" in refusal(path, projection, dialect="best")
    clip, report = load_text_encoder(path, projection, dialect="comfy")
    assert report.evidence == "stated by the user"
    assert isinstance(layer_of(clip).weight, QuantizedTensor)


def test_a_host_that_builds_another_gemma_is_told_to_update(put, monkeypatch):
    path = put("text_encoders", "gemma4.safetensors", pack(gemma(family=4)) | dual())
    build = comfy.sd.load_text_encoder_state_dicts

    def older(state_dicts, embedding_directory=None, clip_type=None, model_options=None):
        clip = build(state_dicts, embedding_directory, clip_type, model_options)
        del clip.cond_stage_model.text_encoder_key
        return clip

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", older)
    assert "does not know Gemma 4 12B as a text encoder of LTX; update ComfyUI" in refusal(path)


def test_a_gemma_that_lacks_a_norm_of_the_host_s_model_is_refused(put, state, projection, monkeypatch):
    path = put("text_encoders", "gemma.safetensors", state)
    build = comfy.sd.load_text_encoder_state_dicts

    def whole(state_dicts, **options):
        clip = build(state_dicts, **options)
        layer_of(clip, "model.layers.7").further_norm = torch.nn.LayerNorm(4)
        return clip

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", whole)
    assert "it has nothing for 2 parameters of the model that ComfyUI builds, such as" in refusal(path, projection)


def test_a_header_tells_the_gemma_and_its_projection(put, state):
    vision = {"vision_model.embeddings.patch_embedding.weight": random(2, 2)}
    header = read_header(put("text_encoders", "gemma.safetensors", state | dual() | vision))
    encoder = find_text_encoder(header)
    assert (encoder.family, encoder.hidden, encoder.layers, encoder.vision) == ("Gemma 3 12B", HIDDEN, BLOCKS, True)
    found = find_projection(header, encoder)
    assert (found.family, found.columns, found.widths) == ("LTX-2.3 or later", HIDDEN * 49, (32, 16))


def test_the_node_lists_files_loads_and_runs_again_when_either_file_changes(put, state, projection):
    put("text_encoders", "gemma.safetensors", pack(state))
    shown = NVFP4TextEncoderLoader.INPUT_TYPES()
    assert shown["required"]["text_encoder"][1]["options"] == ["gemma.safetensors"]
    assert shown["required"]["projection"][1]["options"] == [SAME_FILE, "ltx.safetensors", "gemma.safetensors"]
    assert shown["optional"]["dialect"][1]["options"] == [AUTO, *DIALECTS]
    assert [name for name, (_, options) in shown["optional"].items() if not options.get("advanced")] == ["type"]
    assert shown["optional"]["type"][1]["options"][0] == shown["optional"]["type"][1]["default"] == "ltxv"
    schema = NVFP4TextEncoderLoader.GET_SCHEMA()
    assert [output.io_type for output in schema.outputs] == ["CLIP", "STRING"]
    clip, report = NVFP4TextEncoderLoader.execute("gemma.safetensors", "ltx.safetensors").args
    assert isinstance(layer_of(clip).weight, QuantizedTensor)
    assert report.startswith("gemma.safetensors: Gemma 3 12B")
    before = NVFP4TextEncoderLoader.fingerprint_inputs("gemma.safetensors", "ltx.safetensors")
    assert before == NVFP4TextEncoderLoader.fingerprint_inputs("gemma.safetensors", "ltx.safetensors")
    put("checkpoints", "ltx.safetensors", dual() | {"extra": random(2)})
    assert before != NVFP4TextEncoderLoader.fingerprint_inputs("gemma.safetensors", "ltx.safetensors")
    assert NVFP4TextEncoderLoader.fingerprint_inputs(None, None) != NVFP4TextEncoderLoader.fingerprint_inputs(
        None, None, graphs=False
    )


def test_slots_outside_the_window_or_not_yet_written_are_hidden():
    everything, window = (text_decode.Slots(12, size, torch.device("cpu")) for size in (None, 4))
    for index, count, last in ((0, 6, range(2, 6)), (6, 1, range(3, 7)), (7, 1, range(4, 8))):
        for slots in (everything, window):
            slots.take(index, count)
            slots.take(index, count)  # the next layer of the same kind
        assert everything.bias.eq(0).nonzero().flatten().tolist() == list(range(index + count))
        assert window.bias.eq(0).nonzero().flatten().tolist() == list(last)
        assert window.position.item() == index


def test_a_prompt_shorter_than_the_window_hides_nothing():
    slots = text_decode.Slots(8, 6, torch.device("cpu"))
    slots.take(0, 3)
    slots.take(3, 1)
    assert slots.bias.eq(0).tolist() == [True] * 4 + [False] * 4


def test_a_type_this_comfyui_does_not_know_is_refused_with_those_it_knows(put, state):
    path = put("text_encoders", "gemma.safetensors", state)
    with pytest.raises(ValueError, match="no text encoders of type 'qwen'; expected ltxv"):
        load_text_encoder(path, kind="qwen")


def test_embeddings_the_host_cannot_look_up_become_bf16_whatever_they_are_called():
    operations = text_operations(torch.bfloat16, torch.device("cpu"), "torch", "the file")
    record = reference.quantize(torch.randn(32, 64))
    names = ("shared", "embed_tokens", "text_model.embeddings.token_embedding", "block.0.relative_attention_bias")
    linears = ("model.layers.0.mlp.up_proj", "embed_vision.embedding_projection")
    tensors = {f"{name}.weight": wrap(record) for name in names + linears}
    texts = restore_embeddings(tensors, operations, "torch", torch.device("cpu"))
    assert [name for name in tensors if type(tensors[name]) is torch.Tensor] == [f"{name}.weight" for name in names]
    assert torch.equal(tensors["shared.weight"], reference.dequantize(record))
    assert len(texts) == len(names) and texts[0].startswith("its token embedding was NVFP4, it is BF16 now")


def test_plain_weights_and_biases_of_a_text_encoder_keep_the_dtype_of_their_file():
    operations = text_operations(torch.bfloat16, torch.device("cpu"), "torch", "the file")
    layer = operations.Linear(16, 8)
    state = {"weight": torch.randn(8, 16).half(), "bias": torch.randn(8).half()}
    layer.load_state_dict(dict(state))
    assert torch.equal(layer.weight, state["weight"]) and torch.equal(layer.bias, state["bias"])
    assert layer.weight.dtype == layer.bias.dtype == torch.float16
