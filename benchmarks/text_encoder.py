"""How fast does the prompt enhancer write? Tokens a second of a Gemma 3 12B in NVFP4, stock ComfyUI and ours.

usage: python benchmarks/text_encoder.py [--comfyui DIR] [--prompt N] [--tokens N] [--profile] [--scratch DIR]

The text encoder has the released shapes (48 blocks, 10.8 billion numbers in NVFP4 Linears, a BF16 embedding of 262,208
rows that is also the output matrix) and random weights; no vision tower. Every row goes through the host's own
CLIP.generate, one sequence, the likeliest token each time, DynamicVRAM on as ComfyUI's main.py sets it:

* stock        ComfyUI's load_clip
* ours         NVFP4TextEncoderLoader, blocks replayed as CUDA graphs by the host's own machinery
* ours, eager  the same without graphs

A token's time is that between two calls of the sampler, which waits for the GPU each time; medians leave out the first
tokens, in which graphs are captured. "floor" is what the bytes of a token take at the copy bandwidth of this run.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import in_process as comfyui

BLOCKS = 48  # the host recognises a Gemma 3 12B by its 48th block
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
ROWS = {"stock": "stock NVFP4", "ours": "ours", "eager": "ours, without graphs"}
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


def write_files(folder: Path, sizes: Sizes, tokenizer: bytes) -> tuple[Path, Path, int]:
    """Write text encoder and projection -> (their paths, bytes of weights that a token reads)."""
    import torch
    from nvfp4_video.checkpoint.file.container import PlannedTensor, write_checkpoint
    from nvfp4_video.kernels.format import block_scale_shape, packed_shape

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(shape: tuple[int, ...], gain: float) -> Any:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * gain

    def embedding() -> Any:
        rows = normal((sizes.vocabulary, sizes.hidden), 0.02)
        rows[STOP] = 0  # its logit is 0, never the largest: no row stops early
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
    from nvfp4_video.host.text_encoder import load_text_encoder

    clip, report = load_text_encoder(str(gemma), str(projection), backend=backend, graphs=row == "ours")
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


def generate(
    clip: Any, ids: list[int], count: int, actions: Mapping[int, Callable] | None = None
) -> tuple[list[int], Stamps, float]:
    """Tokens, stamps and seconds of one run of the host's token loop on a prompt of ``ids``."""
    with Stamps(clip, actions or {}) as stamps:
        start = time.perf_counter()
        tokens = clip.generate({"gemma3_12b": [[(i, 1.0) for i in ids]]}, do_sample=False, max_length=count, seed=0)
        end = time.perf_counter()
    comfyui.end_of_node()
    return tokens, stamps, end - start


def measure(row: str, clip: Any, options: Namespace, ids: list[int]) -> tuple[dict[str, Any], list[int], list]:
    """Table row, tokens and first logits of one CLIP: the first run is cold, the others are timed."""
    import torch

    _, stamps, cold = generate(clip, ids, 4)
    prefill, each, whole = [], [], []
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.reps):
        start = time.perf_counter()
        tokens, stamps, seconds = generate(clip, ids, options.tokens)
        prefill.append(stamps.times[0] - start)
        each.append([b - a for a, b in zip(stamps.times, stamps.times[1:], strict=False)][SETTLED:])
        whole.append(len(tokens) / seconds)
        say(f"{ROWS[row]}: {len(tokens)} tokens in {seconds:.2f} s, {statistics.median(each[-1]) * 1e3:.2f} ms a token")
    medians = [statistics.median(run) for run in each]
    found = {"row": ROWS[row], "ms a token": min(medians) * 1e3, "tokens/s": 1 / min(medians)}
    found |= {"with prompt and capture, tokens/s": max(whole), "prompt s": min(prefill), "first run s": cold}
    if not options.cpu:
        found["torch peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found, tokens, stamps.logits


def agreement(stock: tuple[list[int], list], ours: tuple[list[int], list]) -> dict[str, Any]:
    """Leading equal tokens, and the relative difference of the logits while the tokens before them are the same."""
    same = next((i for i, (a, b) in enumerate(zip(stock[0], ours[0], strict=False)) if a != b), len(stock[0]))
    pairs = list(zip(stock[1], ours[1], strict=False))[: same + 1]
    differences = [float((a - b).norm() / a.norm()) for a, b in pairs]
    finite = all(bool(b.isfinite().all()) for _, b in pairs)
    return {"equal tokens": same, "of": len(stock[0]), "logits differ by": differences, "finite": finite}


def profile(row: str, clip: Any, ids: list[int], count: int = 3) -> dict[str, Any]:
    """Print what a token's time goes to, graphs captured before: kernels of the GPU, calls of the CPU."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    cuda = torch.cuda.is_available()
    profiler = profiled(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda])
    generate(clip, ids, SETTLED + count + 2, actions={SETTLED: profiler.start, SETTLED + count: profiler.stop})
    events = profiler.key_averages()
    found: dict[str, Any] = {}
    for side, attribute in (("GPU", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        ranked = sorted(events, key=lambda event: -getattr(event, attribute))
        total = sum(getattr(event, attribute) for event in events) / 1e3 / count
        calls = sum(event.count for event in events if getattr(event, attribute)) / count
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
    parser.add_argument("--prompt", type=int, default=1280, help="tokens of the prompt; default %(default)s")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to write; default %(default)s")
    parser.add_argument("--reps", type=int, default=2, help="timed runs of each row; default %(default)s")
    parser.add_argument("--rows", default="stock,eager,ours", help="default %(default)s")
    parser.add_argument("--backend", default="auto", help="backend of ours; default auto")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="folder with 9 GB free; default %(default)s")
    parser.add_argument("--cpu", action="store_true", help="a tiny one on the CPU, saved to --out only")
    parser.add_argument("--no-dynamic", action="store_true", help="leave DynamicVRAM off")
    parser.add_argument("--profile", action="store_true", help="also what the time goes to, by torch.profiler")
    parser.add_argument("--flags", default="", help="more of ComfyUI's own flags, separated by spaces")
    return parser.parse_args()


def main() -> None:
    options = parse()
    flags = options.flags.split() + ["--cpu"] * options.cpu
    version = comfyui.start_host(options.comfyui, flags, dynamic=not options.no_dynamic)
    import torch

    common.import_pack()
    from nvfp4_video.tests.host import small_gemma

    found = common.facts() | {"comfyui": version}
    common.print_facts(found)
    sizes = Sizes(64, 128, 128, 64, 32, 800) if options.cpu else Sizes()
    if options.cpu:
        small_gemma.shrink()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, sizes.vocabulary - 100, (options.prompt,), generator=generator).tolist()
    rows, outputs = [], {}
    result: dict[str, Any] = {"facts": found, "prompt": options.prompt, "tokens": options.tokens}
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        gemma, projection, read = write_files(Path(folder), sizes, small_gemma.tokenizer_bytes())
        floor = read / (1e10 if options.cpu else common.copy_bandwidth())
        if not options.cpu:
            torch.cuda.empty_cache()
        say(f"wrote {gemma.stat().st_size / 1e9:.2f} GB; a token reads {read / 1e9:.2f} GB, floor {floor * 1e3:.2f} ms")
        for row in options.rows.split(","):
            clip = load_row(row, gemma, projection, options.backend)
            measured, *outputs[row] = measure(row, clip, options, ids)
            measured |= {"x floor": measured["ms a token"] / floor / 1e3, "DynamicVRAM": clip.patcher.is_dynamic()}
            rows.append(measured)
            if options.profile:
                result.setdefault("profile", {})[row] = profile(row, clip, ids)
            del clip
            import comfy.model_management

            comfy.model_management.unload_all_models()
    by_row = dict(zip(options.rows.split(","), rows, strict=True))
    for row, measured in by_row.items():
        if "stock" in by_row:
            measured["x stock's speed"] = by_row["stock"]["ms a token"] / measured["ms a token"]
        if row != "stock" and "stock" in outputs:
            result.setdefault("agreement", {})[row] = agreement(outputs["stock"], outputs[row])
    common.print_table(rows, {name: ".2f" for name in rows[0] if name not in ("row", "DynamicVRAM")})
    for row, facts in result.get("agreement", {}).items():
        print(f"{ROWS[row]} against stock: {facts}")
    result |= {"rows": rows, "floor_ms": floor * 1e3, "bytes_a_token": read}
    if options.out or not options.cpu:
        common.save("text_encoder", options.out, result)


if __name__ == "__main__":
    main()
