# SPDX-License-Identifier: Apache-2.0
"""Text encoders of several families, as ComfyUI recognises them, with small dimensions, and their state dicts.

``shrink`` sets the host's own dimensions, in the process that calls it only. Where ComfyUI tells a family by a size,
that size is the released one and all others are small.
"""

from __future__ import annotations

import functools
import importlib
import json
import types
from dataclasses import dataclass, field

TOKENS = [3, 7, 11, 5, 2, 19, 23, 31, 8, 40, 13, 9]
_VOCABULARY, _LAYERS = 64, 3


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


@dataclass(frozen=True)
class Family:
    """``type``: of the host's loader; ``model``: its module and class; ``inner``: path to its encoder in the CLIP.

    ``config``: name of the class with the sizes, ``sizes``, and ``head_dim``, which is no field of it. ``variant``: for
    a class of several sizes, which one; its file has the names of the transformers library and a vision tower.
    """

    name: str
    type: str
    model: tuple[str, str]
    inner: str
    config: str = ""
    sizes: dict = field(default_factory=dict)
    head_dim: int = 32
    tokenizer: str = ""
    writes: bool = False
    variant: str = ""


_SMALL = {"vocab_size": _VOCABULARY, "intermediate_size": 128, "num_hidden_layers": _LAYERS}
_SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
_NARROW = _SMALL | {"hidden_size": 64}
_LLAMA = "text_encoders.llama"
_GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "num_hidden_layers": 24}
FAMILIES = {
    "QWEN3_4B": Family(
        "QWEN3_4B", "lumina2", (_LLAMA, "Qwen3_4B"), "qwen3_4b", "Qwen3_4BConfig", _SMALL, writes=True
    ),
    "QWEN25_7B": Family(
        "QWEN25_7B", "qwen_image", (_LLAMA, "Qwen25_7BVLI"), "qwen25_7b", "Qwen25_7BVLI_Config",
        _NARROW | {"num_attention_heads": 4, "num_key_value_heads": 4}, 128,
    ),
    "QWEN3VL_4B": Family(
        "QWEN3VL_4B", "lumina2", ("text_encoders.qwen3vl", "Qwen3VL"), "qwen3vl_4b", "Qwen3VL_4BConfig", _SMALL, 128,
        variant="qwen3vl_4b",
    ),
    "GEMMA_2_2B": Family(
        "GEMMA_2_2B", "lumina2", (_LLAMA, "Gemma2_2B"), "gemma2_2b", "Gemma2_2B_Config", _NARROW,
        tokenizer="spiece_model", writes=True,
    ),
    "GEMMA_3_4B": Family(
        "GEMMA_3_4B", "lumina2", (_LLAMA, "Gemma3_4B"), "gemma3_4b", "Gemma3_4B_Config", _NARROW,
        tokenizer="spiece_model", writes=True,
    ),
    "LLAMA3_8": Family(
        "LLAMA3_8", "hidream", (_LLAMA, "Llama2"), "llama", "Llama2Config", _NARROW | {"vocab_size": 128256}
    ),
    "T5_XXL": Family("T5_XXL", "pixart", ("text_encoders.t5", "T5"), "t5xxl"),
    "GPT_OSS_20B": Family(
        "GPT_OSS_20B", "lens", ("text_encoders.gpt_oss", "GptOssModel"), "gpt_oss", "GptOss20BConfig",
        _NARROW | _GPT_OSS, tokenizer="tokenizer_json",
    ),
}  # fmt: skip
_T5 = {"d_model": 32, "num_heads": 2, "d_kv": 16, "vocab_size": _VOCABULARY}
_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


def shrink() -> None:
    """Give the host's text encoders the dimensions above."""
    for family in FAMILIES.values():
        if not family.config:
            continue
        module = comfy(family.model[0])
        whole = getattr(module, family.config)
        whole.head_dim = family.head_dim
        small = functools.partial(whole, **family.sizes)
        setattr(module, family.config, small)
        if family.variant:
            module.QWEN3VL_CONFIGS[family.variant] = small
            tower = {"hidden_size": 64, "intermediate_size": 64, "depth": 1, "deepstack_visual_indexes": [0]}
            module.QWEN3VL_VISION[family.variant] = tower
    vision, sd1_clip = comfy("text_encoders.qwen_vl"), comfy("sd1_clip")
    whole = vision.Qwen2VLVisionTransformer
    vision.Qwen2VLVisionTransformer = lambda **kwargs: whole(**kwargs | {"hidden_size": 64, "num_layers": 1})
    # Some installations lack its file, and its tokens are not needed.
    comfy("text_encoders.hunyuan_video").LLAMA3Tokenizer = types.SimpleNamespace
    sd1_clip.json = types.SimpleNamespace(load=_load_config)


def _load_config(file) -> dict:
    config = json.load(file)
    return config | (_T5 if "d_ff" in config else _CLIP if config.get("model_type") == "clip_text_model" else {})


def shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of the text model alone; banks of experts too."""
    torch = importlib.import_module("torch")
    module = comfy(family.model[0])
    arguments = {"dtype": torch.bfloat16, "device": "meta"}
    if family.name == "GPT_OSS_20B":
        operations = comfy("ops").mixed_precision_ops({}, torch.bfloat16)
        model = module.GptOssModel(module.GptOss20BConfig(), ops=operations, **arguments)
    else:
        config = {}
        if family.name == "T5_XXL":
            folder = importlib.import_module("pathlib").Path(module.__file__).parent
            config = _load_config((folder / "t5_config_xxl.json").open())
        kind = getattr(module, family.model[1])
        if family.variant:
            kind = type(kind.__name__, (kind,), {"model_type": family.variant})
        model = kind(config, operations=comfy("ops").manual_cast, **arguments)
    names = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = {name: shape for name, shape in names.items() if family.variant or "visual." not in name}
    for name, part in model.named_modules():
        if hasattr(part, "in_features") and hasattr(part, "out_features"):
            experts = [part.num_experts] if hasattr(part, "num_experts") else []
            found[f"{name}.weight"] = (*experts, part.out_features, part.in_features)
    if family.variant:
        long = {"model.": "model.language_model.", "visual.": "model.visual."}
        starts = {name: next(start for start in long if name.startswith(start)) for name in found}
        return {long[starts[name]] + name.removeprefix(starts[name]): shape for name, shape in found.items()}
    return found


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """The CLIP-L that goes with T5 in FLUX, which has no projection."""
    torch, module = importlib.import_module("torch"), comfy("clip_model")
    folder = importlib.import_module("pathlib").Path(module.__file__).parent
    config = _load_config((folder / "sd1_clip_config.json").open())
    model = module.CLIPTextModel(config, torch.float16, "meta", comfy("ops").manual_cast)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if "text_projection" not in name}


def tokenizer_json() -> bytes:
    """A tokenizer of the tokenizers library with a few words."""
    tokenizers = importlib.import_module("tokenizers")
    words = {f"w{index}": index for index in range(_VOCABULARY)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).to_str().encode()
