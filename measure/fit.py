# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint lies in GPU memory when, and whether it fits: as ComfyUI 0.33 and newer do it.

A render has three phases, and a model leaves GPU memory only when the next one needs the room:

    encode   text encoder, text projection   working memory: the host's 3 MiB a token
    sample   diffusion model                 2 bytes x video tokens x (FF width + 3 x width), and one rewritten layer
    decode   video VAE, audio VAE            chunks of time: DECODE_CHUNKS times the host's chunk, or one frame's size

What does not fit of a model stays in system memory and crosses the bus when it is used, with DynamicVRAM and without: a
diffusion model is resident, partly resident, or streamed whole. The text encoder streams alike, once a prompt.

The working memory of sampling was compared with an H200 (benchmarks/results/step.json, 14,080 tokens): 0.807 GB against
0.807 measured for BF16, 0.942 against 0.970 for NVFP4. That of the text encoder is the host's own upper limit
(comfy/text_encoders/lt.py).

The host decodes LTX-2.x in chunks (comfy/ldm/lightricks/vae/causal_video_autoencoder.py: 32 MiB on cards of 6 GiB, 128
MiB from 24 GiB on, one frame at least) into system memory. The 2,400 bytes x 512 a latent position of comfy/sd.py only
decide what leaves GPU memory before; that much is not needed. DECODE_CHUNKS is 7.04 GB, the peak of 768x512 on an H200
(benchmarks/results/decode.json), over its 128 MiB; smaller cards were not measured. If memory runs out all the same,
plain VAE Decode goes on in tiles by itself. LTX-2.5's decoder has no such chunks: the host's figure (3,400 bytes x 512)
counts, and plain VAE Decode falls back the same way.

On top comes what the host always keeps free: 400 MiB, and 0.8 GiB if the working memory is less. Not counted: LoRA,
guides, other programs, batch sizes above 1, Windows' 200 to 300 MiB more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .gpus import Gpu
from .roofline import QUANTISED, Clip, Transformer, multiplied_as
from .text import gib

ENCODE, SAMPLE, DECODE = "encode", "sample", "decode"
RESIDENT, SWAPPING, PARTLY, STREAMING, TOO_LARGE = "resident", "swapping", "partly resident", "streaming", "too large"
_ALWAYS_FREE, _LEAST_WORKING = 400.0 * 2**20, 0.8 * 2**30
# A model of which less than this share stays is called streamed whole.
_NEXT_TO_NOTHING = 0.05
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
# LTX-2.3's decoder ends at a quarter of the size with 128 channels of 2 bytes; its chunks, by GPU memory.
_DECODED_BYTES_PER_PIXEL = 128 * 2 / 16
_CHUNKS = ((6 * 2.0**30, 32 * 2.0**20), (24 * 2.0**30, 128 * 2.0**20))
DECODE_CHUNKS = 7_038_002_323 / (128 * 2**20)
_DECODE_BYTES_PER_LATENT_25 = 1700 * 512 * 2
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
    def free(self) -> float:
        """Bytes that the host keeps free beside the working memory."""
        return kept_free(self.working)

    @property
    def needs(self) -> float:
        """Bytes that the phase needs by itself."""
        return self.weights + self.working + self.free


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a GPU for a clip.

    ``sizes``: component -> bytes; ``assumed``: those that the file lacks. ``verdict``: ``resident`` all weights are on
    the GPU while it samples; ``swapping`` the diffusion model does once the others' have left; ``partly resident`` the
    diffusion model does not, ``streamed`` bytes of it cross the bus in every step; ``streaming`` all of it does;
    ``too large`` the working memory itself does not fit.
    ``with_page_cache``: on unified memory, bytes in use right after loading, when the file's pages are still cached.
    """

    memory: float
    unified: bool
    sizes: Mapping[str, float]
    assumed: tuple[str, ...]
    phases: tuple[Phase, ...]
    verdict: str
    streamed: float
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


def kept_free(working: float) -> float:
    """Bytes that the host keeps free beside a phase's working memory."""
    return _ALWAYS_FREE + max(_LEAST_WORKING - working, 0.0)


def decode_bytes(clip: Clip, memory: float, version: str = "") -> float:
    """Working memory of a decode of the whole clip on a GPU with so many bytes."""
    if version == "2.5":
        return clip.tokens["video"] * float(_DECODE_BYTES_PER_LATENT_25)
    (least, small), (most, large) = _CHUNKS
    share = min(max((memory - least) / (most - least), 0.0), 1.0)
    frame = clip.width * clip.height * _DECODED_BYTES_PER_PIXEL
    return DECODE_CHUNKS * max(small + share * (large - small), frame)


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
    # LTX is computed in BF16, or in FP32 where a GPU has no BF16 (comfy.supported_models.LTXV, unet_manual_cast).
    wider = 2.0 if gpu.capability and gpu.capability < (8, 0) else 1.0
    working = {
        ENCODE: clip.text_tokens * float(_ENCODE_BYTES_PER_TOKEN),
        SAMPLE: wider * sampling_bytes(model, clip, mode) if model else 0.0,
        DECODE: decode_bytes(clip, gpu.memory, vae_version),
    }
    total, phases = sum(have.values()), []
    for name, parts in PHASES.items():
        weights = sum(have.get(part, 0.0) for part in parts)
        needs = working[name] + kept_free(working[name])
        phases.append(Phase(name, weights, working[name], weights + needs <= gpu.memory, total + needs <= gpu.memory))
    encode, sample, _ = phases
    room = gpu.memory - sample.working - sample.free
    streamed = min(max(sample.weights - room, 0.0), sample.weights)
    if gpu.memory < sample.working + _ALWAYS_FREE:
        verdict = TOO_LARGE
    elif streamed:
        verdict = STREAMING if sample.weights - streamed < _NEXT_TO_NOTHING * sample.weights else PARTLY
    else:
        verdict = RESIDENT if sample.beside_the_rest else SWAPPING
    if gpu.unified and verdict != RESIDENT:
        # There is no other memory to move weights to: what does not fit is read from the disk again.
        verdict = SWAPPING if verdict == SWAPPING and encode.alone else TOO_LARGE
    in_file = sum(float(size) for size in sizes.values())
    cached = total + in_file + sample.working + sample.free if gpu.unified else None
    return Fit(gpu.memory, gpu.unified, have, assumed, tuple(phases), verdict, streamed, cached)


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
            f"launch flags: none. ComfyUI moves whole models between the phases; keep {gib(found.total)} of RAM free. "
            "`--highvram` and `--gpu-only` would run out of memory."
        )
    elif found.verdict in (PARTLY, STREAMING):
        stays = sample.weights - found.streamed
        what = f"{gib(stays)} of the diffusion model stay on the GPU, {gib(found.streamed)} cross"
        if found.verdict == STREAMING:
            what = f"the diffusion model, {gib(found.streamed)}, crosses"
        lines.append(
            f"launch flags: none, and not `--disable-dynamic-vram`. {what[0].upper()}{what[1:]} the bus in every step: "
            f"{found.stream_seconds:.2f} s at least over PCIe 4.0 x16. Keep {gib(found.total)} of RAM free. "
            "`--highvram` and `--gpu-only` would run out of memory."
        )
    else:
        lines.append("no launch flag makes this fit: take fewer frames, a smaller size or a smaller format.")
    if not encode.alone and not found.unified:
        lines.append("the text encoder does not fit by itself: part of it is streamed, or choose `cpu` in its loader.")
    if not decode.alone:
        lines.append(
            f"VAE Decode is the node to use: in one go it takes about {gib(decode.needs)}, and it goes on in tiles "
            "by itself when memory runs out."
        )
    for one in (encode, decode):
        if one.alone and not one.beside_the_rest and found.verdict == RESIDENT:
            lines.append(
                f"to {one.name}, {gib(one.needs)} are needed, more than is left beside all weights: some leave GPU "
                "memory and come back, which takes time but no flag."
            )
    if found.with_page_cache is not None:
        beyond = found.with_page_cache > found.memory
        lines.append(
            f"unified memory: right after loading, the file's cached pages count as used, "
            f"{gib(found.with_page_cache)} in all{', more than there is' if beyond else ''}. Linux gives them back "
            "under pressure, but CUDA reports them as used, so ComfyUI sees too little free memory."
        )
    return lines
