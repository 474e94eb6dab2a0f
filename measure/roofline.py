# SPDX-License-Identifier: Apache-2.0
"""Arithmetic against bandwidth: where the time of a denoising step goes on a GPU, and what NVFP4 changes about it.

For each Linear of the diffusion model, T tokens and a weight of (N, K):

    FLOPs = 2 T N K        bytes = weight as the matrix product reads it + 2 T K + 2 T N

Weights that are not stored the way they are multiplied are rewritten first, layer by layer, which only moves bytes.
Attention costs 4 Tq Tk D FLOPs, and what lies between the products (norms, rotary embedding, gates, GELU) passes over
the tokens of a block: 51, counted in ComfyUI's code; 36 where this pack computes in ``fp8`` and 39 in ``fp4``, counted
in host/compute/fused_block.py, those in ``fp8`` with what the products read in FP8. A step takes what the GPU needs for
the sum of these, or what the CPU needs to launch it, whichever is more.

``Step.floor`` uses peak rates and no overhead: nothing can be faster. ``Step.seconds`` uses these constants:

* MATMUL_SHARE, BANDWIDTH_SHARE: measured on an H200 (benchmarks/results/linear.json, dequant.json; FP8: 1.468 ms for
  14,080 x 16384 x 4096). For FP4 no measurement of ours exists; 0.67 as for BF16.
* ATTENTION_SHARE: compute capability 9.0 fitted to ONE row of benchmarks/results/step.json (stock BF16 at 14,080
  tokens), between which and 0.35 (arXiv:2407.08608, FlashAttention-2 on an H100) there is little; elsewhere 0.70, from
  arXiv:2307.08691 (A100), which was not measured here. FASTEST_ATTENTION_SHARE_HOPPER: this pack in ``fp8`` and ``fp4``
  takes the fastest of torch's kernels, on 9.0 cuDNN's: 272.5 ms a step of 14,080 tokens (step_kernels.txt).
* STEP_ERROR: the largest error over the rows of step.json and, in ``fp8``, of step_fp8.json; a test predicts them
  again.
* LAUNCH_SECONDS, OTHER_SECONDS_PER_BLOCK: CPU time of a Xeon with 16 cores for a Linear of stock ComfyUI (step.json,
  `launch_us`) and for the rest of a block (fitted to its 6,144 tokens). This pack replays blocks as CUDA graphs where
  that is too much, GRAPH_SECONDS_PER_BLOCK: 34 Linears at what DynamicVRAM adds to one, 81 - 18 microseconds
  (`launch_us` of step.json and linear.json).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from ..kernels.errors import PackError
from .gpus import Gpu
from .ltx import audio_latents, latent_size

MODES = ("bf16", "fp8", "fp4")
MATMUL_SHARE = {"bf16": 0.67, "fp8": 0.65, "fp4": 0.67}
BANDWIDTH_SHARE = 0.89
STEP_ERROR = 0.15
ATTENTION_SHARE_HOPPER, FASTEST_ATTENTION_SHARE_HOPPER, ATTENTION_SHARE = 0.29, 0.59, 0.70
LAUNCH_SECONDS = {"BF16": 62e-6, "QuantizedTensor": 191e-6}
OTHER_SECONDS_PER_BLOCK = 6.25e-3
GRAPHS, GRAPH_SECONDS_PER_BLOCK = "graphs", 2.1e-3
# Gemma 3 12B without its embedding: 48 x (2 x 3840 x 4096 + 2 x 3840 x 2048 + 3 x 3840 x 15360). ComfyUI pads to 1,024.
TEXT_ENCODER_PARAMETERS, TEXT_TOKENS = 10_758_389_760, 1024
# Convolutions of LTX-2.3's decoder for one position of the latent, from their shapes; a test recounts them.
VAE_FLOPS_PER_LATENT = 20_108_279_808
_PASSES = {"": 51, "fp8": 36, "fp4": 39}
_STORED_BYTES = {"NVFP4": 0.5625, "FP8": 1.0, "INT8": 1.0, "F32": 4.0}
QUANTISED = ("NVFP4", "FP8", "INT8")
_FORMATS = {"U8": "NVFP4", "F8_E4M3": "FP8", "F8_E5M2": "FP8", "I8": "INT8", "F32": "F32"}
_MULTIPLIED_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}
_BLOCK = re.compile(r"transformer_blocks\.\d+\.(?P<module>\w+)\.(?P<part>[\w.]+)")
# Module -> tokens of its queries, tokens of its keys and values.
_ATTENTION = {
    "attn1": ("video", "video"),
    "attn2": ("video", "text"),
    "audio_attn1": ("audio", "audio"),
    "audio_attn2": ("audio", "text"),
    "audio_to_video_attn": ("video", "audio"),
    "video_to_audio_attn": ("audio", "video"),
}
_ONCE = {"patchify_proj": "video", "proj_out": "video", "audio_patchify_proj": "audio", "audio_proj_out": "audio"}


class TensorEntry(Protocol):
    """What is needed of a header entry: safetensors dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Clip:
    """What is rendered. ``text_tokens``: length of the prompt as the model sees it."""

    width: int
    height: int
    frames: int
    fps: float = 24.0
    text_tokens: int = TEXT_TOKENS
    audio: bool = True

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each stream; "one" is for layers that see the timestep only."""
        frames, height, width = latent_size(self.width, self.height, self.frames)
        audio = audio_latents(self.frames, self.fps) if self.audio else 0
        return {"video": frames * height * width, "audio": audio, "text": self.text_tokens, "one": 1}


@dataclass(frozen=True)
class Linear:
    """Linears of one kind: (``rows``, ``cols``) weights ``stored`` in a format, fed with ``tokens`` of a stream."""

    label: str
    rows: int
    cols: int
    stored: str
    tokens: str


@dataclass(frozen=True)
class Transformer:
    """The parts of an LTX transformer that cost time: kinds of Linears with their counts, and its blocks."""

    linears: Mapping[Linear, int]
    blocks: int
    attention: Mapping[tuple[str, str, int], int]
    width: int

    @property
    def quantised(self) -> bool:
        """Whether any Linear is stored in fewer than 16 bits."""
        return any(one.stored in QUANTISED for one in self.linears)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the Linears' weights as they are stored, block scales included."""
        return sum(count * one.rows * one.cols * stored_bytes(one.stored) for one, count in self.linears.items())

    def stored_as(self, stored: str) -> Transformer:
        """The same model with its quantised Linears in another format.

        Of a model without any, those of all blocks but the first and the last two, as published LTX-2.3 files have it.
        """
        changed: Counter[Linear] = Counter()
        for one, count in self.linears.items():
            chosen = count if one.stored in QUANTISED else 0
            if not self.quantised and count > 1:
                chosen = max(count - count * 4 // self.blocks, 0)
            changed[replace(one, stored=stored)] += chosen
            changed[one] += count - chosen
        return replace(self, linears=+changed)


@dataclass(frozen=True)
class Work:
    """One kind of work of a step: FLOPs, bytes moved, and seconds as predicted and at least.

    ``label``: stream and shape of Linears, queries and keys of an attention. ``kind``: key of ``Step.shares``.
    """

    label: str
    kind: str
    flops: float
    nbytes: float
    seconds: float
    floor: float


@dataclass(frozen=True)
class Step:
    """One denoising step on one GPU. ``shares``: math, weights, attention, between -> predicted seconds."""

    mode: str
    seconds: float
    floor: float
    gpu_seconds: float
    cpu_seconds: float
    shares: Mapping[str, float]
    bound: str
    work: tuple[Work, ...] = field(repr=False)

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def read_model(tensors: Mapping[str, TensorEntry]) -> Transformer | None:
    """Header entries of a diffusion model, names without prefix -> Transformer; None if it is no LTX transformer."""
    linears: Counter[Linear] = Counter()
    attention: Counter[tuple[str, str, int]] = Counter()
    blocks = set()
    for name, info in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "weight_packed") or len(info.shape) != 2:
            continue
        found = _BLOCK.match(layer)
        stream = _stream(found["module"], found["part"]) if found else _ONCE.get(layer, "one")
        if stream is None or "connector" in layer:  # connectors run once a prompt, not every step
            continue
        stored = _FORMATS.get(info.dtype, "BF16")
        rows, cols = info.shape[0], info.shape[1] * (2 if stored == "NVFP4" else 1)
        label = f"{found['module']}.{found['part']}" if found else layer
        linears[Linear(label, rows, cols, stored, stream)] += 1
        if found:
            blocks.add(name.split(".")[1])
            if found["part"] == "to_q":
                attention[(*_ATTENTION[found["module"]], rows)] += 1
    width = max((one.cols for one in linears if one.label == "attn1.to_q"), default=0)
    known = width and any(one.label == "patchify_proj" for one in linears)
    return Transformer(linears, len(blocks), attention, width) if known else None


def _stream(module: str, part: str) -> str | None:
    """Which tokens a Linear of a block is fed with; None for a module that LTX does not have."""
    if module in ("ff", "audio_ff"):
        return "video" if module == "ff" else "audio"
    if module not in _ATTENTION:
        return None
    queries, keys = _ATTENTION[module]
    return keys if part in ("to_k", "to_v") else queries


def modes_of(gpu: Gpu) -> dict[str, str]:
    """Compute mode -> why it cannot run on this GPU, or an empty string."""
    reasons = dict.fromkeys(MODES, "")
    for mode, least in (("bf16", (8, 0)), ("fp8", (8, 9)), ("fp4", (10, 0))):
        if getattr(gpu, mode):
            continue
        reasons[mode] = f"{gpu.name}'s {mode.upper()} rate is not known"
        if gpu.capability and gpu.capability < least:
            needed, found = (".".join(map(str, capability)) for capability in (least, gpu.capability))
            reasons[mode] = f"needs compute capability {needed}, {gpu.name}'s is {found}"
    return reasons


def step(model: Transformer, clip: Clip, gpu: Gpu, mode: str = "bf16", launch: str = GRAPHS) -> Step:
    """One denoising step at cfg 1. PackError: it cannot run.

    ``launch``: GRAPHS, or for a model without them the key of LAUNCH_SECONDS for its quantised Linears.
    """
    obstacle = modes_of(gpu)[mode] if gpu.known else f"bandwidth and BF16 rate of {gpu.name} are not known"
    if obstacle:
        raise PackError(f"no prediction for {mode} compute: {obstacle}")
    tokens = clip.tokens
    ours = any(one.stored == "NVFP4" for one in model.linears) and launch == GRAPHS
    fused = mode if ours and mode != "bf16" else ""  # in ``bf16`` attention is ComfyUI's, and so is what surrounds it
    kinds = [_linear(one, count, tokens[one.tokens], gpu, mode, fused == "fp8") for one, count in model.linears.items()]
    kinds += [_attend(*key, count, tokens, gpu, bool(fused)) for key, count in model.attention.items()]
    passes = 2.0 * model.blocks * model.width * _PASSES[fused]
    kinds.append(_move("norms, gates, GELU", passes * (tokens["video"] + tokens["audio"] / 2), gpu))
    work = _merge([one for one in kinds if one.nbytes])
    shares = dict.fromkeys(("math", "weights", "attention", "between"), 0.0)
    for one in work:
        shares[one.kind] += one.seconds
    on_gpu, on_cpu = sum(shares.values()), model.blocks * GRAPH_SECONDS_PER_BLOCK
    if launch != GRAPHS:
        on_cpu = model.blocks * OTHER_SECONDS_PER_BLOCK + sum(
            count * LAUNCH_SECONDS[launch if one.stored in QUANTISED else "BF16"]
            for one, count in model.linears.items()
            if tokens[one.tokens]
        )
    bound = _bound(shares) if on_gpu >= on_cpu else "bound by the CPU's launches"
    floor = sum(one.floor for one in work)
    return Step(mode, max(on_gpu, on_cpu), floor, on_gpu, on_cpu, shares, bound, tuple(work))


def _merge(kinds: list[Work]) -> list[Work]:
    """Work of one label and kind in one record, the longest first."""
    groups: dict[tuple[str, str], list[Work]] = {}
    for one in kinds:
        groups.setdefault((one.label, one.kind), []).append(one)
    sums = [
        Work(*key, *(sum(getattr(one, name) for one in group) for name in ("flops", "nbytes", "seconds", "floor")))
        for key, group in groups.items()
    ]
    return sorted(sums, key=lambda one: -one.seconds)


def _bound(shares: Mapping[str, float]) -> str:
    math, attention, memory = shares["math"], shares["attention"], shares["weights"] + shares["between"]
    if memory > max(math, attention):
        return "memory-bound"
    if min(math, attention) > 0.9 * max(math, attention):
        return "math-bound in Linears and attention-bound alike"
    return "math-bound in Linears" if math > attention else "attention-bound"


def stored_bytes(stored: str) -> float:
    """Format -> bytes a weight takes in a file, block scales included."""
    return _STORED_BYTES.get(stored, 2.0)


def multiplied_as(stored: str, mode: str) -> str:
    """Format of a stored weight, compute mode -> how its product is computed."""
    if mode == "bf16" or stored not in ("NVFP4", "FP8"):
        return "bf16"
    return "fp4" if mode == "fp4" and stored == "NVFP4" else "fp8"


def _linear(one: Linear, count: int, tokens: int, gpu: Gpu, mode: str, rows: bool) -> Work:
    """``rows``: the activations are among what is passed over between the products."""
    label = f"{one.tokens} {one.rows}x{one.cols}"
    if not tokens:
        return Work(label, "math", 0.0, 0.0, 0.0, 0.0)
    how = multiplied_as(one.stored, mode)
    size, weight = one.rows * one.cols, _MULTIPLIED_BYTES[how]
    flops = 2.0 * tokens * size
    stored = stored_bytes(one.stored)
    rewritten = size * (stored + weight) if stored != weight else 0.0
    activations = tokens * one.cols * (2.0 + weight) if how != "bf16" and not rows else 0.0
    product = size * weight + tokens * one.cols * weight + 2.0 * tokens * one.rows
    rate, bandwidth = getattr(gpu, how), gpu.bandwidth * BANDWIDTH_SHARE
    math, reading = flops / (rate * MATMUL_SHARE[how]), product / bandwidth
    seconds = max(math, reading) + (rewritten + activations) / bandwidth
    least = size * min(stored, weight) + tokens * (one.cols * (weight if rows else 2.0) + 2.0 * one.rows)
    floor = max(flops / rate, least / gpu.bandwidth)
    kind = "math" if math >= seconds / 2 else "weights"
    moved = product + rewritten + activations
    return Work(label, kind, flops * count, moved * count, seconds * count, floor * count)


def _attend(
    queries: str, keys: str, width: int, count: int, tokens: Mapping[str, int], gpu: Gpu, fastest: bool
) -> Work:
    rows, cols = tokens[queries], tokens[keys]
    flops, nbytes = 4.0 * rows * cols * width, 4.0 * width * (rows + cols) * bool(rows and cols)
    hopper = FASTEST_ATTENTION_SHARE_HOPPER if fastest else ATTENTION_SHARE_HOPPER
    share = hopper if gpu.capability == (9, 0) else ATTENTION_SHARE
    seconds = max(flops / (gpu.bf16 * share), nbytes / (gpu.bandwidth * BANDWIDTH_SHARE))
    floor = max(flops / gpu.bf16, nbytes / gpu.bandwidth)
    label = f"attention {queries} to {keys}"
    return Work(label, "attention", flops * count, nbytes * count, seconds * count, floor * count)


def _move(label: str, nbytes: float, gpu: Gpu) -> Work:
    # Fused without limit, all of this would vanish into the products, so its floor is 0.
    return Work(label, "between", nbytes, nbytes, nbytes / (gpu.bandwidth * BANDWIDTH_SHARE), 0.0)


def decode_work(gpu: Gpu, nbytes: float) -> Work:
    """One token that a text encoder of ``nbytes`` writes (prompt enhancer): every weight is read for it once."""
    flops = 2.0 * TEXT_ENCODER_PARAMETERS
    floor = max(flops / gpu.bf16, nbytes / gpu.bandwidth)
    return Work("text encoder, one token", "weights", flops, nbytes, floor / BANDWIDTH_SHARE, floor)


def prefill_seconds(gpu: Gpu, nbytes: float, prompt: int = TEXT_TOKENS) -> float:
    """Seconds at least for a prompt through the text encoder."""
    return max(2.0 * TEXT_ENCODER_PARAMETERS * prompt / gpu.bf16, nbytes / gpu.bandwidth)


def vae_decode(gpu: Gpu, clip: Clip) -> float:
    """Seconds at least for the video VAE's convolutions (LTX-2.3's shapes), at the BF16 peak rate."""
    return clip.tokens["video"] * VAE_FLOPS_PER_LATENT / gpu.bf16
