# SPDX-License-Identifier: Apache-2.0
"""Results of ``bench``: which rows there are, what their repetitions amount to, and the tables for people.

A result is a JSON-ready dictionary; cli/bench_run.py fills it. Each row has ``status`` ("ok", "refused", "failed",
"waiting"), ``reason``, ``runs`` (one a repetition, each with its clips, the first of them cold), ``summary`` and
``quality`` (clip_quality.py). Times are seconds, sizes of files bytes, memory GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from . import escape
from .text import markdown_table, size_text

OK, REFUSED, FAILED, WAITING = "ok", "refused", "failed", "waiting"
STOCK, OURS = "stock", "ours"
FORMATS = {"bf16": "BF16", "fp8": "FP8", "nvfp4": "NVFP4"}


@dataclass(frozen=True)
class RowKind:
    """One row of the experiment: the file's format, who loads it, and how ours computes."""

    label: str
    format: str
    loader: str
    compute: str | None = None


# The order is that of the table; the first row that runs is the reference of all others.
ROWS = {
    "bf16": RowKind("BF16, stock", "bf16", STOCK),
    "fp8": RowKind("FP8, stock", "fp8", STOCK),
    "nvfp4": RowKind("NVFP4, stock", "nvfp4", STOCK),
    "ours-bf16": RowKind("NVFP4, ours, bf16", "nvfp4", OURS, "bf16"),
    "ours-fp8": RowKind("NVFP4, ours, fp8", "nvfp4", OURS, "fp8"),
    "ours-fp4": RowKind("NVFP4, ours, fp4", "nvfp4", OURS, "fp4"),
}
RANDOM_NOTE = "Random weights: sharpness and SSIM compare formats with each other, they say nothing about pictures."
MEMORY_NOTE = (
    "GPU: the driver's count for the whole card, polled during the cold clip. RAM: the row's process at its highest, "
    "pages of the mapped file included."
)
NO_VAE_NOTE = "No VAE was named or found in a file: only latents were compared, and a clip is its sampling alone."


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Repetitions of one row -> medians, with [lowest, highest] over the repetitions, and the highest peaks.

    A cold clip is loading the model and the VAEs and the first clip of a fresh process; warm clips are the later ones.
    The time of a step leaves out the first of each clip and all of a cold clip.
    """
    cold = [run["load_s"] + run["vae_load_s"] + _clip_seconds(run["clips"][0]) for run in runs]
    warm = [[_clip_seconds(clip) for clip in run["clips"][1:]] for run in runs]
    steps = [[step for clip in run["clips"][1:] for step in clip["steps_s"]] for run in runs]
    clips = [clip for run in runs for clip in run["clips"]]
    late = [clip for run in runs for clip in run["clips"][1:]]
    digests = [{clip["latents_sha256"] for clip in some} for some in ([run["clips"][0] for run in runs], late)]
    return {
        "repetitions": len(runs),
        "load_s": _spread([[run["load_s"]] for run in runs]),
        "cold_clip_s": _spread([[value] for value in cold]),
        "step_s": _spread(steps),
        "warm_clip_s": _spread(warm),
        "sampling_s": _spread([[clip["sampling_s"] for clip in late]]),
        "decode_s": _spread([[clip["decode_s"] for clip in late if clip["decode_s"] is not None]]),
        "sound_s": _spread([[clip["sound_s"] for clip in late if clip["sound_s"] is not None]]),
        "peak_gpu_gb": max(clip["peak_gpu_gb"] for clip in clips),
        "peak_torch_gb": max(clip["peak_torch_gb"] for clip in clips),
        "sampling_gpu_gb": max(clip["sampling_gpu_gb"] for clip in clips),
        "peak_host_gb": _most(run["host_peak_gb"] for run in runs),
        "own_host_gb": max(clip["peak_host_gb"] for clip in clips),
        "latents_sha256": clips[0]["latents_sha256"],
        "repeats_itself": all(len(found) == 1 for found in digests),
        "cold_differs": digests[0] != digests[1],
    }


def _clip_seconds(clip: Mapping[str, Any]) -> float:
    return clip["sampling_s"] + (clip["decode_s"] or 0.0) + (clip["sound_s"] or 0.0)


def _spread(groups: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Values by repetition -> the median of all, the lowest and highest median of a repetition."""
    each = [median(values) for values in groups if values]
    if not each:
        return None
    return {"median": median([v for values in groups for v in values]), "lowest": min(each), "highest": max(each)}


def _most(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def finish(result: dict[str, Any]) -> None:
    """Add to each row that ran its summary, and which row before it gave the same latents to the last bit."""
    seen: dict[str, str] = {}
    for row in result["rows"]:
        if row["runs"]:
            row["summary"] = summarize(row["runs"])
            digest = row["summary"]["latents_sha256"]
            row["same_latents_as"] = seen.get(digest)
            seen.setdefault(digest, row["key"])


def headline(result: Mapping[str, Any]) -> str:
    """What was varied, and on what."""
    return f"{result['model']}, {clip_text(result)}: one thing differs, the model file and how it is computed"


def clip_text(result: Mapping[str, Any]) -> str:
    """Size, frames and steps."""
    settings = result["settings"]
    return f"{settings['size']}, {settings['frames']} frames, {settings['steps']} steps, cfg 1"


def machine_text(result: Mapping[str, Any]) -> str:
    """Hardware and versions in one line."""
    facts = result["facts"]
    if not facts:
        return "No row came so far that it could tell of the machine"
    place = facts.get("gpu") if not result["settings"]["cpu"] else None
    parts = [place or f"CPU ({facts.get('cpu')})"]
    parts += [f"driver {facts['driver']}"] if place and facts.get("driver") else []
    parts += [f"{name} {facts[name]}" for name in ("torch", "triton", "comfy-kitchen") if facts.get(name)]
    parts += [f"ComfyUI {result['comfyui']}"] if result.get("comfyui") else []
    return ", ".join([*parts, str(facts.get("date", ""))])


COST = ("", "file", "load s", "step s (range)", "cold clip s", "warm clip s", "GPU GB", "RAM GB")
QUALITY = ("", "video latents", "audio latents", "PSNR dB", "SSIM", "sharpness", "sound", "same latents as")


def cost_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Cells of ``COST`` for every row; a row that did not run says so in its fourth cell."""
    found = []
    for row in result["rows"]:
        summary, nbytes = row["summary"], size_text(row["file_bytes"], 2)
        if summary is None:
            found.append([row["label"], nbytes, "-", row["status"], "-", "-", "-", "-"])
            continue
        gpu = summary["peak_gpu_gb"]
        found.append([
            row["label"], nbytes, _middle(summary["load_s"], ".2f"), _with_range(summary["step_s"]),
            _middle(summary["cold_clip_s"], ".2f"), _middle(summary["warm_clip_s"], ".2f"),
            f"{gpu:.2f}" if gpu else "-", _number(summary["peak_host_gb"], ".2f"),
        ])  # fmt: skip
    return found


def quality_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Cells of ``QUALITY`` for every row that ran."""
    labels, found = {row["key"]: row["label"] for row in result["rows"]}, []
    for row in result["rows"]:
        if row["summary"] is None:
            continue
        same = labels.get(row["same_latents_as"], "-")
        if row["key"] == result["reference"]:
            found.append([row["label"], "reference", *["-"] * 5, same])
            continue
        quality = row["quality"] or {}
        psnr = "same" if quality.get("identical_frames") else _number(quality.get("psnr_db"), ".2f")
        found.append([
            row["label"], _number(quality.get("video_error"), ".5f"), _number(quality.get("audio_error"), ".5f"),
            psnr, _number(quality.get("ssim"), ".4f"), _number(quality.get("sharpness_ratio"), ".3f"),
            _number(quality.get("sound_error"), ".4f"), same,
        ])  # fmt: skip
    return found


def _middle(spread: Mapping[str, float] | None, form: str) -> str:
    return "-" if spread is None else format(spread["median"], form)


def _with_range(spread: Mapping[str, float] | None) -> str:
    if spread is None or spread["lowest"] == spread["highest"]:
        return _middle(spread, ".4f")
    return f"{spread['median']:.4f} ({spread['lowest']:.4f}-{spread['highest']:.4f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Sentences below the tables: rows that did not run, what the numbers mean, what they do not say."""
    labels = {row["key"]: row["label"] for row in result["rows"]}
    found = [f"{row['label']}: {row['status']}, {row['reason']}" for row in result["rows"] if row["reason"]]
    found += [f"{row['label']}: {note}" for row in result["rows"] for note in row["notes"]]
    found += [
        f"{row['file']} holds more than the model, which is {size_text(row['model_bytes'], 2)} of its "
        f"{size_text(row['file_bytes'], 2)}."
        for row in {row["file"]: row for row in result["rows"]}.values()
        if row["model_bytes"] < 0.9 * row["file_bytes"]
    ]
    changing = [row["label"] for row in result["rows"] if (row["summary"] or {}).get("repeats_itself") is False]
    if changing:
        found.append(f"Latents differed between repetitions of {'; '.join(changing)}: its errors include that.")
    cold = [row["label"] for row in result["rows"] if (row["summary"] or {}).get("cold_differs")]
    if cold:
        found.append(
            f"The first clip of a process and the later ones had other latents, in {'; '.join(cold)}. Errors are those "
            "of first clips."
        )
    if result.get("stock_fp4") and any(row["key"] == "nvfp4" and row["summary"] for row in result["rows"]):
        found.append("Stock ComfyUI multiplies NVFP4 in FP4 on this GPU; elsewhere it dequantizes the weights to BF16.")
    if result["reference"]:
        found.append(
            f"Errors are relative to {labels[result['reference']]}: norm of the difference over the norm. sharpness: "
            "variance of the Laplacian over that of the reference."
        )
    return [*found, MEMORY_NOTE, *result["notes"]]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, ready for a README."""
    lines = [f"{headline(result)}.", "", f"{machine_text(result)}.", ""]
    lines += markdown_table(COST, cost_rows(result))
    rows = quality_rows(result)
    if rows:
        lines += ["", *markdown_table(QUALITY, rows)]
    notes = (f"- {escape.markdown(text, escape.LONGEST_LINE)}" for text in remarks(result))
    return "\n".join([*lines, "", *notes, ""])
