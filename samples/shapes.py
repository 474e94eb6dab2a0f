# SPDX-License-Identifier: Apache-2.0
"""Prompts and headers of N parts in shapes that are slow to read for whoever looks at a part twice.

Nobody draws or writes these; anybody can send them. Tests and ``benchmarks/scaling.py`` read them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]
SIGMAS = "1.0, 0.5, 0.0"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of an API prompt."""
    return {"class_type": kind, "inputs": inputs}


def clip() -> Prompt:
    """Joint sampling in one stage, with mistakes that the guard looks for: its rules have something to follow."""
    return {
        "model": node("UNETLoader", unet_name="ltx.safetensors"),
        "cond": node("LTXVConditioning", positive=["p", 0], negative=["n", 0], frame_rate=24),
        "video": node("EmptyLTXVLatentVideo", width=770, height=512, length=120),
        "audio": node("LTXVEmptyLatentAudio", frames_number=97, frame_rate=24),
        "latent": node("LTXVConcatAVLatent", video_latent=["video", 0], audio_latent=["audio", 0]),
        "guider": node("CFGGuider", model=["model", 0], positive=["cond", 0], cfg=3.0),
        "sigmas": node("ManualSigmas", sigmas=SIGMAS),
        "sampler": _sampler(["latent", 0], ["sigmas", 0]),
        "separate": node("LTXVSeparateAVLatent", av_latent=["sampler", 0]),
        "vae": node("VAELoader", vae_name="vae.safetensors"),
        "decode": node("VAEDecode", samples=["separate", 0], vae=["vae", 0]),
        "create": node("CreateVideo", images=["decode", 0], fps=25),
        "save": node("SaveVideo", video=["create", 0]),
    }


def _sampler(latent: list, sigmas: list) -> dict[str, Any]:
    return node("SamplerCustomAdvanced", guider=["guider", 0], sigmas=sigmas, latent_image=latent)


def _chain(count: int, first: list, make: Callable[[list], dict[str, Any]]) -> Prompt:
    """``make(link to the node before)``, ``count`` times, as nodes c0, c1, ..."""
    return {f"c{i}": make([f"c{i - 1}", 0] if i else first) for i in range(count)}


def clips(count: int) -> Prompt:
    """Many separate clips."""
    prompt: Prompt = {}
    for number in range(count // 13 + 1):
        for name, entry in clip().items():
            inputs = {k: [f"{number}:{v[0]}", v[1]] if isinstance(v, list) else v for k, v in entry["inputs"].items()}
            prompt[f"{number}:{name}"] = {"class_type": entry["class_type"], "inputs": inputs}
    return prompt


def primitives(count: int) -> Prompt:
    """A chain of primitives, each node of which is asked for its value."""
    half = count // 2
    prompt = clip() | {f"p{i}": node("PrimitiveInt", value=[f"p{i + 1}", 0]) for i in range(half)}
    prompt[f"p{half}"] = node("PrimitiveInt", value=24)
    for i in range(half):
        prompt[f"r{i}"] = node("LTXVConditioning", positive=["p", 0], frame_rate=[f"p{i}", 0])
    return prompt


def schedules(count: int) -> Prompt:
    """A chain of SplitSigmas, a sampler at each."""
    half = count // 2
    chain = _chain(half, ["sigmas", 0], lambda before: node("SplitSigmas", sigmas=before, step=1))
    return clip() | chain | {f"s{i}": _sampler(["latent", 0], [f"c{i}", 0]) for i in range(half)}


def loras(count: int) -> Prompt:
    """A chain of LoRA loaders."""

    def make(before: list) -> dict[str, Any]:
        return node("LoraLoaderModelOnly", model=before, lora_name="x.safetensors", strength_model=1.0)

    prompt = clip() | _chain(count, ["model", 0], make)
    prompt["guider"]["inputs"]["model"] = [f"c{count - 1}", 0]
    return prompt


def samplers(count: int) -> Prompt:
    """A chain of samplers on one model."""
    return clip() | _chain(
        count, ["latent", 0], lambda before: node("KSampler", model=["model", 0], latent_image=before, cfg=3.0)
    )


def rates(count: int) -> Prompt:
    """A chain of conditionings of two frame rates, a sampler and a video at each."""
    third = count // 3
    prompt = clip() | _chain(third, ["p", 0], lambda before: node("LTXVConditioning", positive=before, frame_rate=24))
    for i in range(third):
        prompt[f"s{i}"] = node("KSampler", model=["model", 0], positive=[f"c{i}", 0], latent_image=["latent", 0])
        prompt[f"v{i}"] = node("CreateVideo", images=[f"s{i}", 0], fps=24)
        prompt[f"c{i}"]["inputs"]["frame_rate"] = 24 + i % 2
    return prompt


def silent(count: int) -> Prompt:
    """The same without sound, where two frame rates may be meant: nothing to say, of any of the films."""
    prompt = rates(count)
    for name, entry in prompt.items():
        if name.startswith("s") and name[1:].isdecimal():
            entry["inputs"]["latent_image"] = ["video", 0]
    return prompt


def reroutes(count: int) -> Prompt:
    """A chain of reroutes and decided switches."""
    prompt = clip() | _chain(count, ["latent", 0], lambda before: {"class_type": "Reroute", "inputs": {"": before}})
    for i in range(1, count, 2):
        prompt[f"c{i}"] = node("ComfySwitchNode", switch=True, on_true=[f"c{i - 1}", 0], on_false=["video", 0])
    prompt["sampler"]["inputs"]["latent_image"] = [f"c{count - 1}", 0]
    return prompt


def star(count: int) -> Prompt:
    """One reroute of many inputs, many samplers at it."""
    hub = {"class_type": "Reroute", "inputs": {f"x{i}": 0 for i in range(count)}}
    ends = {f"s{i}": node("KSampler", model=["hub", i], latent_image=["hub", i]) for i in range(count)}
    return clip() | {"hub": hub} | ends


def files(count: int) -> Prompt:
    """Many decodes, each with a VAE file of its own."""
    prompt = clip()
    for i in range(count // 2):
        prompt[f"f{i}"] = node("VAELoader", vae_name=f"{i}.safetensors")
        prompt[f"d{i}"] = node("VAEDecodeTiled", vae=[f"f{i}", 0], samples=["separate", 0])
    return prompt


def cycles(count: int) -> Prompt:
    """Nothing but cycles."""
    return {
        str(i): node(
            "LTXVConditioning", model=[str((i + 1) % count), 0], latent_image=[str(i * 31 % count), 0],
            positive=[str(i * 7919 % count), 0], frame_rate=i,
        )
        for i in range(count)
    }  # fmt: skip


PROMPTS: Mapping[str, Callable[[int], Prompt]] = {
    made.__name__: made
    for made in (clips, primitives, schedules, loras, samplers, rates, silent, reroutes, star, files, cycles)
}

KINDS = (
    "Reroute", "ComfySwitchNode", "PrimitiveInt", "KSampler", "SamplerCustomAdvanced", "CFGGuider", "VAEDecodeTiled",
    "LTXVConcatAVLatent", "LTXVSeparateAVLatent", "EmptyLTXVLatentVideo", "LTXVEmptyLatentAudio", "LTXVConditioning",
    "CreateVideo", "NVFP4LaunchGuard", "ManualSigmas", "SplitSigmas", "VAELoader", "UNETLoader", "LoraLoaderModelOnly",
    "LTXVLatentUpsampler", "VAEDecode", "SaveVideo", "", "\ud800", "x" * 5000,
)  # fmt: skip
INPUTS = (
    "", "model", "guider", "latent_image", "samples", "vae", "video_latent", "audio_latent", "av_latent", "switch",
    "on_true", "on_false", "value", "width", "height", "length", "frame_rate", "frames_number", "fps", "images", "cfg",
    "sigmas", "policy", "vae_name", "unet_name", "lora_name", "strength_model", "positive", "allow_preview",
)  # fmt: skip
_WILD = (
    None, True, False, 0, -1, 24, 121, 2**63, 10**400, 10**4400, 1e-300, 1e308, -0.0, float("nan"), float("inf"),
    "", "24", "1e999", "9" * 500, "..", "1" + "." * 300, "\ud800", "a\0b", "x" * 5000, "../../x.safetensors", "block",
    "distilled.safetensors", [], {}, [[]], ["0"], ["0", 0, 0], ["0", None], [0, 0], [10**4400, 0], [{}, 0],
    {"__value__": 24}, {"__value__": ["0", 0]},
)  # fmt: skip


def wild(seed: int) -> dict[str, Any]:
    """A body of POST /prompt with a prompt of any shape, and anything in the place of everything else."""
    rng = random.Random(seed)  # noqa: S311  (nothing secret)
    ids = [str(i) for i in range(rng.randint(1, 12))]

    def value() -> Any:
        return [rng.choice(ids), rng.choice((0, 0, 1, -1))] if rng.random() < 0.6 else rng.choice(_WILD)

    def entry() -> Any:
        if rng.random() < 0.05:
            return rng.choice(_WILD)
        inputs: Any = {rng.choice(INPUTS): value() for _ in range(rng.randint(0, 8))}
        kind = rng.choice(KINDS) if rng.random() < 0.95 else rng.choice(_WILD)
        return {"class_type": kind, "inputs": inputs if rng.random() < 0.95 else rng.choice(_WILD)}

    body: dict[str, Any] = {"prompt": {name: entry() for name in ids} if rng.random() < 0.95 else rng.choice(_WILD)}
    for key in ("client_id", "extra_data", "partial_execution_targets", "number", "front", "prompt_id"):
        if rng.random() < 0.4:
            body[key] = rng.choice((*_WILD, ids, ["0", {}, 1], {"client_id": {}}, "someone"))
    return body


def vae_prefixes(count: int) -> list[str]:
    """As many VAEs as a file may have, all of the same number of names: two of them where there are few names."""
    vaes = min(count // 2, 1000)
    ends = ("1.weight", "22.bias", *(f"{i}.x" for i in range(count // vaes - 2)))
    return [f"v{i}.decoder.{end}" for i in range(vaes) for end in ends]


def shared_beginnings(count: int) -> list[str]:
    """Many beginnings that could be a model's, six names each."""
    return [f"p{i}.{part}.weight" for i in range(count // 6) for part in "abcdef"]


def models(count: int) -> list[str]:
    """Many models of one family, each under a prefix of its own and beside another one."""
    inner = ("adaln_single.emb.timestep_embedder.linear_1", "patchify_proj", "diffusion_model.x", "a", "b", "c")
    return [f"p{i}.{part}.weight" for i in range(count // 6) for part in inner]


def blocks(count: int) -> list[str]:
    """A model of very many blocks."""
    known = ["adaln_single.linear.weight", "audio_adaln_single.linear.weight"]
    return known + [f"transformer_blocks.{i}.attn1.to_q.weight" for i in range(count)]


HEADERS: Mapping[str, Callable[[int], list[str]]] = {
    made.__name__: made for made in (vae_prefixes, shared_beginnings, models, blocks)
}


def _long_names(size: int) -> dict[str, Any]:
    """The most tensors that a file may have, their names padded."""
    count, padding = 100_000, "x" * (size // 100_000 - 90)
    entry = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
    return {f"transformer_blocks.{i}.{padding}": entry for i in range(count)}


# What a header may be full of -> its JSON text of about this many bytes.
LARGE: Mapping[str, Callable[[int], str]] = {
    "names of tensors": lambda size: json.dumps(_long_names(size)),
    "one text": lambda size: '{"__metadata__": {"a": "' + "x" * (size - 99) + '"}}',
    "one wide text": lambda size: '{"__metadata__": {"a": "' + "x" * (size - 99) + '\U0001f600"}}',
    "one config": lambda size: '{"__metadata__": {"config": "[' + "1," * (size // 2 - 99) + '1]"}}',
    "short texts": lambda size: (
        '{"__metadata__": {' + ", ".join(f'"{i}": "{"x" * (size // 999_000 - 13)}"' for i in range(999_000)) + "}}"
    ),
    "lists": lambda size: '{"a": [' + " " * (size - 2_999_999) + "[]," * 999_000 + "1]}",
    "objects": lambda size: '{"a": [' + " " * (size - 2_999_999) + '{"":1},' * 199_000 + "1]}",
    "digits": lambda size: '{"a": ' + "9" * (size - 99) + "}",
    "escapes": lambda size: '{"__metadata__": {"a": "' + "\\u0431" * (size // 6 - 20) + '"}}',
}


def write_names(path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of tensors with these names and 2 x 2 bytes each."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        entries[name] = {"dtype": "I8", "shape": [2, 2], "data_offsets": [end, end + 4]}
        end += 4
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
