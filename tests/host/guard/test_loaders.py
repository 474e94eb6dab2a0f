# SPDX-License-Identifier: Apache-2.0
"""The model behind other packs' loaders is found, and how much of a distilling LoRA is on it; twins stay silent."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from nvfp4_video.host.guard import check as guard
from nvfp4_video.host.guard import files as guard_files
from nvfp4_video.host.guard import view as guard_view
from nvfp4_video.host.guard.files import FileFacts, name_says_distilled
from nvfp4_video.host.guard.loaders import MODEL_LOADERS, TEXT_LOADERS, names_of
from nvfp4_video.host.guard.prompt_graph import PromptGraph
from nvfp4_video.tests.checkpoint.file.test_gguf import LTX, head
from nvfp4_video.tests.support.guard_prompts import HEALTHY, clip, facts, ids, node, only

OLD = HEALTHY | facts(torch_cuda=(12, 6), capability=(8, 6))


@pytest.fixture
def named(stub_comfy: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is an LTX-2.3; distilled if its name says so, NVFP4 if that has `fp4` in it."""

    def read(name: str, _: tuple[str, ...]) -> FileFacts:
        distilled = "its file name" if name_says_distilled(name) else None
        return FileFacts(name, "LTX-2.3", None, False, "fp4" in name, distilled)

    monkeypatch.setattr(guard_view, "file_facts", read)


@pytest.mark.parametrize(
    "loader",
    [
        node("UNETLoader", unet_name="distilled"),
        node("UnetLoaderGGUF", unet_name="distilled.gguf"),
        node("UnetLoaderGGUFAdvanced", unet_name="distilled.gguf"),
        node("UnetLoaderGGUFDisTorch2MultiGPU", unet_name="distilled.gguf"),
        node("UNETLoaderMultiGPU", unet_name="distilled"),
        node("CheckpointLoaderSimpleDisTorch2MultiGPU", ckpt_name="distilled"),
        node("GGUFLoaderKJ", model_name="distilled.gguf"),
        node("DiffusionModelLoaderKJ", model_name="distilled"),
        node("CheckpointLoaderKJ", ckpt_name="distilled"),
        node("LowVRAMCheckpointLoader", ckpt_name="distilled"),
    ],
    ids=lambda loader: loader["class_type"],
)
def test_the_model_behind_a_loader_of_another_pack_is_found(loader: dict, named):
    finding = only(clip(model=loader, guider={"cfg": 3}))
    assert finding.id == "distilled_cfg" and "model" in finding.nodes
    dev = {name: value.replace("distilled", "dev") for name, value in loader["inputs"].items()}
    assert ids(clip(model=node(loader["class_type"], **dev), guider={"cfg": 3})) == {}


def test_a_loader_that_is_not_known_is_no_loader(named):
    assert names_of("SomebodysLoaderMultiGPU", MODEL_LOADERS) is None
    assert ids(clip(model=node("SomebodysLoader", unet_name="distilled"), guider={"cfg": 3})) == {}


@pytest.mark.parametrize(
    ("kind", "widget"),
    [("LTXAVTextEncoderLoader", "text_encoder"), ("CLIPLoader", "clip_name"), ("DualCLIPLoader", "clip_name1"),
     ("DualCLIPLoader", "clip_name2"), ("DualCLIPLoaderMultiGPU", "clip_name1"), ("TripleCLIPLoader", "clip_name3"),
     ("CLIPLoaderDisTorch2MultiGPU", "clip_name")],
)  # fmt: skip
def test_an_nvfp4_text_encoder_is_slow_in_every_loader_of_comfyui(kind: str, widget: str, named):
    names = dict.fromkeys(names_of(kind, TEXT_LOADERS).inputs, "gemma") | {widget: "gemma_fp4"}
    finding = only(clip(text=node(kind, **names)), OLD)
    assert (finding.id, finding.nodes) == ("slow_nvfp4", ("text",)) and "gemma_fp4" in finding.title
    assert "NVFP4 Model Loader" not in finding.remedy
    assert ids(clip(text=node(kind, **names)), HEALTHY) == {}
    assert ids(clip(text=node(kind, **names | {widget: "gemma"})), OLD) == {}


def power(*rows: tuple[bool, str, object]) -> dict:
    entries = {f"lora_{i}": {"on": on, "lora": name, "strength": by} for i, (on, name, by) in enumerate(rows, 1)}
    return node("Power Lora Loader (rgthree)", model=["model", 0], **entries)


LORA = "ltx-2.3-22b-distilled-lora-384.safetensors"


@pytest.mark.parametrize(
    ("lora", "distilled"),
    [
        (node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.2), False),
        (node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=-0.4), False),
        (node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.5), True),
        (node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=["?", 0]), False),
        (node("LoraLoaderModelOnly", model=["model", 0], lora_name="undistilled.safetensors", strength_model=1), False),
        (power((True, LORA, 0.6)), True),
        (power((False, LORA, 1.0), (True, "style", 1.0)), False),
        (power((True, LORA, 0.3), (True, "x-distill-y", 0.3)), True),
        (power((True, LORA, "strong")), False),
        (power((True, LORA, 1.0), (True, LORA, -0.8)), False),
    ],
)
def test_a_lora_makes_a_model_distilled_by_its_strength(lora: dict, distilled: bool, named):
    prompt = clip(model={"unet_name": "dev"}, lora=lora, guider={"model": ["lora", 0], "cfg": 3.0},
                  sigmas=node("LTXVScheduler", steps=15))  # fmt: skip
    assert ids(prompt) == ({"distilled_cfg": "warning"} if distilled else {})
    prompt["guider"]["inputs"]["cfg"] = 1.0
    assert ids(prompt) == {}


def override(cfg: object, start: object = 0.0, end: object = 1.0, model: str = "model") -> dict:
    return node("CFGOverride", model=[model, 0], cfg=cfg, start_percent=start, end_percent=end)


@pytest.mark.parametrize(
    ("guided", "overrides", "named_cfg"),
    [
        (3.0, [override(1.0)], None),
        (1.0, [override(4.0)], 4),
        (1.0, [override(4.0, 0.5)], 4),
        (3.0, [override(1.0, 0.0, 0.5)], 3),
        (1.0, [override(4.0, 0.5, 0.5)], None),
        (1.0, [override(4.0), override(1.0, model="o0")], None),
        (1.0, [override(1.0), override(4.0, model="o0")], 4),
        (3.0, [override(1.0, ["?", 0])], None),
        (3.0, [override(["?", 0])], None),
    ],
)
def test_a_cfg_that_the_model_brings_counts_over_the_guider_s(guided: float, overrides: list, named_cfg, named):
    more = {f"o{place}": entry for place, entry in enumerate(overrides)}
    prompt = clip(model={"unet_name": "distilled"}, guider={"cfg": guided, "model": [list(more)[-1], 0]}, **more)
    found = guard.check(prompt, HEALTHY)
    assert [finding.title for finding in found] == (
        [f"A distilled model is sampled with cfg {named_cfg} instead of 1."] if named_cfg else []
    )
    at = "guider" if named_cfg == guided else list(more)[-1]
    assert [fix.node for finding in found for fix in finding.fixes] == ([at] if named_cfg else [])


@pytest.mark.parametrize(("first", "second", "guides"), [(1.0, 8.0, True), (8.0, 1.0, True), (1.0, 1.0, False)])
def test_both_scales_of_a_guider_with_two_conditionings_count(first: float, second: float, guides: bool, named):
    dual = node("DualCFGGuider", model=["model", 0], cond1=["conditioning", 0], cond2=["conditioning", 0],
                negative=["conditioning", 1], cfg_conds=first, cfg_cond2_negative=second)  # fmt: skip
    found = ids(clip(model={"unet_name": "distilled"}, guider=dual))
    assert found == ({"distilled_cfg": "warning"} if guides else {})


def test_a_distilled_model_with_the_lora_taken_off_again_is_none(named):
    lora = node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=-1.0)
    assert ids(clip(model={"unet_name": "distilled"}, lora=lora, guider={"model": ["lora", 0], "cfg": 3.0})) == {}


@pytest.mark.parametrize(
    "name",
    [
        "ltx-2.3-distilled",
        "LTX2.3_Distill_fp8",
        "a/b\\LTXDistilled-v2",
        "dev+distilled",
        "sun-distilled",
        "distillation",
        "distilled-freestyle",
    ],
)
def test_a_name_that_says_distilled_says_it(name: str):
    assert name_says_distilled(name + ".safetensors")


@pytest.mark.parametrize(
    "name", ["undistilled", "ltx-undistilled", "non-distilled", "nondistilled", "ltx_not_distilled", "de-distilled",
             "pre-distillation", "no_distill", "distilled/dev", "ltx-2.3-dev", "2.3undistilled", "anti-distilled",
             "undo_distill", "never distilled", "ltx-2.3-distill-free", "distillation_removed", "distilled-removed"]
)  # fmt: skip
def test_a_name_that_denies_it_or_is_silent_does_not(name: str):
    assert not name_says_distilled(name + ".safetensors")


@pytest.mark.parametrize(
    ("entry", "text", "says"),
    [("modelspec.title", "LTX-2.3 22B Distilled", True), ("general.name", "ltx distilled", True),
     ("modelspec.title", "LTX-2.3, not distilled", False), ("license", "models made by distillation", False),
     ("modelspec.description", "take the distilled LoRA in stage 2", False)],
)  # fmt: skip
def test_only_entries_that_name_a_model_count(entry: str, text: str, says: bool):
    header = types.SimpleNamespace(metadata={entry: text})
    assert (guard_files._distilled("ltx.safetensors", header) is not None) == says


def guided(guider: dict, **more: dict) -> dict:
    prompt = clip(model={"unet_name": "distilled"}, **more)
    prompt["guider"] = guider
    return prompt


def test_the_cfg_of_lightricks_guiders_is_read(named):
    parameters = {
        "video": node("GuiderParameters", modality="VIDEO", cfg=1.0, parameters=["audio", 0]),
        "audio": node("GuiderParameters", modality="AUDIO", cfg=7.0),
    }
    multimodal = guided(node("MultimodalGuider", model=["model", 0], parameters=["video", 0]), **{})
    finding = only(multimodal | parameters)
    assert (finding.id, finding.nodes) == ("distilled_cfg", ("audio", "guider", "model")) and "cfg 7" in finding.title
    parameters["audio"]["inputs"]["cfg"] = 1.0
    assert ids(multimodal | parameters) == {}
    dual = node("LTXVDualCFGGuider", model=["model", 0], video_cfg=1.0, audio_cfg=3.0)
    assert ids(guided(dual)) == {"distilled_cfg": "warning"}
    dual["inputs"]["audio_cfg"] = 1
    assert ids(guided(dual)) == {}
    stg = node("STGGuiderAdvanced", model=["model", 0], cfg_values="1, 6, 1")
    assert ids(guided(stg)) == {"distilled_cfg": "warning"}
    stg["inputs"]["cfg_values"] = "1, 1.0, 1"
    assert ids(guided(stg)) == {}


@pytest.mark.parametrize(
    "sampler",
    [
        node("LTXVBaseSampler", model=["model", 0], guider=["guider", 0], sigmas=["sigmas", 0], width=768, height=512,
             num_frames=121),
        node("LTXVLoopingSampler", model=["model", 0], guider=["guider", 0], sigmas=["sigmas", 0],
             latents=["video", 0]),
        node("LTXVNormalizingSampler", guider=["guider", 0], sigmas=["sigmas", 0], latent_image=["latent", 0]),
    ],
    ids=lambda sampler: sampler["class_type"],
)  # fmt: skip
def test_lightricks_samplers_are_samplers(sampler: dict, named):
    prompt = clip(model={"unet_name": "distilled"}, sampler=sampler, guider={"cfg": 3},
                  decode={"samples": ["sampler", 0]})  # fmt: skip
    assert ids(prompt) == {"distilled_cfg": "warning"}
    prompt["guider"]["inputs"]["cfg"] = 1
    assert ids(prompt) == {}
    prompt["sigmas"]["inputs"]["sigmas"] = "1, 0.5, 0"
    assert ids(prompt) == {"distilled_sigmas": "warning"}


def test_the_length_of_a_sampler_that_makes_its_own_latent_is_judged(named):
    sampler = node("LTXVBaseSampler", model=["model", 0], guider=["guider", 0], sigmas=["sigmas", 0], width=768,
                   height=500, num_frames=120)  # fmt: skip
    found = ids(clip(sampler=sampler, decode={"samples": ["sampler", 0]}))
    assert found == {"frames": "warning", "size": "warning"}


def test_a_pipe_s_model_is_found(named):
    way = {"pipe": node("ToBasicPipe", model=["model", 0]), "out": node("FromBasicPipe", basic_pipe=["pipe", 0])}
    graph = PromptGraph(clip(**way, guider={"model": ["out", 0]}))
    view = guard_view.View(graph, {})
    assert view.model(view.samplers[0].guided_by).loader.id == "model"


def test_a_gguf_file_s_family_and_name_are_read(stub_comfy: types.ModuleType, tmp_path: Path):
    folder = tmp_path / "models" / "unet_gguf"
    folder.mkdir(parents=True)
    stub_comfy.folder_names_and_paths["unet_gguf"] = ([str(folder)], {".gguf"})
    for name in ("ltx-2.3-distilled-Q4_K_M.gguf", "ltx-2.3-dev-Q4_K_M.gguf"):
        (folder / name).write_bytes(head(LTX, []))
    prompt = clip(model=node("UnetLoaderGGUF", unet_name="ltx-2.3-distilled-Q4_K_M.gguf"), guider={"cfg": 3})
    assert ids(prompt) == {"distilled_cfg": "warning"}
    prompt["model"]["inputs"]["unet_name"] = "ltx-2.3-dev-Q4_K_M.gguf"
    assert ids(prompt) == {}
