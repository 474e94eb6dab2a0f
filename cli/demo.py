# SPDX-License-Identifier: Apache-2.0
"""``demo``: the pack's main job on a model small enough to make on the spot. Nothing is downloaded.

A scaled-down LTX-2.3 with all its layer names is written in every dialect and read back. All files hold the same
numbers, so all of them must decode to the same weights; ``demo`` exits with 1 if they do not.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.file.container import TensorReader
from ..checkpoint.file.header import CheckpointError, read_header
from ..checkpoint.identify.dialects import AUTO, DialectPlan, detect
from ..checkpoint.identify.formats import FP8_FORMATS
from ..checkpoint.identify.host_layer import host_layer
from ..checkpoint.identify.signatures import find_model
from ..kernels import backends, dispatch
from ..kernels.format import PackedWeight
from ..samples import synthetic
from .console import Cell, CommandError, Console, size
from .demo_files import leave, make_and_split
from .demo_host import sample_in_comfyui

ORIGINAL, DECODED, UNDECLARED, CUT = "bf16", "bf16_decoded", "undeclared", "cut_short"
PACKED_KINDS = tuple(kind for kind in synthetic.KINDS if kind not in (ORIGINAL, DECODED))
# A layer whose shape admits both orders of the block scales, as nearly all layers of the released models do.
AMBIGUOUS_LAYER = "transformer_blocks.2.ff.net.0.proj"
MISREADINGS = (
    ("modelopt_swizzled", "modelopt_swizzled", "right"),
    ("modelopt_swizzled", "comfy", "the two weights of each byte exchanged"),
    ("modelopt", "modelopt_swizzled", "row-major block scales taken for tiled ones"),
    ("modelopt", "comfy", "both"),
)
READS = 3
PICTURES = "nvfp4-demo"
GPU_SHAPE = (4096, 4096)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DemoModel:
    """The model of the demo: original BF16 tensors, config, its packed layers, and their decoding."""

    state: Tensors
    config: dict
    packed: Mapping[str, PackedWeight]
    decoded: Tensors


@dataclass(frozen=True)
class Reading:
    """One file read back. ``weights``: NVFP4 layer -> BF16 weight; ``rest_equal``: its BF16 tensors are right."""

    kind: str
    plan: DialectPlan
    weights: Tensors
    packed_bytes: int
    rest_equal: bool
    seconds: float


def demo(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``demo``."""
    parser.description = (
        "Builds a scaled-down LTX-2.3 in every NVFP4 dialect, reads each file back and compares the weights. With "
        "COMFYUI_PATH set to a ComfyUI checkout, and COMFYUI_PYTHON to its Python if that is not in the checkout's "
        "own venv, it also samples audio and video in that ComfyUI. Leaves pictures, and that ComfyUI's clip, in the "
        f"folder {PICTURES}. Exits with 1 if anything differs."
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep all files, pictures too, in DIR, new or empty")
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use its GPU; without it, it samples on the CPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """-> (record, whether everything agreed)."""
    torch.set_num_threads(1)  # with matrices this small, threads only wait for each other
    with ExitStack() as stack:
        folder = _folder(args.keep, stack)
        with console.progress("Making the model") as progress:
            progress.update(0, "LTX-2.3, scaled down")
            model = build_model()
        record: dict[str, Any] = {"model": _describe_model(model, console)}
        record["files"] = show_files(folder, model, console)
        record["misreadings"] = show_misreadings(folder, model, console)
        record["refusals"] = show_refusals(folder, model, console)
        record["whole"] = make_and_split(folder, model.state, model.config, console)
        record["gpu"] = show_gpu(console)
        record["comfyui"] = sample_in_comfyui(folder / "comfyui", args.gpu, console)
        if args.keep:
            console.say(f"\nThe files are in {folder}.")
        clip = record["comfyui"].pop("clip", None)
        record["pictures"] = leave(folder, Path(args.keep or PICTURES), clip, console)
    record["identical"] = all(file["identical"] for file in record["files"])
    passed = (
        record["identical"]
        and record["whole"]["ok"]
        and all(refusal["refused"] for refusal in record["refusals"])
        and record["gpu"].get("identical", True)
        and record["comfyui"].get("ok", True)
    )
    record["ok"] = passed
    console.say()
    if passed:
        console.say("All files hold the same weights, and every reader found them.", "green")
    else:
        console.say("Not everything is as it should be: see what is red above.", "red")
    return record, passed


def _folder(keep: Path | None, stack: ExitStack) -> Path:
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nvfp4-demo-")))
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise CommandError(f"{keep} is not an empty folder; name a new one, so that nothing is overwritten")
    keep.mkdir(parents=True, exist_ok=True)
    return keep.resolve()


def build_model() -> DemoModel:
    """The same model at every run."""
    state, config = synthetic.small_ltx23()
    packed = synthetic.quantize_layers(state, config)
    decoded = synthetic.decoded_state(state, packed)
    return DemoModel(state, config, packed, {layer: decoded[f"{layer}.weight"] for layer in packed})


def _describe_model(model: DemoModel, console: Console) -> dict[str, Any]:
    numbers = sum(tensor.numel() for tensor in model.state.values())
    blocks = model.config["num_layers"]
    console.say("One model in every dialect", "bold")
    console.say(
        f"A scaled-down LTX-2.3 with true layer names: {blocks} blocks, {len(model.state)} tensors, "
        f"{numbers / 1e6:.1f} million numbers. The {len(model.packed)} Linears of the blocks in the middle are NVFP4, "
        "the first and the last two blocks stay BF16, as in the released files.",
        indent=2,
    )
    return {"family": "LTX-2.3", "tensors": len(model.state), "parameters": numbers, "nvfp4_layers": len(model.packed)}


def read_file(path: Path, model: DemoModel, kind: str, dialect: str = AUTO) -> Reading:
    """Header -> dialect -> every NVFP4 layer in the host's layout -> BF16, timed; then compare the BF16 tensors."""
    start = time.perf_counter()
    header = read_header(path)
    prefix = find_model(header).prefix
    plan = detect(header, dialect, prefix)
    with TensorReader(header) as reader:
        weights = {
            layer.removeprefix(prefix): _decode(plan, layer, reader, model.packed[layer.removeprefix(prefix)].shape)
            for layer in plan.nvfp4
        }
        seconds = time.perf_counter() - start
        plain = [key for key in model.state if prefix + key in header.tensors]
        plain = [key for key in plain if header.tensors[prefix + key].dtype == "BF16"]
        rest_equal = all(torch.equal(reader.get(prefix + key), model.state[key]) for key in plain)
    quantised = [info.nbytes for layer in plan.nvfp4 for suffix, info in plan.groups[layer].items() if suffix != "bias"]
    return Reading(kind, plan, weights, sum(quantised), rest_equal, seconds)


def _decode(plan: DialectPlan, layer: str, reader: TensorReader, shape: tuple[int, int]) -> torch.Tensor:
    record = host_layer(plan, layer, lambda suffix: reader.get(f"{layer}.{suffix}"))
    return dispatch.dequantize(replace(record, shape=shape), torch.bfloat16)


def relative_error(weights: Tensors, state: Tensors) -> float:
    """Frobenius norm of the difference to the original weights, over that of the originals."""
    pairs = [(weight.float(), state[f"{layer}.weight"].float()) for layer, weight in weights.items()]
    difference = sum(float((weight - original).square().sum()) for weight, original in pairs)
    return math.sqrt(difference / sum(float(original.square().sum()) for _, original in pairs))


def show_files(folder: Path, model: DemoModel, console: Console) -> list[dict[str, Any]]:
    """Write and read every kind of file; the table of what was found."""
    kinds = (ORIGINAL, *PACKED_KINDS)
    records = []
    with console.progress("Writing and reading", len(kinds)) as progress:
        for done, kind in enumerate(kinds):
            progress.update(done, kind)
            path = folder / f"{kind}.safetensors"
            synthetic.write(path, kind, model.state, model.config, model.packed)
            reading = min((read_file(path, model, kind) for _ in range(READS)), key=lambda reading: reading.seconds)
            records.append(_file_record(path, reading, model))
    head = ["file", "dialect found", "size", "ratio", "error", "weights"]
    console.say()
    console.table(head, [_file_row(record) for record in records], "<<>>><")
    console.say()
    console.say(
        "ratio: the bytes of the NVFP4 layers, scales and padding included, relative to BF16 (mixed also has FP8 and "
        "BF16 layers). error: relative to the original weights; about 0.095 is what four bits cost. identical: bit for "
        "bit what the other files give.",
        "dim",
        indent=2,
    )
    console.title("How each dialect was found")
    evidence = [(record["kind"], record["evidence"]) for record in records if record["dialect"]]
    console.table(["file", "evidence"], evidence, "<<")
    return records


def _file_record(path: Path, reading: Reading, model: DemoModel) -> dict[str, Any]:
    plan, layers = reading.plan, reading.weights
    identical = reading.rest_equal and _as_expected(layers, model)
    original_bytes = sum(model.state[f"{layer}.weight"].nbytes for layer in layers)
    fp8 = sum(content["format"] in FP8_FORMATS.values() for content in plan.formats.values())
    return {
        "kind": reading.kind,
        "dialect": plan.dialect,
        "evidence": plan.evidence,
        "file_bytes": path.stat().st_size,
        "nvfp4_layers": len(layers),
        "fp8_layers": fp8,
        "packed_bytes": reading.packed_bytes,
        "ratio_to_bf16": reading.packed_bytes / original_bytes if layers else None,
        "read_seconds": reading.seconds,
        "relative_error": relative_error(layers, model.state) if layers else None,
        "identical": identical,
    }


def _as_expected(weights: Tensors, model: DemoModel) -> bool:
    return all(torch.equal(weight, model.decoded[layer]) for layer, weight in weights.items())


def _file_row(record: dict[str, Any]) -> list[Cell]:
    row: list[Cell] = [record["kind"], record["dialect"] or "-", size(record["file_bytes"])]
    verdict = ("identical", "green") if record["identical"] else ("DIFFERENT", "red")
    if not record["nvfp4_layers"]:
        return [*row, "-", "-", "original" if record["identical"] else verdict]
    return [
        *row,
        f"{record['ratio_to_bf16']:.0%}",
        f"{record['relative_error']:.4f}",
        verdict,
    ]


def show_misreadings(folder: Path, model: DemoModel, console: Console) -> list[dict[str, Any]]:
    """What one layer becomes when a file is read in another dialect than its own: no error, other numbers."""
    console.title("Why the dialect is never guessed")
    console.say(f"One layer ({AMBIGUOUS_LAYER}) read as what it is and as what it is not:", indent=2)
    records = []
    for kind, dialect, effect in MISREADINGS:
        header = read_header(folder / f"{kind}.safetensors")
        with TensorReader(header) as reader:
            plan = replace(detect(header), dialect=dialect)
            weight = _decode(plan, AMBIGUOUS_LAYER, reader, model.packed[AMBIGUOUS_LAYER].shape)
        error = relative_error({AMBIGUOUS_LAYER: weight}, model.state)
        records.append({"kind": kind, "read_as": dialect, "relative_error": error, "effect": effect})
    rows = [(r["kind"], r["read_as"], f"{r['relative_error']:.3f}", r["effect"]) for r in records]
    console.table(["file", "read as", "error", "effect"], rows, "<<><")
    return records


def show_refusals(folder: Path, model: DemoModel, console: Console) -> list[dict[str, Any]]:
    """Files that must be refused: one that does not declare its dialect, one that is cut short."""
    undeclared, cut = (folder / f"{name}.safetensors" for name in (UNDECLARED, CUT))
    synthetic.write(undeclared, "metadata_less", model.state, {}, model.packed)  # without config: nobody's header
    whole = (folder / "comfy_markers.safetensors").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    console.title("What is refused")
    records = []
    for path in (undeclared, cut):
        try:
            read_file(path, model, path.stem)
            message = None
        except CheckpointError as error:
            message = str(error)
        records.append({"file": path.name, "refused": message is not None, "message": message})
        console.say(message or f"{path.name} was accepted, which is wrong", "" if message else "red", indent=2)
    stated = read_file(undeclared, model, UNDECLARED, dialect="comfy")
    equal = _as_expected(stated.weights, model)
    records[0]["identical_when_stated"] = equal
    records[0]["refused"] &= equal
    outcome = "the weights of all other files" if equal else "OTHER WEIGHTS"
    stated_text = f"With dialect comfy stated, {undeclared.name} gives {outcome}."
    console.say(stated_text, "green" if equal else "red", indent=2)
    return records


def show_gpu(console: Console) -> dict[str, Any]:
    """The Triton backend against torch on the GPU, if there is one."""
    console.title("On the GPU")
    if not torch.cuda.is_available():
        reason = backends.pick_backend(torch.device("cpu"))[1]
        console.say(f"torch finds no CUDA device; the torch backend computed all of the above ({reason}).", indent=2)
        return {"available": False, "reason": reason}
    device = torch.device("cuda", torch.cuda.current_device())
    name, reason = backends.pick_backend(device)
    console.say(f"auto picks {name}: {reason}.", indent=2)
    weight = torch.randn(GPU_SHAPE, generator=torch.Generator(device).manual_seed(0), device=device)
    record = dispatch.quantize(weight.to(torch.bfloat16), backend="torch")
    results = {backend: _time_on_gpu(record, backend) for backend in dict.fromkeys((name, "torch"))}
    expected = results["torch"][0]
    identical = all(torch.equal(result, expected) for result, _ in results.values())
    rows = [(backend, f"{seconds * 1e6:,.0f} us") for backend, (_, seconds) in results.items()]
    console.table(["backend", f"dequantize {GPU_SHAPE[0]} x {GPU_SHAPE[1]} to BF16"], rows, "<>")
    console.say("Their results are identical." if identical else "THEIR RESULTS DIFFER.", "" if identical else "red", 2)
    seconds = {backend: taken for backend, (_, taken) in results.items()}
    return {"available": True, "backend": name, "reason": reason, "seconds": seconds, "identical": identical}


def _time_on_gpu(record: PackedWeight, backend: str, repeats: int = 20) -> tuple[torch.Tensor, float]:
    """-> (BF16 weight, seconds a call, the first one not counted)."""
    weight = dispatch.dequantize(record, torch.bfloat16, backend)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        dispatch.dequantize(record, torch.bfloat16, backend)
    end.record()
    end.synchronize()
    return weight, start.elapsed_time(end) / 1000 / repeats
