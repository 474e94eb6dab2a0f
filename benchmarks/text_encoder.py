# SPDX-License-Identifier: Apache-2.0
"""How fast does the prompt enhancer write? Tokens a second of a Gemma 3 12B in NVFP4, stock ComfyUI and ours.

usage: python benchmarks/text_encoder.py [--comfyui DIR] [--words N] [--tokens N] [--profile] [--scratch DIR]
       python benchmarks/text_encoder.py --tiny --cpu --tokens 24 --reps 1

The text encoder has the released shapes (48 blocks, 10.8 billion numbers in NVFP4 Linears, a BF16 embedding of 262,208
rows that is also the output matrix) and random weights; no vision tower. Every row goes through the host's own node,
Generate LTX2 Prompt, with its instructions before the prompt and sampling off (the likeliest token each time);
DynamicVRAM is on as ComfyUI's main.py sets it, and so is the Comfy Compiler where the host has one, unless --flags
says otherwise:

* stock        ComfyUI's load_clip
* eager        NVFP4TextEncoderLoader without graphs
* blocks       NVFP4TextEncoderLoader, ComfyUI's blocks replayed as CUDA graphs by the host's own machinery
* ours         the same with a block in few launches (benchmarks/one_token.py has each)

A token's time is that between two calls of the sampler, which waits for the GPU each time; medians leave out the first
tokens, in which graphs are captured. "floor" is what the bytes of a token take at the copy bandwidth of this run. The
compiler's breaks and rogues are those of one text; tokens are compared with stock's, or with the first row's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import common
import in_process as comfyui

BLOCKS = 48  # the host recognises a Gemma 3 12B by its 48th block
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
ROWS = {
    "stock": "stock NVFP4", "eager": "ours, without graphs", "blocks": "ours, ComfyUI's blocks", "ours": "ours",
}  # fmt: skip
MARKER = b'{"format": "nvfp4"}'
STOP, SETTLED = 106, 6
PROJECTION = {"video_aggregate_embed": 64, "audio_aggregate_embed": 32}
STARTED = time.perf_counter()


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the text encoder; the defaults are the released ones."""

    hidden: int = 3840
    intermediate: int = 15360
    inner: int = 4096
    kv: int = 2048
    head: int = 256
    vocabulary: int = 262208

    def linears(self) -> dict[str, tuple[int, int]]:
        """The NVFP4 Linears of a block."""
        return {
            "self_attn.q_proj": (self.inner, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.inner),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


def write_files(folder: Path, sizes: Sizes, tokenizer: bytes, pieces: int) -> tuple[Path, Path, int]:
    """Write text encoder and projection -> (their paths, bytes of weights that a token reads).

    Only the ``pieces`` of ``tokenizer`` are ever written: the logits of all others are 0, never the largest.
    """
    import torch
    from nvfp4_video.checkpoint.file.container import PlannedTensor, write_checkpoint
    from nvfp4_video.kernels.format import block_scale_shape, packed_shape

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(shape: tuple[int, ...], gain: float) -> Any:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * gain

    def embedding() -> Any:
        rows = normal((sizes.vocabulary, sizes.hidden), 0.02)
        rows[pieces:] = 0
        rows[STOP] = 0  # no row stops early
        return rows

    def codes(shape: tuple[int, int]) -> Any:
        return torch.randint(0, 256, packed_shape(shape), dtype=torch.uint8, device=device)

    def scales(shape: tuple[int, int]) -> Any:
        values = torch.randint(0x30, 0x40, block_scale_shape(shape), dtype=torch.uint8, device=device)  # 0.5 to 1.875
        return values.view(torch.float8_e4m3fn)

    def global_scale(shape: tuple[int, int]) -> Any:
        return torch.tensor(0.25 * shape[1] ** -0.5)

    plan, read = [], sizes.vocabulary * sizes.hidden * 2
    for block in range(BLOCKS):
        layer = f"model.layers.{block}."
        norms = dict.fromkeys(NORMS, sizes.hidden)
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), sizes.head)
        for name, size in norms.items():
            produce = functools.partial(normal, (size,), 0.1)
            plan.append(PlannedTensor(f"{layer}{name}.weight", "BF16", (size,), produce))
        for name, shape in sizes.linears().items():
            parts = (
                ("weight_scale_2", "F32", (), global_scale),
                ("weight_scale", "F8_E4M3", block_scale_shape(shape), scales),
                ("weight", "U8", packed_shape(shape), codes),
            )
            for part, dtype, size, produce in parts:
                made = functools.partial(produce, shape)
                plan.append(PlannedTensor(f"{layer}{name}.{part}", dtype, size, made))
                read += plan[-1].nbytes
            marker = torch.tensor(list(MARKER), dtype=torch.uint8)
            plan.append(PlannedTensor(f"{layer}{name}.comfy_quant", "U8", (len(MARKER),), lambda m=marker: m))
    plan.append(PlannedTensor("model.norm.weight", "BF16", (sizes.hidden,), lambda: normal((sizes.hidden,), 0.1)))
    rows = (sizes.vocabulary, sizes.hidden)
    plan.append(PlannedTensor("model.embed_tokens.weight", "BF16", rows, embedding))
    spiece = torch.tensor(list(tokenizer), dtype=torch.uint8)
    plan.append(PlannedTensor("spiece_model", "U8", (len(tokenizer),), lambda: spiece))
    order = {"F32": 0, "BF16": 1, "F8_E4M3": 2, "U8": 3}
    plan.sort(key=lambda tensor: (tensor.name.endswith(("comfy_quant", "spiece_model")), order[tensor.dtype]))
    write_checkpoint(folder / "gemma.safetensors", plan, {})
    columns, plan = sizes.hidden * (BLOCKS + 1), []
    for name, width in PROJECTION.items():
        for suffix, shape in (("weight", (width, columns)), ("bias", (width,))):
            key = f"text_embedding_projection.{name}.{suffix}"
            plan.append(PlannedTensor(key, "BF16", shape, functools.partial(normal, shape, 0.002)))
    write_checkpoint(folder / "projection.safetensors", plan, {})
    return folder / "gemma.safetensors", folder / "projection.safetensors", read


def load_row(row: str, gemma: Path, projection: Path, backend: str) -> Any:
    """One row's CLIP, loaded as a user of it would."""
    if row == "stock":
        import comfy.sd

        return comfy.sd.load_clip([str(gemma), str(projection)], clip_type=comfy.sd.CLIPType.LTXV)
    from nvfp4_video.host.compute import token_block
    from nvfp4_video.host.load.text_encoder import load_text_encoder

    apart = mock.patch.object(token_block, "obstacle", lambda *_: "as this benchmark wants it")
    with apart if row == "blocks" else contextlib.nullcontext():
        clip, report = load_text_encoder(str(gemma), str(projection), backend=backend, graphs=row != "eager")
    say(str(report))
    return clip


class Stamps:
    """Wraps the sampler of one CLIP while the body runs: the time of each call, and the logits of the first ones.

    ``actions``: what to do at the n-th call, before the token is drawn.
    """

    def __init__(self, clip: Any, actions: Mapping[int, Callable[[], Any]], keep: int = 4):
        self.transformer = clip.cond_stage_model.gemma3_12b.transformer
        self.actions, self.keep = actions, keep
        self.times: list[float] = []
        self.logits: list[Any] = []

    def __enter__(self) -> Stamps:
        sample = self.transformer.sample_token

        def stamped(logits: Any, *args: Any, **kwargs: Any) -> Any:
            self.times.append(time.perf_counter())
            if len(self.times) in self.actions:
                self.actions[len(self.times)]()
            if len(self.logits) < self.keep:
                self.logits.append(logits.float().clone())
            return sample(logits, *args, **kwargs)

        self.transformer.sample_token = stamped
        return self

    def __exit__(self, *_: object) -> None:
        del self.transformer.sample_token


@dataclass(frozen=True)
class Text:
    """One run of the host's node."""

    tokens: list[int]
    prompt: int
    stamps: Stamps
    start: float
    end: float
    host: Mapping[str, int]


def generate(clip: Any, words: str, count: int, actions: Mapping[int, Callable] | None = None) -> Text:
    """What the host's node makes of a prompt, ``count`` tokens of it."""
    from comfy_extras.nodes_textgen import TextGenerateLTX2Prompt

    loop, seen = clip.generate, []

    def recorded(tokens: Mapping[str, Any], **options: Any) -> list[int]:
        seen.extend((len(next(iter(tokens.values()))[0]), loop(tokens, **options)))
        return seen[1]

    clip.generate = recorded
    try:
        with Stamps(clip, actions or {}) as stamps:
            start = time.perf_counter()
            TextGenerateLTX2Prompt.execute(clip, words, count, {"sampling_mode": "off"})
            end = time.perf_counter()
    finally:
        del clip.generate
    found = host_counts(clip)
    comfyui.end_of_node()
    return Text(seen[1], seen[0], stamps, start, end, found)


def host_counts(clip: Any) -> dict[str, int]:
    """Blocks that the host replays as graphs, and what its compiler counts, before the end of a node clears both."""
    layers = clip.cond_stage_model.gemma3_12b.transformer.model.layers
    found = {"blocks as graphs": sum(hasattr(layer, "_comfy_graph") for layer in layers)}
    prefetch = comfyui.session.prefetch()
    if hasattr(prefetch, "MALLOC_GRAPHS"):
        rogues = sum(graph.rogue_count for graph in prefetch.MALLOC_GRAPHS.values())
        found |= {"breaks": prefetch.MALLOC_GRAPH_BREAKS, "rogues": prefetch.MALLOC_GRAPH_ROGUES + rogues}
    return found


def compiler_is_on(device: Any) -> bool | None:
    """Whether the host's compiler records the token loop; None where the host has none."""
    enabled = getattr(comfyui.session.prefetch(), "malloc_graph_enabled", None)
    return None if enabled is None else bool(enabled(device))


def measure(row: str, clip: Any, options: Namespace, words: str) -> tuple[dict[str, Any], list[int], list]:
    """Table row, tokens and first logits of one CLIP: the first run is cold, the others are timed."""
    import torch

    first = generate(clip, words, 4)
    prefill, each, whole = [], [], []
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.reps):
        text = generate(clip, words, options.tokens)
        times, seconds = text.stamps.times, text.end - text.start
        prefill.append(times[0] - text.start)
        each.append([b - a for a, b in zip(times, times[1:], strict=False)][SETTLED:])
        whole.append(len(text.tokens) / seconds)
        say(
            f"{ROWS[row]}: {len(text.tokens)} tokens after {text.prompt} in {seconds:.2f} s, "
            f"{statistics.median(each[-1]) * 1e3:.2f} ms a token; {dict(text.host)}"
        )
    medians = [statistics.median(run) for run in each]
    found = {"row": ROWS[row], "ms a token": min(medians) * 1e3, "tokens/s": 1 / min(medians)}
    found |= {"with prompt and capture, tokens/s": max(whole), "prompt s": min(prefill)}
    found |= {"first run s": first.end - first.start, "prompt": text.prompt, **text.host}
    if not options.cpu:
        found["torch peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found, text.tokens, text.stamps.logits


def agreement(stock: tuple[list[int], list], ours: tuple[list[int], list]) -> dict[str, Any]:
    """Leading equal tokens, and the relative difference of the logits while the tokens before them are the same."""
    same = next((i for i, (a, b) in enumerate(zip(stock[0], ours[0], strict=False)) if a != b), len(stock[0]))
    pairs = list(zip(stock[1], ours[1], strict=False))[: same + 1]
    differences = [float((a - b).norm() / a.norm()) for a, b in pairs]
    finite = all(bool(b.isfinite().all()) for _, b in pairs)
    return {"equal tokens": same, "of": len(stock[0]), "logits differ by": differences, "finite": finite}


def profile(row: str, clip: Any, words: str, count: int = 3) -> dict[str, Any]:
    """Print what a token's time goes to, graphs captured before: kernels of the GPU, calls of the CPU."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    cuda = torch.cuda.is_available()
    profiler = profiled(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda])
    generate(clip, words, SETTLED + count + 2, actions={SETTLED: profiler.start, SETTLED + count: profiler.stop})
    events = profiler.key_averages()
    found: dict[str, Any] = {}
    for side, attribute in (("GPU", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        # Operators that no graph holds have the time of their kernels too: each kernel counts once, as itself.
        own = [event for event in events if (event.device_type != DeviceType.CPU) == (side == "GPU")]
        ranked = sorted(own, key=lambda event: -getattr(event, attribute))
        total = sum(getattr(event, attribute) for event in own) / 1e3 / count
        calls = sum(event.count for event in own if getattr(event, attribute)) / count
        say(f"{ROWS[row]}: {total:.2f} ms of {side} time a token in {calls:.0f} calls, under the profiler")
        found[side] = {"ms": total, "calls": calls, "top": []}
        for event in ranked[:8]:
            ms, name = getattr(event, attribute) / 1e3 / count, event.key[:90]
            found[side]["top"].append([name, ms, event.count / count])
            print(f"  {ms:7.3f} ms  {event.count / count:7.1f} x  {name}", flush=True)
    return found


def parse() -> Namespace:
    """The command line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="checkout; default $COMFYUI_PATH")
    parser.add_argument("--words", type=int, default=60, help="words of the prompt; default %(default)s")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to write; default %(default)s")
    parser.add_argument("--reps", type=int, default=2, help="timed runs of each row; default %(default)s")
    parser.add_argument("--rows", default="stock,eager,ours", help="default %(default)s")
    parser.add_argument("--backend", default="auto", help="backend of ours; default auto")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 9 GB free; default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="the scaled-down model of the tests")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU; nothing is saved without --out")
    parser.add_argument("--no-dynamic", action="store_true", help="leave DynamicVRAM off")
    parser.add_argument("--profile", action="store_true", help="also what the time goes to, by torch.profiler")
    parser.add_argument("--flags", default="", help="more of ComfyUI's own flags, separated by spaces")
    options = parser.parse_args()
    if unknown := {*options.rows.split(",")} - {*ROWS}:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; expected some of {', '.join(ROWS)}")
    if options.tokens <= SETTLED + 1:
        parser.error(f"--tokens {options.tokens}: expected more than {SETTLED + 1}, the first ones are not timed")
    return options


def main() -> None:
    options = parse()
    found, flags = comfyui.begin(options), options.flags.split() + ["--cpu"] * options.cpu
    import torch
    from nvfp4_video.tests.real import small_gemma

    sizes = Sizes()
    if options.tiny:
        small = small_gemma
        sizes = Sizes(small.HIDDEN, 128, small.HEADS * small.HEAD_DIM, small.KV_HEADS * small.HEAD_DIM, small.HEAD_DIM)
        sizes = replace(sizes, vocabulary=small.VOCABULARY)
        small.shrink()
    words = (small_gemma.PROMPT.split() * options.words)[: options.words]
    outputs, by_row = {}, {}
    result: dict[str, Any] = {"facts": found, "tokens": options.tokens, "flags": flags, "tiny": options.tiny}
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        tokenizer, pieces = small_gemma.tokenizer_bytes(), small_gemma.VOCABULARY
        gemma, projection, read = write_files(Path(folder), sizes, tokenizer, pieces)
        floor = read / (1e10 if options.cpu else common.copy_bandwidth())
        if not options.cpu:
            torch.cuda.empty_cache()
        say(f"wrote {gemma.stat().st_size / 1e9:.2f} GB; a token reads {read / 1e9:.2f} GB, floor {floor * 1e3:.2f} ms")
        for row in options.rows.split(","):
            clip = load_row(row, gemma, projection, options.backend)
            result["compiler"] = compiler_is_on(clip.patcher.load_device)
            measured, *outputs[row] = measure(row, clip, options, " ".join(words))
            measured |= {"x floor": measured["ms a token"] / floor / 1e3, "DynamicVRAM": clip.patcher.is_dynamic()}
            by_row[row] = measured
            if options.profile:
                result.setdefault("profile", {})[row] = profile(row, clip, " ".join(words))
            del clip
            import comfy.model_management

            comfy.model_management.unload_all_models()
    first = "stock" if "stock" in outputs else next(iter(outputs))
    for row, measured in by_row.items():
        if "stock" in by_row:
            measured["x stock's speed"] = by_row["stock"]["ms a token"] / measured["ms a token"]
        if row != first:
            result.setdefault("agreement", {})[f"{row} against {first}"] = agreement(outputs[first], outputs[row])
    rows, whole = [*by_row.values()], ("row", "DynamicVRAM", "prompt", "blocks as graphs", "breaks", "rogues")
    common.print_table(rows, {name: ".2f" for name in rows[0] if name not in whole})
    state = {None: "this ComfyUI has none", True: "on", False: "off"}[result["compiler"]]
    print(f"Comfy Compiler: {state}")
    for pair, facts in result.get("agreement", {}).items():
        print(f"{pair}: {facts}")
    result |= {"rows": rows, "floor_ms": floor * 1e3, "bytes_a_token": read}
    comfyui.save("text_encoder", options, result)


if __name__ == "__main__":
    main()
