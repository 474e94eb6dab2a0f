# SPDX-License-Identifier: Apache-2.0
"""host/load/vae.py and NVFP4VAELoader on the stubbed host: which VAE is taken, what is refused, what the host gets."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import comfy.ldm.lightricks.vae.audio_vae as host_audio
import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.host.files import SAME_FILE
from nvfp4_video.host.load.vae import ResidentVAE, _check_whole, load_vae
from nvfp4_video.kernels import reference
from nvfp4_video.kernels.errors import PackError
from nvfp4_video.nodes.vae import NVFP4VAELoader
from nvfp4_video.samples.recorded import recorded
from nvfp4_video.tests.support import containers
from safetensors.torch import save_file

CONFIG = {"vae": {"dims": 3}, "audio_vae": {"model": {}}, "vocoder": {"vocoder": {}, "bwe": {}}}
METADATA = {"config": json.dumps(CONFIG), "license": "community"}
KERNEL = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
SIGNATURES = ("decoder.up_blocks.0.res_blocks.0.conv1.", "encoder.down_blocks.7.conv.")


def cut_down(part: str) -> dict[str, torch.Tensor]:
    """All names of a VAE, shapes cut to 16 where no signature reads them."""
    keys = recorded("ltx_vae_keys")[part]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in keys.items():
        true = len(shape) if part == "taehv_ltx2" else 2 * name.startswith(SIGNATURES)
        kept = [size if axis < true else min(size, 16) for axis, size in enumerate(shape)]
        tensors[name] = torch.randn(kept, generator=generator).to(torch.bfloat16)
    return tensors


@pytest.fixture(scope="module")
def video() -> dict[str, torch.Tensor]:
    return cut_down("video_vae")


@pytest.fixture(scope="module")
def audio() -> dict[str, torch.Tensor]:
    return cut_down("audio_vae")


@pytest.fixture
def put(stub_comfy, tmp_path: Path):
    """put(folder, name, tensors, metadata) -> path of a new file in that model folder."""

    def write(folder: str, name: str, tensors: dict, metadata: dict | None = METADATA) -> str:
        path = tmp_path / "models" / folder / name
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
        return str(path)

    return write


def full(video: dict, audio: dict) -> dict[str, torch.Tensor]:
    dit = {"model.diffusion_model.patchify_proj.weight": torch.zeros(16, 16, dtype=torch.bfloat16)}
    return {f"vae.{name}": tensor for name, tensor in video.items()} | audio | dit


def weights(vae) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in vae.first_stage_model.named_parameters()}


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def run(name: str, kind: str = "auto", allow_preview: bool = False, **options) -> tuple:
    return NVFP4VAELoader.execute(name, kind, allow_preview, **options).args


def test_a_video_vae_is_the_same_from_its_own_file_and_from_a_checkpoint(put, video, audio):
    put("vae", "own.safetensors", video)
    put("checkpoints", "full.safetensors", full(video, audio))
    for name, place in (("own.safetensors", "names without prefix"), ("full.safetensors", "its vae.* tensors")):
        vae, report = run(name)
        assert same(weights(vae), video)
        assert report.startswith(f"{name}: LTX 2.3 video VAE, {place}, 170 tensors")
        assert "device: cpu, dtype: float32" in report


@pytest.mark.parametrize("make", [containers.numbered, containers.indexed])
def test_a_vae_in_shards_is_the_same_whichever_shard_is_named_and_lends_its_config(put, tmp_path, video, audio, make):
    whole = Path(put("checkpoints", "full.safetensors", full(video, audio)))
    make(whole, whole.parent)  # the config is in the first shard only
    names = sorted(path.name for path in whole.parent.glob("*.safetensors") if path != whole)
    assert len(names) == 2
    for name in names:
        assert same(weights(run(name, "video")[0]), video)
        assert same(weights(run(name, "audio")[0]), audio)
    put("vae", "bare.safetensors", video, None)
    for name in names:
        assert same(weights(run("bare.safetensors", config_from=name)[0]), video)


def test_kind_chooses_the_audio_vae_of_a_checkpoint_and_a_file_of_its_own_needs_no_choice(put, video, audio):
    put("diffusion_models", "full.safetensors", full(video, audio))
    put("vae", "audio.safetensors", audio)
    for name, kind in (("full.safetensors", "audio"), ("audio.safetensors", "auto"), ("audio.safetensors", "audio")):
        vae, report = run(name, kind)
        assert same(weights(vae), audio)
        assert "LTX 2.3 audio VAE" in report
    with pytest.raises(CheckpointError, match="there is no video VAE in it"):
        run("audio.safetensors", "video")


def test_the_audio_vae_stays_in_fp32_whatever_dtype_the_host_has_for_vaes(put, video, audio, monkeypatch):
    asked = []
    build = comfy.sd.VAE.__init__

    def forced(self, dtype=None, **arguments):  # as a host that was started with --bf16-vae
        asked.append(dtype)
        build(self, dtype=dtype or torch.bfloat16, **arguments)

    monkeypatch.setattr(comfy.sd.VAE, "__init__", forced)
    put("checkpoints", "full.safetensors", full(video, audio))
    for kind, dtype in (("audio", torch.float32), ("video", torch.bfloat16)):
        vae, report = run("full.safetensors", kind)
        assert vae.vae_dtype is dtype and f"dtype: {str(dtype).removeprefix('torch.')}" in report
    assert asked == [torch.float32, None]


def test_every_file_lies_in_one_of_three_folders_and_the_vae_folder_comes_first(put, video, audio):
    put("checkpoints", "a.safetensors", audio)
    put("vae", "a.safetensors", video)
    put("loras", "l.safetensors", {"x": torch.zeros(1)})
    options = NVFP4VAELoader.INPUT_TYPES()["required"]["vae_name"][1]["options"]
    assert options == ["a.safetensors"]
    assert "video VAE" in run("a.safetensors")[1]
    with pytest.raises(FileNotFoundError, match="models/vae, models/checkpoints, models/diffusion_models"):
        run("l.safetensors")
    with pytest.raises(FileNotFoundError):
        run("../loras/l.safetensors")


def test_the_vae_is_loaded_whole_on_hosts_that_would_cast_layer_by_layer(put, video, monkeypatch):
    class Dynamic(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    path = put("vae", "own.safetensors", video)
    vae, _ = load_vae(path)
    assert type(vae.patcher) is comfy.model_patcher.ModelPatcher
    assert vae.disable_offload is True
    assert vae.patcher.load_device == management.get_torch_device()


def test_the_host_can_load_the_vae_again_for_another_gpu(put, video):
    vae, _ = load_vae(put("vae", "own.safetensors", video))
    factory, arguments = vae.patcher.cached_patcher_init
    for again in (factory(*arguments), factory(*arguments, disable_dynamic=True)):
        assert again.model is not vae.patcher.model
        assert same({name: p.detach() for name, p in again.model.named_parameters()}, video)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_where_fast_cannot_be_the_report_says_why_and_the_weights_are_the_file_s(put, video, audio, kind):
    path = put("checkpoints", "full.safetensors", full(video, audio))
    vae, report = run("full.safetensors", kind, decode="fast")
    (line,) = [line for line in report.splitlines() if line.startswith("decode: ")]
    assert line.startswith("decode: exact (ComfyUI's own), not fast: this ComfyUI decodes it by other classes")
    assert same(weights(vae), video if kind == "video" else audio)
    assert vae.patcher.cached_patcher_init[1] == (path, kind, False, None, "auto", None, "fast")
    assert "decode: exact (ComfyUI's own)" in run("full.safetensors", kind)[1].splitlines()


def test_a_way_to_decode_that_does_not_exist_is_refused(put, video):
    with pytest.raises(PackError, match="unknown decode 'quick'; expected exact or fast"):
        load_vae(put("vae", "own.safetensors", video), decode="quick")


def test_scaled_fp8_and_packed_kernels_become_bf16_once(put, video):
    stored = dict(video)
    scale = torch.tensor(0.5)
    stored[KERNEL] = (video[KERNEL].float() / scale).to(torch.float8_e4m3fn)
    stored[KERNEL.replace("weight", "weight_scale")] = scale
    packed = "decoder.up_blocks.1.conv.conv.weight"
    matrix = torch.randn(32, 16 * 27, generator=torch.Generator().manual_seed(3))
    record = reference.quantize(matrix, reference.amax_global_scale(matrix))
    layer = packed.removesuffix(".weight")
    stored |= {packed: record.packed, f"{layer}.weight_scale": record.block_scale}
    stored[f"{layer}.weight_scale_2"] = record.global_scale
    stored[f"{layer}.bias"] = torch.zeros(32, dtype=torch.bfloat16)
    put("vae", "damaged.safetensors", stored)
    vae, report = run("damaged.safetensors", dialect="comfy")
    found = weights(vae)
    assert found.keys() == video.keys()
    assert torch.equal(found[KERNEL], (stored[KERNEL].float() * scale).to(torch.bfloat16))
    decoded = reference.dequantize(record, torch.bfloat16)
    assert torch.equal(found[packed], decoded.reshape(32, 16, 3, 3, 3))
    (line,) = [line for line in report.splitlines() if line.startswith("restored to BF16: ")]
    assert "1 from scaled FP8" in line and "1 from NVFP4, comfy" in line


def test_what_cannot_decode_ltx_latents_is_refused_with_the_remedy(put, video):
    no_statistics = {name: tensor for name, tensor in video.items() if "per_channel" not in name}
    flux = {"decoder.conv_in.weight": torch.zeros(512, 16, 3, 3)}
    cases = {
        "is a preview decoder, several times softer.*take the full VAE.*allow_preview": (cut_down("taehv_ltx2"), {}),
        "FLUX or SD3 image VAE.*cannot decode LTX latents; take the full VAE": (flux, None),
        "has no `config`.*set `config_from`": (video, {"license": "x"}),
        "lacks `per_channel_statistics.mean-of-means`": (no_statistics, METADATA),
        "there is no video VAE in it; choose a full checkpoint": ({"blocks.0.weight": torch.zeros(2, 2)}, METADATA),
    }
    for number, (message, (tensors, metadata)) in enumerate(cases.items()):
        name = f"bad{number}.safetensors"
        put("vae", name, tensors, metadata)
        with pytest.raises(CheckpointError, match=f"^{name}: .*{message}"):
            run(name)


def test_a_config_comes_from_a_sibling_only_where_the_file_has_none(put, video, audio):
    put("vae", "bare.safetensors", video, {"license": "x"})
    put("vae", "own.safetensors", video)
    put("checkpoints", "sibling.safetensors", full(video, audio), {"config": json.dumps(CONFIG | {"vae": {"dims": 2}})})
    assert "config taken from sibling.safetensors" in run("bare.safetensors", config_from="sibling.safetensors")[1]
    assert "config taken" not in run("own.safetensors", config_from="sibling.safetensors")[1]
    assert "config taken" not in run("own.safetensors", config_from=SAME_FILE)[1]


def test_a_decoder_with_missing_weights_is_refused_because_the_host_would_leave_them_random(put, video):
    lost = "decoder.up_blocks.9.conv.weight"
    config = json.dumps({"vae": {"expected": [lost, "encoder.unused.weight", "decoder.scale"]}})
    put("vae", "cut.safetensors", video, {"config": config})
    with pytest.raises(CheckpointError, match=f"^cut.safetensors: weights of its decoder are missing, `{lost}`"):
        run("cut.safetensors")


def test_a_preview_decoder_passes_only_on_request_with_a_warning_and_untiled(put, caplog):
    tae = cut_down("taehv_ltx2")
    put("vae", "taeltx.safetensors", tae, {})
    with caplog.at_level(logging.INFO):
        vae, report = run("taeltx.safetensors", allow_preview=True)
    assert same(weights(vae), tae)
    assert "warning: this is a preview decoder, several times softer than the full VAE" in report
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    latent = torch.randn(1, 128, 3, 40, 40)
    assert torch.equal(vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2), vae.decode(latent))
    assert (vae.upscale_ratio[0](3), vae.upscale_ratio[1:], vae.upscale_index_formula) == (17, (32, 32), (8, 32, 32))


def test_a_vae_on_the_cpu_beside_a_gpu_is_reported(put, video, monkeypatch, caplog):
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda", 0))
    path = put("vae", "own.safetensors", video)
    with caplog.at_level(logging.WARNING):
        _, report = load_vae(path)
    assert report.warnings == ("decoding runs on the CPU, which is slow: start ComfyUI without --cpu-vae.",)
    assert "--cpu-vae" in caplog.text


def test_an_audio_vae_with_missing_weights_is_refused_and_a_missing_encoder_is_an_error_once_it_is_used():
    linear = lambda: torch.nn.Linear(2, 2)  # noqa: E731
    parts = torch.nn.ModuleDict({"encoder": linear(), "decoder": linear()})
    model = torch.nn.ModuleDict({"autoencoder": parts, "vocoder": linear()})
    names = {name.replace("autoencoder.", "audio_vae.") for name in model.state_dict()}
    for lost in ("audio_vae.decoder.bias", "vocoder.weight"):
        part = lost.split(".")[-2]
        with pytest.raises(CheckpointError, match=f"^a.safetensors: weights of its {part} are missing, `{lost}`"):
            _check_whole(model, names - {lost}, "a.safetensors")
    _check_whole(model, names - {"audio_vae.encoder.weight"}, "a.safetensors")
    parts["decoder"](torch.zeros(1, 2))
    with pytest.raises(CheckpointError, match="a.safetensors, layer audio_vae.encoder: the model needs it"):
        parts["encoder"](torch.zeros(1, 2))


def test_statistics_of_fp8_codes_are_refused(put, video):
    name = "per_channel_statistics.std-of-means"
    path = put("vae", "codes.safetensors", video | {name: torch.full((16,), 448.0).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is FP8 without a scale"):
        load_vae(path)


def test_hosts_before_the_audio_vae_became_a_vae_get_their_own_object(put, audio, monkeypatch):
    class AudioVAE(torch.nn.Module):
        def __init__(self, state_dict: dict, metadata: dict):
            super().__init__()
            self.state, self.metadata = state_dict, metadata
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
            patcher = comfy.model_patcher.ModelPatcher(self, torch.device("cpu"), torch.device("cpu"))
            self.device_manager = type("Manager", (), {"patcher": patcher})

    monkeypatch.setattr(host_audio, "AudioVAE", AudioVAE)
    path = put("vae", "audio.safetensors", audio)
    vae, report = load_vae(path)
    assert not isinstance(vae, ResidentVAE)
    assert same(vae.state, audio)
    assert (report.dtype, report.device) == ("bfloat16", "cpu")
    monkeypatch.delattr(host_audio, "VocoderWithBWE")
    with pytest.raises(CheckpointError, match="does not know the LTX 2.3 audio VAE.*update ComfyUI"):
        load_vae(path)


def test_a_host_that_knows_no_such_vae_is_named_as_the_cause(put, video, monkeypatch):
    path = put("vae", "own.safetensors", video)
    monkeypatch.setattr("comfy.sd._VAE_SIGNS", ())
    with pytest.raises(CheckpointError, match="this ComfyUI does not know the LTX 2.3 video VAE; update ComfyUI"):
        load_vae(path)


def test_the_user_can_cancel_while_the_file_is_read(put, video):
    path = put("vae", "own.safetensors", video)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        load_vae(path)


def test_of_two_vaes_the_prefix_chooses(put, video):
    two = {f"{prefix}.{name}": tensor for prefix in ("vae", "first_stage_model") for name, tensor in video.items()}
    two["first_stage_model." + KERNEL] = torch.zeros_like(video[KERNEL])
    put("checkpoints", "two.safetensors", two)
    with pytest.raises(CheckpointError, match="2 VAEs are in it"):
        run("two.safetensors")
    assert same(weights(run("two.safetensors", vae_prefix="vae.")[0]), video)
    assert not weights(run("two.safetensors", vae_prefix="first_stage_model.")[0])[KERNEL].any()


def test_the_host_runs_the_node_again_if_a_file_or_an_option_changed(put, video):
    path = put("vae", "own.safetensors", video)
    put("checkpoints", "lender.safetensors", {"x": torch.zeros(1)})

    def fingerprint(kind="auto", allow_preview=False, **options):
        return NVFP4VAELoader.fingerprint_inputs("own.safetensors", kind, allow_preview, **options)

    first = fingerprint()
    assert fingerprint() == first
    seen = {first, fingerprint("video"), fingerprint(allow_preview=True), fingerprint(dialect="comfy")}
    seen |= {fingerprint(vae_prefix="vae."), fingerprint(config_from="lender.safetensors")}
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert len({*seen, fingerprint()}) == 7
    assert NVFP4VAELoader.fingerprint_inputs(None, "auto", False)  # linked inputs arrive as None
