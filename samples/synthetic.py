# SPDX-License-Identifier: Apache-2.0
"""Scaled-down LTX-2.x checkpoints with true key names and seeded random weights, in every dialect found in the wild.

The demo and the tests load what this writes. All dialects of one state hold the same weights: ``quantize_layers`` packs
each layer once and a writer only rearranges bytes, so every file must decode to the same numbers. Two need care:

* ``compressed_tensors`` and ``lightx2v_absmax`` store the reciprocal of the global scale, and ``lightx2v`` splits it
  into ``alpha * input_global_scale``. A power of two survives a reciprocal and a product exactly, so
  ``quantize_layers`` rounds the amax scale up to one; every weight is then exact in BF16, whatever a host's order of
  multiplications. ``exact=False`` keeps the amax scale, moved up by single units in the last place until
  1 / (1 / s) == s in FP32.
* The input scale is 1/128 everywhere (an activation amax of 21 = 2688 / 128), a power of two for the same reason.

Kinds of file (``KINDS``); layouts are those of kernels/format.py unless said otherwise:

* ``bf16``, ``bf16_decoded``: nothing quantised; the second holds the weights after one trip through NVFP4.
* ``comfy_markers``, ``comfy_header``, ``comfy_header_unprefixed`` (a full checkpoint's tensor names, but header names
  without the prefix), ``metadata_less`` (neither marker nor header entry).
* ``modelopt``: low nibble first, unpadded, linear scales. ``modelopt_layerwise``: the same with
  `_quantization_metadata`, which ModelOpt's export writes whether or not it swizzles (``_postprocess_safetensors``).
  ``modelopt_swizzled``: low nibble first, padded, tiled scales, the same two header entries.
* ``compressed_tensors``: low nibble first, unpadded, linear scales, reciprocal global scales of shape (1,).
* ``lightx2v``: low nibble first, unpadded rows, TILED padded scales. Source: LightX2V's ``scaled_nvfp4_quant`` (its
  docstring and allocation: scales of (R128(N), R4(K/16)), swizzled; its kernel: cvt.e2m1x2 puts the even column low).
  Its loader, ``MMWeightWnvfp4Anvfp4dynamic``, reads `alpha` + `input_global_scale` or, as in ``lightx2v_absmax``, what
  its converter and its calibration leave: `weight_global_scale` (2688 / amax, a divisor) + `input_absmax`.
* ``mixed``: comfy markers; the audio branch in FP8, gates in BF16, the rest NVFP4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..checkpoint.file.container import planned, write_checkpoint
from ..checkpoint.file.header import HEADER_ENTRY, layers_entry
from ..kernels.format import BLOCK, PackedWeight, swap_nibbles, unswizzle
from ..kernels.reference import amax_global_scale, dequantize, quantize
from .recorded import recorded

DIT_PREFIX = "model.diffusion_model."
INPUT_SCALE = 1 / 128
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}

Tensors = dict[str, torch.Tensor]


def small_ltx23(seed: int = 0) -> tuple[Tensors, dict]:
    """Seed -> ({tensor name: BF16 tensor}, transformer config): LTX-2.3, 6 blocks of 128 / 64, names without prefix."""
    return _small("ltx23_small", seed)


def small_ltx20(seed: int = 0) -> tuple[Tensors, dict]:
    """As ``small_ltx23`` for LTX-2.0, which hosts older than LTX-2.3 (ComfyUI 0.12 and before) can build too."""
    return _small("ltx20_small", seed)


def _small(name: str, seed: int) -> tuple[Tensors, dict]:
    model = recorded(name)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in model["keys"].items():
        if len(shape) == 1 and "norm" in key and key.endswith("weight"):
            tensor = torch.ones(shape)
        else:
            # Gains below one keep six random blocks from amplifying each other into overflow over eight steps.
            gain = 0.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.01
            tensor = torch.randn(shape, generator=generator) * gain
        state[key] = tensor.to(torch.bfloat16)
    return state, model["config"]


def quantised_layers(state: Tensors, config: Mapping) -> list[str]:
    """The Linears an NVFP4 file of this model packs: all of blocks 2 .. N-3, as in LTX-2.3's published files."""
    packed_blocks = {str(block) for block in range(2, config["num_layers"] - 2)}
    return [
        key.removesuffix(".weight")
        for key, tensor in state.items()
        if tensor.ndim == 2
        and key.endswith(".weight")
        and key.startswith("transformer_blocks.")
        and key.split(".")[1] in packed_blocks
    ]


def quantize_layers(state: Tensors, config: Mapping, exact: bool = True) -> dict[str, PackedWeight]:
    """State, config -> {layer: PackedWeight}, with the global scales of the module docstring.

    Compute it once and hand it to ``write`` for each file.
    """
    return {
        layer: quantize(weight, _power_of_two_scale(weight) if exact else _reciprocal_proof_scale(weight))
        for layer in quantised_layers(state, config)
        for weight in (state[f"{layer}.weight"],)
    }


def _power_of_two_scale(weight: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.log2(amax_global_scale(weight)).ceil())


def _reciprocal_proof_scale(weight: torch.Tensor) -> torch.Tensor:
    scale = amax_global_scale(weight)
    while 1 / (1 / scale) != scale:
        scale = torch.nextafter(scale, scale.new_tensor(torch.inf))
    return scale


def decoded_state(state: Tensors, packed: Mapping[str, PackedWeight]) -> Tensors:
    """The state with each packed layer replaced by its BF16 decoding: what a right reader of any dialect must find."""
    decoded = {f"{layer}.weight": dequantize(w, torch.bfloat16) for layer, w in packed.items()}
    return {key: decoded.get(key, tensor) for key, tensor in state.items()}


def _scalar(value: float | torch.Tensor, shape: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32).reshape(shape)


def _marker(name: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


def _low_first(w: PackedWeight) -> torch.Tensor:
    """Unpadded (N, K/2), even column in the low nibble."""
    return swap_nibbles(w.packed[: w.shape[0], : w.shape[1] // 2]).contiguous()


def _linear_scales(w: PackedWeight) -> torch.Tensor:
    """Unpadded row-major (N, K/16)."""
    return unswizzle(w.block_scale, w.shape[0], w.shape[1] // BLOCK)


def _comfy(w: PackedWeight) -> Tensors:
    return {"weight": w.packed, "weight_scale": w.block_scale, "weight_scale_2": _scalar(w.global_scale)}


def _comfy_marked(w: PackedWeight) -> Tensors:
    return _comfy(w) | {"comfy_quant": _marker("nvfp4")}


def _metadata_less(w: PackedWeight) -> Tensors:
    return _comfy(w) | {"input_scale": _scalar(INPUT_SCALE)}


def _modelopt(w: PackedWeight) -> Tensors:
    return _metadata_less(w) | {"weight": _low_first(w), "weight_scale": _linear_scales(w)}


def _modelopt_swizzled(w: PackedWeight) -> Tensors:
    return _metadata_less(w) | {"weight": swap_nibbles(w.packed)}


def _compressed_tensors(w: PackedWeight) -> Tensors:
    return {
        "weight_packed": _low_first(w),
        "weight_scale": _linear_scales(w),
        "weight_global_scale": _scalar(1 / w.global_scale, (1,)),
        "input_global_scale": _scalar(1 / INPUT_SCALE, (1,)),
    }


def _lightx2v(w: PackedWeight) -> Tensors:
    return {
        "weight": _low_first(w),
        "weight_scale": w.block_scale,
        "alpha": _scalar(w.global_scale * INPUT_SCALE),
        "input_global_scale": _scalar(1 / INPUT_SCALE),
    }


def _lightx2v_absmax(w: PackedWeight) -> Tensors:
    return {
        "weight": _low_first(w),
        "weight_scale": w.block_scale,
        "weight_global_scale": _scalar(1 / w.global_scale),
        "input_absmax": _scalar(INPUT_SCALE * 2688),
    }


def fp8_tensors(weight: torch.Tensor) -> Tensors:
    """One Linear's weight -> {key suffix: tensor} as published FP8 files have it: E4M3, one scale, a marker."""
    scale = weight.abs().amax().float() / 448
    return {
        "weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        "weight_scale": _scalar(scale),
        "comfy_quant": _marker("float8_e4m3fn"),
    }


_LAYER_TENSORS: dict[str, Callable[[PackedWeight], Tensors]] = {
    "comfy_markers": _comfy_marked,
    "comfy_header": _comfy,
    "comfy_header_unprefixed": _comfy,
    "metadata_less": _metadata_less,
    "modelopt": _modelopt,
    "modelopt_layerwise": _modelopt,
    "modelopt_swizzled": _modelopt_swizzled,
    "compressed_tensors": _compressed_tensors,
    "lightx2v": _lightx2v,
    "lightx2v_absmax": _lightx2v_absmax,
    "mixed": _comfy_marked,
}
KINDS = ("bf16", "bf16_decoded", *_LAYER_TENSORS)
_LAYERWISE_HEADER = ("comfy_header", "comfy_header_unprefixed", "modelopt_layerwise", "modelopt_swizzled")
_MODELOPT_HEADER = ("modelopt", "modelopt_layerwise", "modelopt_swizzled")


def _tensors_of(layer: str, kind: str, weight: torch.Tensor, packed: PackedWeight) -> Tensors:
    """One quantised layer of the model -> {key suffix: tensor} of this kind of file."""
    if kind == "mixed" and layer.endswith("to_gate_logits"):
        return {"weight": weight}
    if kind == "mixed" and "audio" in layer:
        return fp8_tensors(weight)
    return _LAYER_TENSORS[kind](packed)


def _metadata(kind: str, config: Mapping, layers: list[str], sidecar: bool) -> dict[str, str]:
    """Header entries of this kind of file; ``layers`` as the file's `_quantization_metadata` names them."""
    entries = {"config": json.dumps({"transformer": config})}
    if kind in _LAYERWISE_HEADER and not (sidecar and kind in _MODELOPT_HEADER):  # ModelOpt writes both or neither
        named = {layer: {"format": "nvfp4"} for layer in layers}
        entries[HEADER_ENTRY] = layers_entry(named)
    if kind in _MODELOPT_HEADER and not sidecar:
        quantization = {"quant_algo": "NVFP4", "quant_method": "modelopt", "group_size": BLOCK, "ignore": []}
        entries["quantization_config"] = json.dumps(quantization | {"producer": _PRODUCER})
    return entries


def _sidecar(kind: str) -> tuple[str, dict] | None:
    """Name and content of the file that lies beside this kind, where its producer writes one."""
    if kind in _MODELOPT_HEADER:
        quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": BLOCK, "exclude_modules": []}
        return "hf_quant_config.json", {"producer": _PRODUCER, "quantization": quantization}
    if kind == "compressed_tensors":
        args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True}
        group = {"targets": ["Linear"], "weights": args, "input_activations": args | {"dynamic": "local"}}
        content = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        return "config.json", {"quantization_config": content | {"config_groups": {"group_0": group}}}
    return None


def other_components() -> Tensors:
    """What a full LTX-2.3 checkpoint holds beside the DiT: true names and leading dimensions, the others cut to 1."""
    shapes = {
        "vae.encoder.down_blocks.1.conv.conv.bias": (64,),
        "vae.encoder.down_blocks.7.conv.conv.weight": (128, 1, 1, 1, 1),
        "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (1024, 1, 1, 1, 1),
        "vae.per_channel_statistics.mean-of-means": (128,),
        "vae.per_channel_statistics.std-of-means": (128,),
        "audio_vae.per_channel_statistics.mean-of-means": (128,),
        "audio_vae.per_channel_statistics.std-of-means": (128,),
        "vocoder.vocoder.resblocks.0.convs1.0.weight": (768, 1, 1),
        "text_embedding_projection.video_aggregate_embed.weight": (128, 1),
        "text_embedding_projection.audio_aggregate_embed.weight": (64, 1),
    }
    return {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}


def write(
    path: Path | str,
    kind: str,
    state: Tensors,
    config: Mapping,
    packed: Mapping[str, PackedWeight] | None = None,
    prefix: str = "",
    full: bool = False,
    sidecar: bool = False,
) -> None:
    """Write one checkpoint of ``kind`` (a name of ``KINDS``).

    ``packed``: from ``quantize_layers``, computed here when absent. ``prefix``: put before every model tensor; ``full``
    and ``comfy_header_unprefixed`` set it to ``model.diffusion_model.``, and ``full`` adds ``other_components()``.
    ``sidecar``: ModelOpt's and compressed-tensors' configuration goes into a JSON file beside the checkpoint, which
    therefore wants a folder of its own, and what ModelOpt writes into the header is left out there.
    Raises ValueError for an unknown kind.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of checkpoint {kind!r}; expected one of {', '.join(KINDS)}")
    if full or kind == "comfy_header_unprefixed":
        prefix = DIT_PREFIX
    if packed is None and kind != "bf16":
        packed = quantize_layers(state, config)
    if kind == "bf16_decoded":
        state = decoded_state(state, packed)
    layers = packed if kind in _LAYER_TENSORS else {}
    tensors: Tensors = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if layer != key and layer in layers:
            for suffix, part in _tensors_of(layer, kind, tensor, layers[layer]).items():
                tensors[f"{prefix}{layer}.{suffix}"] = part
        else:
            tensors[prefix + key] = tensor
    if full:
        tensors |= other_components()
    header_prefix = "" if kind == "comfy_header_unprefixed" else prefix
    entries = _metadata(kind, config, [header_prefix + layer for layer in layers], sidecar)
    write_checkpoint(path, planned(tensors), entries)
    beside = _sidecar(kind) if sidecar else None
    if beside is not None:
        path.with_name(beside[0]).write_text(json.dumps(beside[1], indent=2), encoding="utf-8")


def write_lora(path: Path | str, state: Tensors, config: Mapping, rank: int = 4, gain: float = 0.2) -> list[str]:
    """Write a LoRA for some packed layers (one of them padded) and one BF16 layer; returns the layers it changes.

    Names are those of LTX LoRAs (``diffusion_model.<layer>.lora_A.weight``). ``gain`` is the size of the change
    relative to that of the weights, roughly.
    """
    endings = ("attn1.to_q", "attn1.to_gate_logits", "ff.net.0.proj")
    layers = ["transformer_blocks.0.attn1.to_q"]
    layers += [layer for layer in quantised_layers(state, config) if layer.endswith(endings)]
    generator = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for layer in layers:
        rows, cols = state[f"{layer}.weight"].shape
        down = torch.randn(rank, cols, generator=generator) * gain / cols**0.5
        up = torch.randn(rows, rank, generator=generator) / rank**0.5
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = up.to(torch.bfloat16)
    write_checkpoint(path, planned(tensors), {})
    return layers


def write_vae(path: Path | str) -> None:
    """Write a stand-in video VAE file (true names, cut shapes): what a user picks as the model by mistake."""
    tensors = {name.removeprefix("vae."): t for name, t in other_components().items() if name.startswith("vae.")}
    config = json.dumps({"vae": {"_class_name": "CausalVideoAutoencoder"}})
    write_checkpoint(path, planned(tensors), {"config": config})
