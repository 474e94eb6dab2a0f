# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model family become NVFP4, which stay as they are, and why.

A recipe looks at names without the model's prefix and quantises the matrices of its stacks of numbered blocks, less
``keep``, less the first and last blocks; whatever lies outside the stacks stays, which includes the input layers from
whose packed shapes ComfyUI would guess wrong dimensions. Profiles were compared with published ones; ``sources`` names
them:

* Lightricks/LTX-2 ``ltx_core/quantization/fp8_cast.py`` casts to_q, to_k, to_v, to_out and ff of the blocks, no gates,
  no adaln. The published LTX-2.3 files keep blocks 0, 1, 46 and 47 in BF16, those of LTX-2 0 and 43 to 47 (LightX2V,
  ``ltxt_i2av_distilled_fp8.py``); the 1,176 packed layers of LTX-2.5 are 42 blocks of 28, gates left out.
* silveroxides/convert_to_quant ``constants.py``, filters ltxv2, wan, qwen, zimage, flux2.
* NVIDIA/Model-Optimizer ``examples/diffusers/quantization/utils.py``, filters for LTX (first and last 3 blocks), Wan
  (0 to 2 and 37 to 39) and FLUX, and its pull 1205 for Z-Image.
* sgl-project/sglang pull 22738: keeps all LTX-2 cross-attention (attn2, audio_attn2) in BF16. Pull 28557 and
  NVIDIA/TensorRT-LLM pull 15470: nvidia/Qwen-Image-NVFP4 keeps the first and last two blocks and all outer layers.
* vllm-project/vllm-omni pull 2795: FP8 modulations turned Z-Image, Qwen-Image and FLUX into noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...kernels.format import BLOCK
from ..file.header import CheckpointError, Header
from ..identify.signatures import find_model

AUTO = "auto"
MODULATION = "modulation, a few numbers that scale whole streams: FP8 alone made noise of some models"
OUTSIDE = "outside the blocks"
EDGE = "first and last blocks"
AUDIO = "audio branch, protected"
CROSS_ATTENTION = "cross-attention, protected"
ASKED = "kept by a pattern of the user"

_LTX_AUDIO = r"audio"
_LTX_CROSS = r"(^|\.)(attn2|audio_attn2|audio_to_video_attn|video_to_audio_attn)\."
_LTX_GATES = (r"\.to_gate_logits$", "attention gates, 32 rows: published files and Lightricks' own cast leave them out")
_NUMBERED = re.compile(r"^((?:\w+\.)*?\w*(?:blocks|layers)\w*)\.(\d+)\.")


@dataclass(frozen=True)
class Recipe:
    """``stacks``: lists of blocks in the order they run. ``keep``: (pattern of a layer's name, why).

    ``first_last``: blocks kept at either end of all stacks together. ``smallest``: least rows and columns of a matrix
    to quantise. ``audio``, ``cross_attention``: what the protect options keep, empty where the model has none.
    """

    name: str
    stacks: tuple[str, ...]
    keep: tuple[tuple[str, str], ...]
    first_last: tuple[int, int]
    why: str
    sources: tuple[str, ...]
    audio: str = ""
    cross_attention: str = ""
    smallest: int = BLOCK
    safe_default: bool = False


@dataclass(frozen=True)
class Options:
    """What the user changes: protected branches, blocks kept at the ends, regular expressions on layer names.

    ``quantize`` wins over what the recipe keeps, ``keep`` over everything. ``keep_first_last`` None: as the recipe.
    """

    protect_audio: bool = False
    protect_cross_attention: bool = False
    keep_first_last: int | None = None
    keep: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """``quantized``: layers in the order given. ``kept``: layer -> reason. ``warnings``: what the user should know."""

    quantized: tuple[str, ...]
    kept: Mapping[str, str]
    warnings: tuple[str, ...] = field(default=())


_LTX2_WHY = "as the published files: the last blocks are sensitive in this version"
_LTX_SOURCES = ("Lightricks/LTX-2 fp8_cast.py", "silveroxides/convert_to_quant ltxv2", "sgl-project/sglang pull 22738")
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "LTX-2.3", ("transformer_blocks",), (_LTX_GATES,), (0, 0),
            "all 48 blocks, which is what makes 19.5 GB of 29.2 GB; published files keep blocks 0, 1, 46 and 47 in "
            "BF16 (`keep_first_last` 2, 2.2 GB more)",
            _LTX_SOURCES, _LTX_AUDIO, _LTX_CROSS,
        ),
        Recipe("LTX-2.5", ("transformer_blocks",), (_LTX_GATES,), (1, 5), _LTX2_WHY, _LTX_SOURCES, _LTX_AUDIO,
               _LTX_CROSS),
        Recipe("LTX-2", ("transformer_blocks",), (_LTX_GATES,), (1, 5), _LTX2_WHY,
               (*_LTX_SOURCES, "ModelTC/LightX2V ltxt_i2av_distilled_fp8.py"), _LTX_AUDIO, _LTX_CROSS),
        Recipe(
            "Wan", ("blocks",), ((r"modulation", MODULATION),), (3, 3),
            "NVIDIA's profile: embeddings, head and three blocks at either end stay",
            ("NVIDIA/Model-Optimizer filter_func_wan_video", "silveroxides/convert_to_quant wan"),
            r"audio", r"\.cross_attn\.",
        ),
        Recipe(
            "FLUX", ("double_blocks", "single_blocks"), ((r"(_mod|modulation)\.", MODULATION),), (0, 0),
            "attention and MLP of all blocks; input, output and modulation stay",
            ("NVIDIA/Model-Optimizer filter_func_flux_dev", "silveroxides/convert_to_quant flux2",
             "vllm-project/vllm-omni pull 2795"),
        ),
        Recipe(
            "Qwen-Image", ("transformer_blocks",), (), (2, 2),
            "NVIDIA's published file: two blocks at either end and all outer layers stay; modulations of the inner "
            "blocks, a third of the model, are quantized",
            ("NVIDIA/TensorRT-LLM pull 15470", "sgl-project/sglang pull 28557"),
        ),
        Recipe(
            "Z-Image", ("layers",), ((r"adaLN_modulation", MODULATION),), (0, 0),
            "attention and feed-forward of the main layers; refiners, embedders and modulation stay",
            ("NVIDIA/Model-Optimizer pull 1205", "silveroxides/convert_to_quant zimage, zimage_refiner"),
        ),
    )
}  # fmt: skip
FAMILIES = (AUTO, *RECIPES)


def find_recipe(header: Header, requested: str = AUTO) -> Recipe:
    """Header, "auto" or a name of RECIPES -> Recipe; by tensors, so that a fine-tune has that of its base.

    An unknown family gets a safe default. Raises CheckpointError for a file without a diffusion model.
    """
    if requested not in FAMILIES:
        raise CheckpointError(f"unknown recipe {requested!r}", expected=f"one of {', '.join(FAMILIES)}")
    model = find_model(header)
    family = model.family if requested == AUTO else requested
    if family == "LTX-2.3" and requested == AUTO and _is_ltx25(header):
        family = "LTX-2.5"
    return RECIPES.get(family) or _safe_default(family, header, model.prefix)


def select(recipe: Recipe, layers: Mapping[str, tuple[int, ...]], options: Options | None = None) -> Selection:
    """Recipe, {layer without prefix: shape of its weight} -> Selection. Raises CheckpointError for a faulty pattern."""
    options = options or Options()
    keep, force = _compile(options.keep), _compile(options.quantize)
    edges = _edges(recipe, layers, options.keep_first_last)
    warnings = [
        f"{recipe.name} has no {what} that could be protected"
        for what, wanted, pattern in (
            ("audio branch", options.protect_audio, recipe.audio),
            ("cross-attention of its own", options.protect_cross_attention, recipe.cross_attention),
        )
        if wanted and not pattern
    ]
    if recipe.safe_default:
        warnings.append(f"{recipe.why}: check the result with NVFP4 Verify and with your own eyes")
    quantized, kept = [], {}
    for layer, shape in layers.items():
        reason = _obstacle(shape)
        if reason is None and any(pattern.search(layer) for pattern in keep):
            reason = ASKED
        elif reason is None and not any(pattern.search(layer) for pattern in force):
            reason = _reason(recipe, layer, edges, options)
            reason = reason or ("too small to be worth it" if min(shape) < recipe.smallest else None)
        if reason is None:
            quantized.append(layer)
        else:
            kept[layer] = reason
    for pattern in (*keep, *force):
        if not any(pattern.search(layer) for layer in layers):
            warnings.append(f"the pattern {pattern.pattern!r} matches no layer")
    return Selection(tuple(quantized), kept, tuple(warnings))


def _obstacle(shape: tuple[int, ...]) -> str | None:
    """Why the format cannot hold a weight of this shape, or None."""
    if len(shape) != 2:
        return f"{len(shape)} dimensions: NVFP4 is made for matrices"
    if shape[1] % BLOCK or not shape[0] or not shape[1]:
        return f"its columns are not a multiple of {BLOCK}"
    return None


def _reason(recipe: Recipe, layer: str, edges: set[tuple[str, int]], options: Options) -> str | None:
    """Why the recipe and the protections keep a layer, or None."""
    block = _block(recipe, layer)
    if block is None:
        return OUTSIDE
    for pattern, why in recipe.keep:
        if re.search(pattern, layer):
            return why
    if block in edges:
        return EDGE
    if options.protect_audio and recipe.audio and re.search(recipe.audio, layer):
        return AUDIO
    if options.protect_cross_attention and recipe.cross_attention and re.search(recipe.cross_attention, layer):
        return CROSS_ATTENTION
    return None


def _block(recipe: Recipe, layer: str) -> tuple[str, int] | None:
    for stack in recipe.stacks:
        if layer.startswith(f"{stack}.") and (number := layer[len(stack) + 1 :].partition(".")[0]).isdecimal():
            return stack, int(number)
    return None


def _edges(recipe: Recipe, layers: Mapping[str, object], count: int | None) -> set[tuple[str, int]]:
    """The blocks at either end of all stacks together."""
    blocks = {block for layer in layers if (block := _block(recipe, layer)) is not None}
    order = sorted(blocks, key=lambda block: (recipe.stacks.index(block[0]), block[1]))
    first, last = recipe.first_last if count is None else (count, count)
    return {*order[:first], *order[max(len(order) - last, 0) :]}


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        found = f"{error.pattern!r} is no regular expression ({error})"
        expected = r"one on layer names, such as \.attn2\. or ^transformer_blocks\.0\."
        raise CheckpointError(found, expected=expected) from error


def _is_ltx25(header: Header) -> bool:
    """LTX-2.5 has 2.3's transformer; its VAE and its header differ."""
    if header.metadata.get("model_version", "").startswith("2.5"):
        return True
    return any(name.endswith("decoder.conv_in_x_t.weight") for name in header.tensors)


def _safe_default(family: str | None, header: Header, prefix: str) -> Recipe:
    """Large matrices of long stacks, less two blocks at either end and everything whose name sounds like control."""
    numbers: dict[str, set[str]] = {}
    for name in header.tensors:
        found = _NUMBERED.match(name[len(prefix) :]) if name.startswith(prefix) else None
        if found:
            numbers.setdefault(found[1], set()).add(found[2])
    stacks = tuple(stack for stack, found in numbers.items() if len(found) > 4)
    control = r"(?i)norm|mod(ulation)?(\.|_|$)|adaln|embed|gate|router|scale_shift|time|head\.|final|proj_(in|out)$"
    why = f"there is no recipe for {family or 'this family'}, a cautious default is used"
    keep = ((control, "its name sounds like modulation, embedding or normalisation"),)
    return Recipe("default", stacks, keep, (2, 2), why, (), smallest=256, safe_default=True)
