# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint lies in GPU memory when, and whether it fits.

A render has three phases, and ComfyUI moves a model out only when the next one needs the room:

    encode   text encoder, text projection   working memory: the host's 3 MiB a token
    sample   diffusion model                 2 bytes x video tokens x (FF width + 3 x width), and one rewritten layer
    decode   video VAE, audio VAE            the host's 2,400 bytes x 512 a latent position (LTX-2.5: 3,400)

The host's figures are what ComfyUI 0.33 frees before it starts (comfy/text_encoders/lt.py, comfy/sd.py): upper limits,
since the VAE decodes in chunks. The one for sampling was compared with an H200 (benchmarks/results/step.json, 14,080
tokens): 0.807 GB against 0.807 measured for BF16, 0.942 against 0.970 for NVFP4. On top comes what the host always
keeps free, 0.8 GiB + 400 MiB. Not counted: LoRA, guides, other programs, batch sizes above 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .gpus import Gpu
from .roofline import QUANTISED, Clip, Transformer, multiplied_as
from .text import gb

ENCODE, SAMPLE, DECODE = "encode", "sample", "decode"
RESIDENT, SWAPPING, STREAMING, TOO_LARGE = "resident", "swapping", "streaming", "too large"
RESERVE = 0.8 * 2**30 + 400 * 2**20
# Bytes of what a file may lack: the article's text encoder (gemma_3_12B_it_fp4_mixed), LTX-2.3's other parts in BF16.
TEXT_ENCODER = "text_encoder"
ASSUMED = {
    TEXT_ENCODER: 9_000_000_000,
    "text_projection": 2 * 188_160 * (4096 + 2048),
    "video_vae": 1_452_212_450,
    "audio_vae": 364_000_000,
}
PHASES = {
    ENCODE: (TEXT_ENCODER, "text_projection"),
    SAMPLE: ("diffusion_model",),
    DECODE: ("video_vae", "audio_vae"),
}
_COUNTED = {part for parts in PHASES.values() for part in parts}
_ENCODE_BYTES_PER_TOKEN = 3 * 2**20
_DECODE_BYTES_PER_LATENT = {"2.5": 1700 * 512 * 2, "": 1200 * 512 * 2}
# PCIe 4.0 x16: 16 GT/s x 16 lanes x 128/130.
PCIE_BANDWIDTH = 31.5e9


@dataclass(frozen=True)
class Phase:
    """One phase: bytes of its own weights, of its working memory, and whether it fits by itself or beside the rest."""

    name: str
    weights: float
    working: float
    alone: bool
    beside_the_rest: bool

    @property
    def needs(self) -> float:
        """Bytes that the phase needs by itself."""
        return self.weights + self.working + RESERVE


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a GPU for a clip.

    ``sizes``: component -> bytes; ``assumed``: those that the file lacks. ``verdict``: ``resident`` all weights are on
    the GPU while it samples; ``swapping`` each phase fits once the others' weights have left; ``streaming`` the
    diffusion model does not, ``streamed`` bytes of it cross the bus in every step; ``too large`` nothing helps.
    ``with_page_cache``: on unified memory, bytes in use right after loading, when the file's pages are still cached.
    """

    memory: float
    unified: bool
    sizes: Mapping[str, float]
    assumed: tuple[str, ...]
    phases: tuple[Phase, ...]
    verdict: str
    streamed: float
    tiled_decode: bool
    with_page_cache: float | None

    @property
    def total(self) -> float:
        """Bytes of all weights."""
        return sum(self.sizes.values())

    @property
    def stream_seconds(self) -> float:
        """Seconds a step needs at least to move what does not fit, over PCIe 4.0 x16."""
        return self.streamed / PCIE_BANDWIDTH

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"total": self.total, "stream_seconds": self.stream_seconds}


def sampling_bytes(model: Transformer, clip: Clip, mode: str = "bf16") -> float:
    """Working memory of a denoising step: activations of the widest place, and the largest rewritten weight."""
    wide = max((one.rows for one in model.linears if one.label.startswith("ff.")), default=4 * model.width)
    activations = 2.0 * clip.tokens["video"] * (wide + 3 * model.width)
    size = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.0}
    rewritten = [
        one.rows * one.cols * size[how]
        for one in model.linears
        if one.stored in QUANTISED and (how := multiplied_as(one.stored, mode))
    ]
    return activations + max(rewritten, default=0.0)


def decode_bytes(clip: Clip, version: str = "") -> float:
    """What ComfyUI frees before it decodes the whole clip at once."""
    return clip.tokens["video"] * float(_DECODE_BYTES_PER_LATENT.get(version, _DECODE_BYTES_PER_LATENT[""]))


def fit(
    sizes: Mapping[str, float], clip: Clip, gpu: Gpu, *, model: Transformer | None = None, mode: str = "bf16",
    text_encoder: float | None = None, vae_version: str = "",
) -> Fit:  # fmt: skip
    """Component -> bytes in the file, clip, GPU -> Fit. ``model`` None: its working memory counts as nothing.

    ``text_encoder``: its bytes, by default the article's 9 GB. Components that the file lacks are assumed.
    """
    have = {name: float(size) for name, size in sizes.items() if size and name in _COUNTED}
    if text_encoder:
        have[TEXT_ENCODER] = float(text_encoder)
    assumed = tuple(name for name in ASSUMED if name not in have)
    have |= {name: float(ASSUMED[name]) for name in assumed}
    working = {
        ENCODE: clip.text_tokens * float(_ENCODE_BYTES_PER_TOKEN),
        SAMPLE: sampling_bytes(model, clip, mode) if model else 0.0,
        DECODE: decode_bytes(clip, vae_version),
    }
    total, phases = sum(have.values()), []
    for name, parts in PHASES.items():
        weights = sum(have.get(part, 0.0) for part in parts)
        alone = weights + working[name] + RESERVE <= gpu.memory
        phases.append(Phase(name, weights, working[name], alone, total + working[name] + RESERVE <= gpu.memory))
    encode, sample, decode = phases
    room = gpu.memory - sample.working - RESERVE
    streamed = max(sample.weights - room, 0.0)
    if room <= 0:
        verdict = TOO_LARGE
    elif streamed:
        verdict = STREAMING
    else:
        verdict = RESIDENT if sample.beside_the_rest else SWAPPING
    if gpu.unified and verdict in (STREAMING, SWAPPING):
        # There is no other memory to move weights to: what does not fit is read from the disk again.
        verdict = TOO_LARGE if streamed or not encode.alone else SWAPPING
    cached = total + sum(float(size) for size in sizes.values()) + sample.working + RESERVE if gpu.unified else None
    return Fit(gpu.memory, gpu.unified, have, assumed, tuple(phases), verdict, streamed, not decode.alone, cached)


def advice(found: Fit) -> list[str]:
    """Fit -> what to do about it, in sentences: launch flags and nodes."""
    encode, sample, decode = found.phases
    lines = []
    if found.verdict == RESIDENT:
        again = "" if encode.beside_the_rest and decode.beside_the_rest else " while it samples"
        lines.append(f"launch flags: none. All weights are in GPU memory at once{again}.")
    elif found.verdict == SWAPPING and found.unified:
        lines.append("launch flags: none. Parts are dropped between the phases and read from the disk again.")
    elif found.verdict == SWAPPING:
        lines.append(
            f"launch flags: none. ComfyUI moves whole models between the phases; keep {gb(found.total)} of RAM free. "
            "`--highvram` and `--gpu-only` would run out of memory."
        )
    elif found.verdict == STREAMING:
        lines.append(
            f"launch flags: none, and not `--disable-dynamic-vram`. {gb(found.streamed)} of the diffusion model cross "
            f"the bus in every step: {found.stream_seconds:.2f} s at least over PCIe 4.0 x16. "
            "`--highvram` and `--gpu-only` would run out of memory."
        )
    else:
        lines.append("no launch flag makes this fit: take fewer frames, a smaller size or a smaller format.")
    if not encode.alone and not found.unified:
        lines.append("the text encoder does not fit by itself: part of it is streamed, or choose `cpu` in its loader.")
    if found.tiled_decode:
        lines.append(f"use VAE Decode (Tiled): a decode in one piece reserves {gb(decode.working)}.")
    crowded = [one for one in (encode, decode) if one.alone and not one.beside_the_rest and sample.beside_the_rest]
    for one in crowded:
        avoid = "; VAE Decode (Tiled) avoids that" if one is decode else ""
        lines.append(
            f"to {one.name}, ComfyUI reserves {gb(one.working)}, more than is left beside all weights: it moves a "
            f"model out and back, which takes time but no flag{avoid}."
        )
    if found.with_page_cache is not None:
        beyond = found.with_page_cache > found.memory
        lines.append(
            f"unified memory: right after loading, the file's cached pages count as used, "
            f"{gb(found.with_page_cache)} in all{', more than there is' if beyond else ''}. Linux gives them back "
            "under pressure, but CUDA reports them as used, so ComfyUI sees too little free memory."
        )
    return lines
