# SPDX-License-Identifier: Apache-2.0
"""What a real ComfyUI's own nodes make beside what the guard computes, as JSON; run by test_values_host.py.

usage: <the host's python> values_in_process.py, in the folder of a ComfyUI checkout
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from typing import Any

import in_process

EXPRESSIONS = (
    "a/2", "a // 32 * 32", "(ceil((b * c - 1) / 8) * 8) + 1", "round(a / 64) * 64 - -b % 7", "min(a, b, 3) ** 2",
    "a if a > b else b", "(a > b) + (b > 1) * 2", "not a", "a and b or c", "1 < c < 6", "sum(values)", "sum(a, b)",
    "pow(c, 2) + sqrt(a) + log2(8)", "5 & 3 | 8 ^ 1", "int(b) + float(c)", "abs(-a)",
)  # fmt: skip
SIZES = ((1280, 720), (720, 1280), (1536, 1024), (333, 777), (64, 64))
RESIZES: dict[str, dict[str, Any]] = {
    "scale dimensions": {"width": 704, "height": 0, "crop": "center"}, "scale width": {"width": 513},
    "scale height": {"height": 513}, "scale by multiplier": {"multiplier": 0.3},
    "scale longer dimension": {"longer_size": 1000}, "scale shorter dimension": {"shorter_size": 544},
    "scale total pixels": {"megapixels": 0.5}, "scale to multiple": {"multiple": 64},
}  # fmt: skip
NODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ImageScale", {"upscale_method": "area", "width": 640, "height": 0, "crop": "disabled"}),
    ("ImageScaleBy", {"upscale_method": "area", "scale_by": 0.37}),
    ("ImageScaleToTotalPixels", {"upscale_method": "area", "megapixels": 0.4, "resolution_steps": 1}),
    ("ImageScaleToMaxDimension", {"upscale_method": "area", "largest_size": 700}),
    ("ImageCrop", {"width": 500, "height": 500, "x": 100, "y": 40}),
    ("ImageFromBatch", {"batch_index": -1, "length": 2}),
    (
        "ResizeAndPadImage",
        {"target_width": 512, "target_height": 300, "padding_color": "white", "interpolation": "area"},
    ),
)  # fmt: skip
SCHEDULERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("AlignYourStepsScheduler", {"model_type": "SD1", "steps": 8, "denoise": 0.5}),
    ("GITSScheduler", {"coeff": 1.2, "steps": 8, "denoise": 1.0}),
    ("OptimalStepsScheduler", {"model_type": "FLUX", "steps": 8, "denoise": 1.0}),
    ("BetaSamplingScheduler", {"steps": 8, "alpha": 0.6, "beta": 0.6}),
    ("SDTurboScheduler", {"steps": 4, "denoise": 1.0}),
    ("ExtendIntermediateSigmas", {"steps": 3, "start_at_sigma": -1.0, "end_at_sigma": 0.5, "spacing": "sine"}),
)
OF_MODEL = ("BetaSamplingScheduler", "SDTurboScheduler")
PLAIN: tuple[tuple[str, Any], ...] = (
    ("ComfyAndNode", (True, 0)), ("ComfyAndNode", (1, True)), ("ComfyOrNode", (False, 2)), ("ComfyOrNode", (0, 0)),
    ("CustomCombo", {"choice": "large", "index": 2}),
    ("StringConcatenate", {"string_a": "1.0", "string_b": "0.0", "delimiter": ", "}),
    ("StringCompare", {"string_a": "Ab", "string_b": "ab", "mode": "Equal", "case_sensitive": False}),
    ("StringCompare", {"string_a": "Ab", "string_b": "b", "mode": "Ends With", "case_sensitive": True}),
)  # fmt: skip


def run(kind: str, **inputs: Any) -> Any:
    """The first outputs of one of the host's nodes."""
    node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[kind]
    if hasattr(node, "execute"):
        return node.execute(**inputs).result
    return getattr(node(), node.FUNCTION)(**inputs)


def computed(kind: str, more: dict[str, dict], **inputs: Any) -> list[Any]:
    """The same of the guard."""
    links = importlib.import_module("nvfp4_video.host.guard.links")
    graph = importlib.import_module("nvfp4_video.host.guard.prompt_graph").PromptGraph(
        {"it": {"class_type": kind, "inputs": inputs}, **more}
    )
    return [graph.output(links.Link("it", slot)) for slot in range(3)]


def expressions() -> list[list[Any]]:
    """Expression, the host's three results or None, the guard's."""
    found = []
    for text in EXPRESSIONS:
        names = {"a": 720, "b": 24.5, "c": 5}
        theirs = list(run("ComfyMathExpression", expression=text, values=names))
        ours = computed("ComfyMathExpression", {}, expression=text, **{f"values.{k}": v for k, v in names.items()})
        found.append([text, theirs, ours])
    return found


def pictures() -> list[list[Any]]:
    """Node, the size of the picture given, the size that the host makes, the guard's."""
    torch = importlib.import_module("torch")
    found = []
    for width, height in SIZES:
        image = torch.zeros(3, height, width, 3)
        empty = {"class_type": "EmptyImage", "inputs": {"width": width, "height": height, "batch_size": 3, "color": 0}}
        for kind, inputs in NODES:
            (made,) = run(kind, image=image, **inputs)
            ours = computed(kind, {"p": empty}, image=["p", 0], **inputs)[0]
            found.append([kind, [width, height], _size(made), ours])
        for kind, options in RESIZES.items():
            (made,) = run("ResizeImageMaskNode", input=image, scale_method="area",
                          resize_type={"resize_type": kind, **options})  # fmt: skip
            given = {f"resize_type.{name}": value for name, value in options.items()}
            ours = computed("ResizeImageMaskNode", {"p": empty}, input=["p", 0], resize_type=kind, **given)[0]
            found.append([kind, [width, height], _size(made), ours])
    return found


def _size(image: Any) -> list[int]:
    return [image.shape[2], image.shape[1], image.shape[0]]


def latents() -> list[list[Any]]:
    """A latent's wish, its sides in latents of the host, the guard's tokens."""
    found = []
    for i in range(20):
        wish = {"width": 64 + 37 * i, "height": 900 - 29 * i, "length": 1 + 3 * i}
        (made,) = run("EmptyLTXVLatentVideo", batch_size=1, **wish)
        shape = list(made["samples"].shape)
        ours = computed("EmptyLTXVLatentVideo", {}, batch_size=1, **wish)[0]
        found.append([wish, shape[2] * shape[3] * shape[4], ours.tokens])
    return found


def schedulers() -> list[list[Any]]:
    """Node, the sigmas of the host, the guard's; where the host asks for a model, it gets LTX-2's sampling."""
    values = importlib.import_module("nvfp4_video.host.guard.values.schedules")
    torch = importlib.import_module("torch")
    manual = {"m": {"class_type": "ManualSigmas", "inputs": {"sigmas": "1.0, 0.9, 0.5, 0.0"}}}
    known = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    found = []
    for kind, inputs in SCHEDULERS:
        given: dict[str, Any] = {"model": values._Model} if kind in OF_MODEL else {}
        if kind == "ExtendIntermediateSigmas":
            given = {"sigmas": torch.tensor([1.0, 0.9, 0.5, 0.0])}
        links = {name: ["m", 0] for name in given}
        if kind in known:
            (theirs,) = run(kind, **given, **inputs)
            found.append([kind, theirs.tolist(), computed(kind, manual, **links, **inputs)[0].values])
    return found


def plain() -> list[list[Any]]:
    """Node, what the host makes of truths and texts, the guard's."""
    found = []
    for kind, inputs in PLAIN:
        nested = {"values": {f"value{place}": value for place, value in enumerate(inputs)}}
        given = {f"values.{name}": value for name, value in nested["values"].items()}
        if isinstance(inputs, dict):
            nested = given = inputs
        found.append([kind, list(run(kind, **nested)), computed(kind, {}, **given)])
    return found


def schedules() -> dict[str, Any]:
    """The trained schedules and what the guard has the host compute; LTXVScheduler with a latent, run and computed."""
    ltx = importlib.import_module("nvfp4_video.measure.ltx")
    calculated = importlib.import_module("nvfp4_video.host.guard.values.schedules").calculated
    whole = calculated("linear_quadratic", 8).values
    part = calculated("linear_quadratic", 3, 0.375).values
    wish = {"width": 768, "height": 512, "length": 121, "batch_size": 1}
    (latent,) = run("EmptyLTXVLatentVideo", **wish)
    inputs = {"steps": 20, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}
    (theirs,) = run("LTXVScheduler", latent=latent, **inputs)
    video = {"v": {"class_type": "EmptyLTXVLatentVideo", "inputs": wish}}
    ours = computed("LTXVScheduler", video, latent=["v", 0], **inputs)[0].values
    karras = {"steps": 9, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 7.0}
    return {
        "whole": max(abs(a - b) for a, b in zip(whole, ltx.SIGMAS, strict=True)),
        "part": max(abs(a - b) for a, b in zip(part, ltx.SIGMAS_STAGE_2["2.0"], strict=True)),
        "simple": max(abs(a - b) for a, b in zip(calculated("simple", 8).values, ltx.SIGMAS, strict=True)),
        "discarded": len(calculated("normal", 8, 1.0, "dpm_2").values),
        "ltxv": max(abs(a - b) for a, b in zip(theirs.tolist(), ours, strict=True)),
        "karras": [run("KarrasScheduler", **karras)[0].tolist(), computed("KarrasScheduler", {}, **karras)[0].values],
    }


def main() -> None:
    version = in_process.bring_up_host()
    nodes = importlib.import_module("nodes")
    asyncio.run(nodes.init_builtin_extra_nodes())
    facts = {
        "version": version,
        "has": sorted({"ComfyMathExpression", "ResizeImageMaskNode"} & nodes.NODE_CLASS_MAPPINGS.keys()),
    }
    if len(facts["has"]) == 2:
        facts |= {"expressions": expressions(), "pictures": pictures(), "latents": latents(), "schedules": schedules()}
        facts |= {"schedulers": schedulers(), "plain": plain()}
    sys.stdout.write(f"\n{in_process.MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
