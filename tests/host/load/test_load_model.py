# SPDX-License-Identifier: Apache-2.0
"""host/load/model.py on the stubbed host: every dialect becomes the same Linears, each bad file one clear error."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.host.load.model import COMPUTE_MODES, load_model
from nvfp4_video.samples import synthetic
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PACKED_KINDS = [kind for kind in synthetic.KINDS if not kind.startswith("bf16") and kind != "mixed"]
DIALECT_OF = {
    **dict.fromkeys(("comfy_markers", "comfy_header", "comfy_header_unprefixed", "metadata_less"), "comfy"),
    **dict.fromkeys(("modelopt", "modelopt_layerwise"), "modelopt"),
    **dict.fromkeys(("lightx2v", "lightx2v_absmax"), "lightx2v"),
    "modelopt_swizzled": "modelopt_swizzled",
    "compressed_tensors": "compressed_tensors",
}
LAYER = "transformer_blocks.2.attn1.to_q"
PADDED_LAYER = "transformer_blocks.2.attn1.to_gate_logits"  # four rows, which ComfyUI pads to sixteen


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: on a busy machine threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(one_thread):
    """State, config and packed layers of the small LTX-2.3; its global scales are not all powers of two."""
    state, config = synthetic.small_ltx23()
    return state, config, synthetic.quantize_layers(state, config, exact=False)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with <kind>.safetensors for every kind."""
    folder = tmp_path_factory.mktemp("files")
    for kind in synthetic.KINDS:
        synthetic.write(folder / f"{kind}.safetensors", kind, *model)
    return folder


@pytest.fixture
def edit(files: Path, tmp_path: Path):
    """edit(kind, change) -> path of a copy whose tensors and header entries ``change(tensors, metadata)`` altered."""

    def edited(kind: str, change) -> str:
        source, target = files / f"{kind}.safetensors", tmp_path / "edited.safetensors"
        tensors = load_file(source)
        with safe_open(source, "pt") as file:
            metadata = file.metadata() or {}
        change(tensors, metadata)
        save_file(tensors, target, metadata)
        return str(target)

    return edited


def assert_computes_the_decoded_weights(patcher, model) -> None:
    """Every packed layer gives bit for bit what a matmul with its decoded weight gives; all else is as it was."""
    state, _, packed = model
    decoded = synthetic.decoded_state(state, packed)
    dit = patcher.model.diffusion_model
    for layer in packed:
        module = dit.get_submodule(layer)
        x = torch.randn(3, module.in_features, dtype=torch.bfloat16)
        bias = state[f"{layer}.bias"]
        assert torch.equal(module(x), torch.nn.functional.linear(x, decoded[f"{layer}.weight"], bias)), layer
        assert isinstance(module.weight, QuantizedTensor), f"{layer} did not stay packed"
    for key, tensor in state.items():
        if key.rpartition(".")[0] not in packed:
            assert torch.equal(dit.get_parameter(key), tensor), key


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_every_dialect_loads_as_linears_of_the_same_weights(kind: str, model, files: Path):
    patcher, report = load_model(str(files / f"{kind}.safetensors"))
    assert_computes_the_decoded_weights(patcher, model)
    assert report.dialect == DIALECT_OF[kind]
    assert report.layers == {"nvfp4": len(model[2]), "BF16": 260 - len(model[2])}


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_of_a_full_checkpoint_only_the_model_is_loaded(kind: str, model, tmp_path: Path):
    path = tmp_path / "full.safetensors"
    synthetic.write(path, kind, *model, full=True)
    patcher, report = load_model(str(path))
    assert_computes_the_decoded_weights(patcher, model)
    parts = {name.split(".")[0] for name, _ in patcher.model.diffusion_model.named_parameters()}
    assert not parts & {"vae", "audio_vae", "vocoder", "model"}
    assert report.layers == {"nvfp4": len(model[2]), "BF16": 260 - len(model[2])}


@pytest.mark.parametrize("kind", ["modelopt", "compressed_tensors"])
def test_a_dialect_that_only_a_file_beside_it_declares_is_found(kind: str, model, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    synthetic.write(path, kind, *model, sidecar=True)
    assert_computes_the_decoded_weights(load_model(str(path))[0], model)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_stating_the_right_dialect_gives_the_same_model(kind: str, model, files: Path):
    patcher, report = load_model(str(files / f"{kind}.safetensors"), dialect=DIALECT_OF[kind])
    assert_computes_the_decoded_weights(patcher, model)
    assert report.evidence == "stated by the user"


def test_fp8_and_bf16_layers_stay_what_they_are_beside_nvfp4_ones(model, files: Path):
    state, _, packed = model
    patcher, report = load_model(str(files / "mixed.safetensors"))
    dit = patcher.model.diffusion_model
    fp8 = dit.get_submodule("transformer_blocks.2.audio_attn1.to_q")
    assert fp8.quant_format == "float8_e4m3fn"
    assert fp8.weight._qdata.dtype == torch.float8_e4m3fn
    error = fp8.weight.dequantize().float() - state["transformer_blocks.2.audio_attn1.to_q.weight"].float()
    assert error.norm() < 0.04 * state["transformer_blocks.2.audio_attn1.to_q.weight"].float().norm()
    assert torch.equal(dit.get_submodule(PADDED_LAYER).weight, state[f"{PADDED_LAYER}.weight"])
    weight = synthetic.decoded_state(state, packed)[f"{LAYER}.weight"]
    assert torch.equal(dit.get_submodule(LAYER).weight.dequantize().bfloat16(), weight)
    assert report.layers == {"BF16": 204, "float8_e4m3fn": 36, "nvfp4": 20}


def test_a_file_without_nvfp4_layers_loads_too(model, files: Path):
    patcher, report = load_model(str(files / "bf16.safetensors"))
    for key, tensor in model[0].items():
        assert torch.equal(patcher.model.diffusion_model.get_parameter(key), tensor)
    assert report.dialect == "none"
    assert "no NVFP4 layer" in str(report)


def test_the_report_says_what_was_loaded_and_how_it_computes(files: Path, caplog: pytest.LogCaptureFixture):
    path = files / "compressed_tensors.safetensors"
    with caplog.at_level(logging.INFO, "nvfp4_video"):
        _, report = load_model(str(path))
    lines = str(report).splitlines()
    with safe_open(path, "pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert lines[0] == f"compressed_tensors.safetensors: LTX-2.3, {size / 1e9:.2f} GB"
    assert report.gigabytes == size / 1e9
    assert lines[1] == "dialect: compressed_tensors (keys `weight_packed`)"
    assert lines[2] == "layers: 192 BF16, 68 nvfp4"
    assert lines[3].startswith("compute: bf16")
    assert "torch backend (Triton needs an NVIDIA or AMD GPU, the model is on cpu)" in lines[3]
    assert lines[4] == "device: cpu, DynamicVRAM off"
    own = [record for record in caplog.records if record.name.startswith("nvfp4_video")]
    assert [record.getMessage() for record in own] == ["; ".join(lines)]
    _, report = load_model(str(path), backend="torch")
    assert (report.backend, report.reason) == ("torch", "asked for")


@pytest.mark.parametrize("kind", ["comfy_markers", "comfy_header", "metadata_less"])
def test_packed_weights_of_the_native_dialect_are_not_copied(kind: str, model, files, monkeypatch):
    read, load = {}, comfy.utils.load_torch_file

    def recorded(*args, **kwargs):
        state, metadata = load(*args, **kwargs)
        read.update({key: tensor.data_ptr() for key, tensor in state.items()})
        return state, metadata

    monkeypatch.setattr(comfy.utils, "load_torch_file", recorded)
    patcher, _ = load_model(str(files / f"{kind}.safetensors"))
    for layer in model[2]:
        weight = patcher.model.diffusion_model.get_submodule(layer).weight
        assert weight._qdata.data_ptr() == read[f"{layer}.weight"]


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_loaded_model_saves_as_the_comfy_dialect(kind: str, model, files: Path):
    patcher, _ = load_model(str(files / f"{kind}.safetensors"))
    saved = patcher.model.diffusion_model.state_dict()
    for layer, weight in model[2].items():
        assert torch.equal(saved[f"{layer}.weight"], weight.packed)
        scales = saved[f"{layer}.weight_scale"].view(torch.uint8)
        assert torch.equal(scales, weight.block_scale.view(torch.uint8))
        assert saved[f"{layer}.weight_scale_2"] == weight.global_scale
        assert bytes(saved[f"{layer}.comfy_quant"].tolist()) == b'{"format": "nvfp4"}'
        # A dynamic scale stays absent, a static one keeps its value whatever convention the file had.
        static = {f"{layer}.input_scale": synthetic.INPUT_SCALE} if not kind.startswith("comfy_") else {}
        assert {key: saved[key].item() for key in saved if key == f"{layer}.input_scale"} == static


def test_the_host_can_load_the_model_again_from_what_the_patcher_remembers(model, files: Path):
    patcher, _ = load_model(str(files / "modelopt.safetensors"))
    factory, arguments = patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model
    assert_computes_the_decoded_weights(again, model)
    assert again.cached_patcher_init == patcher.cached_patcher_init


@pytest.mark.parametrize("disable", [True, False])
def test_switching_dynamic_vram_off_reaches_the_host(disable: bool, files: Path, monkeypatch: pytest.MonkeyPatch):
    seen, load = [], comfy.sd.load_diffusion_model_state_dict

    def recorded(sd, model_options=None, metadata=None, disable_dynamic=False):
        seen.append(disable_dynamic)
        return load(sd, model_options, metadata)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", recorded)
    load_model(str(files / "comfy_markers.safetensors"), disable_dynamic=disable)
    assert seen == [disable]


def test_a_host_that_cannot_switch_dynamic_vram_off_is_not_asked_to(model, files, monkeypatch: pytest.MonkeyPatch):
    load = comfy.sd.load_diffusion_model_state_dict
    older = lambda sd, model_options=None, metadata=None: load(sd, model_options, metadata)  # noqa: E731
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", older)
    patcher, _ = load_model(str(files / "comfy_markers.safetensors"), disable_dynamic=True)
    assert_computes_the_decoded_weights(patcher, model)


def test_awq_smoothing_is_applied_where_the_host_knows_it_and_refused_where_not(edit, monkeypatch: pytest.MonkeyPatch):
    def add(tensors, metadata):
        tensors[f"{LAYER}.pre_quant_scale"] = torch.full((128,), 3.0)

    path = edit("comfy_markers", add)
    module = load_model(path)[0].model.diffusion_model.get_submodule(LAYER)
    x = torch.randn(2, 128)
    assert torch.equal(module(x), torch.nn.functional.linear(3 * x, module.weight.dequantize(), module.bias))
    older = QUANT_ALGOS["nvfp4"] | {"parameters": {"weight_scale", "weight_scale_2", "input_scale"}}
    monkeypatch.setitem(QUANT_ALGOS, "nvfp4", older)
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: .*pre_quant_scale.*update ComfyUI")


def assert_refused(path: str, message: str, **options) -> None:
    """Loading stops with one CheckpointError of one line that matches ``message``."""
    with pytest.raises(CheckpointError, match=f"^{message}$") as refusal:
        load_model(path, **options)
    assert "\n" not in str(refusal.value)


def remove(key: str):
    return lambda tensors, metadata: tensors.pop(key)


def put(key: str, value: torch.Tensor):
    return lambda tensors, metadata: tensors.update({key: value})


@pytest.mark.parametrize("kept", [0, 7, 100, 100_000, -1])
def test_a_truncated_file_is_to_be_downloaded_again(kept: int, files: Path, tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((files / "comfy_markers.safetensors").read_bytes()[:kept])
    assert_refused(str(path), r"cut\.safetensors: .*(missing|empty|only 7 bytes).*download it again")


def test_a_header_longer_than_the_file_is_refused(files: Path, tmp_path: Path):
    path = tmp_path / "long.safetensors"
    data = (files / "comfy_markers.safetensors").read_bytes()
    for length, found in ((len(data), "of them are missing"), (2**27, "header claims a length of 134,217,728")):
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        assert_refused(str(path), rf"long\.safetensors: .*{found}.*download it again")


SCALES = [
    *(("comfy_markers", "weight_scale"), ("comfy_markers", "weight_scale_2"), ("modelopt", "weight_scale_2")),
    *(("compressed_tensors", "weight_global_scale"), ("lightx2v", "alpha"), ("lightx2v", "input_global_scale")),
]


@pytest.mark.parametrize(("kind", "key"), SCALES)
def test_a_missing_scale_is_named_with_its_layer(kind: str, key: str, edit):
    wanted = "`weight_scale`" if key == "weight_scale" else "no global scale.*expected .*`"
    remedy = "download it again or choose another dialect"
    assert_refused(edit(kind, remove(f"{LAYER}.{key}")), rf"edited\.safetensors, layer {LAYER}: .*{wanted}.*{remedy}")


@pytest.mark.parametrize("shape", [(128, 4), (128, 16), (256, 8), (1024,), (1, 1)])
def test_block_scales_of_a_wrong_shape_are_refused_with_the_right_ones(shape, edit):
    path = edit("comfy_markers", put(f"{LAYER}.weight_scale", torch.zeros(shape).to(torch.float8_e4m3fn)))
    shapes = r"\(128, 8\) \(tiled\) or \(128, 8\) \(row-major\)"
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: .*{'.*'.join(map(str, shape))}.*{shapes}.*")


def test_several_global_scales_in_one_layer_are_refused(edit):
    path = edit("comfy_markers", put(f"{LAYER}.weight_scale_2", torch.ones(128)))
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: .*weight_scale_2.*\(128,\); expected one number.*")


BAD_SCALES = [
    *(("comfy_markers", "weight_scale_2", float("nan")), ("comfy_markers", "weight_scale_2", float("inf"))),
    *(("modelopt", "weight_scale_2", -1.0), ("lightx2v", "alpha", float("nan"))),
    ("compressed_tensors", "weight_global_scale", 0.0),  # a divisor
]


@pytest.mark.parametrize(("kind", "key", "value"), BAD_SCALES)
def test_a_global_scale_that_is_no_finite_number_is_refused(kind: str, key: str, value: float, edit):
    path = edit(kind, put(f"{LAYER}.{key}", torch.tensor(value)))
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: its global scale is .*(download|quantize) it again")


@pytest.mark.parametrize("width", [1, 4, 60])
def test_columns_that_are_no_multiple_of_16_are_refused(width: int, edit):
    path = edit("comfy_markers", put(f"{LAYER}.weight", torch.zeros(128, width, dtype=torch.uint8)))
    assert_refused(path, rf"edited\.safetensors, layer {LAYER}: .* {2 * width} columns.*multiple of 16.*download.*")


DAMAGED_MARKERS = {b"\0" * 19: "nothing but NUL", b'{"form': "no JSON", b"{}": "`format`", b"7": "no JSON"}


@pytest.mark.parametrize(("content", "found"), DAMAGED_MARKERS.items())
def test_a_damaged_marker_is_refused_until_the_dialect_is_stated(content: bytes, found: str, model, edit):
    def damage(tensors, metadata):
        for layer in model[2]:
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(content), dtype=torch.uint8)

    path = edit("comfy_markers", damage)
    remedy = "download the file again, or state its `dialect`"
    assert_refused(path, rf"edited\.safetensors, layer transformer_blocks\.\S+: .*comfy_quant.*{found}.*{remedy}.*")
    assert_computes_the_decoded_weights(load_model(path, dialect="comfy")[0], model)


def test_a_file_that_no_mark_explains_is_refused_until_the_dialect_is_stated(model, edit):
    def foreign_config(tensors, metadata):
        metadata["config"] = json.dumps({"transformer": {"_class_name": "Other"}})

    path = edit("metadata_less", foreign_config)
    assert_refused(path, r"edited\.safetensors: .*neither markers nor the header.*set `dialect`.*comfy.*")
    assert_computes_the_decoded_weights(load_model(path, dialect="comfy")[0], model)


def test_a_dialect_that_the_scales_contradict_is_refused(files: Path):
    path = str(files / "modelopt.safetensors")
    expected = rf"modelopt\.safetensors, layer {PADDED_LAYER}: .*row-major.*choose another dialect"
    assert_refused(path, expected, dialect="modelopt_swizzled")
    assert_refused(path, r"modelopt\.safetensors, layer .*compressed-tensors.*", dialect="compressed_tensors")
    assert_refused(path, r"modelopt\.safetensors: unknown dialect 'nf4'; expected auto.* comfy.*", dialect="nf4")


def test_other_files_than_models_are_refused_with_the_node_that_takes_them(model, tmp_path: Path):
    path = tmp_path / "picked.safetensors"
    synthetic.write_lora(path, *model[:2])
    assert_refused(str(path), r"picked\.safetensors: this is a LoRA; .*LoraLoaderModelOnly.*")
    synthetic.write_vae(path)
    assert_refused(str(path), r"picked\.safetensors: this is a VAE; .*VAE loader")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, path)
    assert_refused(str(path), r"picked\.safetensors: this is a text encoder; .*text encoder loader")
    save_file({"vocoder.conv_pre.weight": torch.zeros(2, 2)}, path)
    assert_refused(str(path), r"picked\.safetensors: this is an audio VAE; .*loader for audio VAEs")
    save_file({}, path)
    assert_refused(str(path), r"picked\.safetensors: the file holds no tensors; .*download it again")
    save_file({"unheard.of.weight": torch.zeros(2, 2)}, path)
    assert_refused(str(path), r"picked\.safetensors: ComfyUI does not recognise .*update ComfyUI.*")


def test_a_file_without_config_is_refused_until_another_lends_its_own(model, files: Path, edit):
    path = edit("comfy_markers", lambda tensors, metadata: metadata.pop("config"))
    assert_refused(path, r"edited\.safetensors: .*no `config`.*LTX-2\.3.*set `config_from`.*")
    patcher, report = load_model(path, config_from=str(files / "bf16.safetensors"))
    assert_computes_the_decoded_weights(patcher, model)
    assert patcher.model.model_config.unet_config["num_layers"] == model[1]["num_layers"]
    assert str(report).splitlines()[-1] == "config taken from bf16.safetensors"


def test_lenders_without_a_config_and_files_that_vanished_are_refused(edit, tmp_path: Path):
    path = edit("comfy_markers", lambda tensors, metadata: metadata.pop("config"))
    vae, gone = tmp_path / "vae.safetensors", tmp_path / "gone.safetensors"
    synthetic.write_vae(vae)
    assert_refused(path, r"edited\.safetensors: .*no `config`.*", config_from=path)
    assert_refused(path, r"vae\.safetensors: .*no `config`.*same version", config_from=str(vae))
    assert_refused(path, r".*gone\.safetensors: the file does not exist.*", config_from=str(gone))
    assert_refused(str(gone), r".*gone\.safetensors: the file does not exist.*refresh.*")


def test_a_config_of_its_own_wins_over_a_lender_s(edit, files: Path):
    def renumber(tensors, metadata):
        config = json.loads(metadata["config"])
        config["transformer"]["num_layers"] = 7
        metadata["config"] = json.dumps(config)

    patcher, report = load_model(edit("comfy_markers", renumber), config_from=str(files / "bf16.safetensors"))
    assert patcher.model.model_config.unet_config["num_layers"] == 7
    assert report.config_from is None


def test_modes_and_backends_that_cannot_run_are_refused_before_the_file_is_read(tmp_path: Path):
    missing = str(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="unknown compute mode 'fp2'; expected bf16"):
        load_model(missing, compute="fp2")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected auto, triton or torch"):
        load_model(missing, backend="cuda")
    with pytest.raises(ValueError, match="triton backend cannot run: .*on cpu; choose backend auto or torch"):
        load_model(missing, backend="triton")
    assert COMPUTE_MODES == ("bf16", "int8", "fp8", "fp4", "auto")
