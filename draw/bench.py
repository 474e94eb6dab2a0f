# SPDX-License-Identifier: Apache-2.0
"""Draws a result of ``bench``: one line a row; size, step and clip time, memory, latent error and SSIM as bars.

Colour is the file's format, full for stock and ours alike; a row that did not run is its reason in grey.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..measure.bench import RANDOM_NOTE, clip_text, machine_text, remarks
from ..measure.text import size_text
from .canvas import FAINT, GRID, INK, ORANGE, RED, SMOOTH, Canvas, Colour

_WIDTH, _MARGIN, _HEAD, _LINE = 1800, 40, 206, 74
_LEFT, _GAP, _BAR = 236, 40, 26
_NUMBER = 18
COLOURS: dict[str, Colour] = {"bf16": (105, 112, 124), "fp8": ORANGE, "nvfp4": (31, 103, 178)}


@dataclass(frozen=True)
class _Panel:
    """One column, by row key. ``values``: (bar, text) or None; ``marks``: lowest and highest; ``second``: a bar below.
    ``top``: the least that a full bar stands for.

    ``absent``: the text of rows without a value.
    """

    title: str
    unit: str
    width: int
    values: Mapping[str, tuple[float, str] | None]
    marks: Mapping[str, tuple[float, float]]
    top: float = 0.0
    second: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


def bench_png(result: Mapping[str, Any]) -> bytes:
    """Result -> PNG file, written by Pillow: the picture needs no OpenCV."""
    buffer = io.BytesIO()
    Image.fromarray(bench_picture(result)).save(buffer, "PNG")
    return buffer.getvalue()


def bench_picture(result: Mapping[str, Any]) -> np.ndarray:
    """Result -> (height, 1800, 3) uint8 RGB."""
    rows = result["rows"]
    panels = _panels(result)
    notes = _notes(result)
    bottom = _HEAD + _LINE * len(rows)
    canvas = Canvas(_WIDTH, bottom + 26 + 26 * len(notes) + _MARGIN, SMOOTH)
    canvas.text(_MARGIN, 26, "Only the model file and how it is computed differ", 32, bold=True)
    canvas.text(_MARGIN, 74, f"{result['model']}: {clip_text(result)}", 21, limit=_WIDTH - 2 * _MARGIN)
    canvas.text(_MARGIN, 106, machine_text(result), 19, FAINT, limit=_WIDTH - 2 * _MARGIN)
    for index, row in enumerate(rows):
        y = _HEAD + _LINE * index
        canvas.line([(_MARGIN, y), (_WIDTH - _MARGIN, y)], GRID, 1)
        _label(canvas, row, y)
    x = _MARGIN + _LEFT
    for panel in panels:
        _draw(canvas, panel, x, rows)
        x += panel.width + _GAP
    for row, y in ((row, _HEAD + _LINE * index) for index, row in enumerate(rows)):
        if row["reason"] and not row["summary"]:
            _reason(canvas, row, panels, y)
    canvas.line([(_MARGIN, bottom), (_WIDTH - _MARGIN, bottom)], GRID, 1)
    for index, text in enumerate(notes):
        canvas.text(_MARGIN, bottom + 24 + 26 * index, text, 17, FAINT, limit=_WIDTH - 2 * _MARGIN)
    return canvas.pixels()


def _label(canvas: Canvas, row: Mapping[str, Any], y: float) -> None:
    colour = COLOURS[row["file_format"]]
    canvas.box(_MARGIN, y + 12, _MARGIN + 8, y + _LINE - 12, colour)
    first, _, second = row["label"].partition(", ")
    canvas.text(_MARGIN + 22, y + _LINE / 2 - 12, first, 21, colour, anchor="lm", bold=True)
    canvas.text(_MARGIN + 22, y + _LINE / 2 + 14, second.replace(", ", ", compute "), 18, INK, anchor="lm")


def _reason(canvas: Canvas, row: Mapping[str, Any], panels: Sequence[_Panel], y: float) -> None:
    """Why a row did not run, where its bars would be; the size of its file stays."""
    left = _MARGIN + _LEFT + panels[0].width + _GAP
    colour = RED if row["status"] == "failed" else FAINT
    lines = textwrap.wrap(f"{row['status']}: {row['reason']}", 130)
    for index, text in enumerate(lines[:2]):
        middle = y + _LINE / 2 + (12 * (2 * index - 1) if len(lines) > 1 else 0)
        canvas.text(left, middle, text, 17, colour, anchor="lm", limit=_WIDTH - _MARGIN - left)


def _draw(canvas: Canvas, panel: _Panel, left: float, rows: Sequence[Mapping[str, Any]]) -> None:
    canvas.text(left, _HEAD - 46, panel.title, 20, bold=True, limit=panel.width + _GAP - 10)
    canvas.text(left, _HEAD - 22, panel.unit, 16, FAINT, limit=panel.width + _GAP - 10)
    tops = [value[0] for value in panel.values.values() if value] + [high for _, high in panel.marks.values()]
    tops += [*panel.second.values(), panel.top]
    longest = max(tops, default=0.0) or 1.0
    room = panel.width - max((_text_width(value[1]) for value in panel.values.values() if value), default=0) - 12
    for index, row in enumerate(rows):
        value, middle = panel.values.get(row["key"]), _HEAD + _LINE * (index + 0.5)
        if value is None:
            if row["summary"]:
                canvas.text(left, middle, panel.absent.get(row["key"], "-"), _NUMBER - 1, FAINT, anchor="lm")
            continue
        colour = COLOURS[row["file_format"]]
        end = left + room * value[0] / longest
        half = _BAR / 2
        if row["key"] in panel.second:
            canvas.box(left, middle - half, max(end, left + 2), middle - 1, colour)
            canvas.box(left, middle + 1, max(left + room * panel.second[row["key"]] / longest, left + 2), middle + half,
                       _pale(colour))  # fmt: skip
            end = max(end, left + room * panel.second[row["key"]] / longest)
        else:
            canvas.box(left, middle - half, max(end, left + 2), middle + half, colour)
        if row["key"] in panel.marks:
            low, high = (left + room * mark / longest for mark in panel.marks[row["key"]])
            canvas.line([(low, middle), (high, middle)], INK, 2)
            for mark in (low, high):
                canvas.line([(mark, middle - 8), (mark, middle + 8)], INK, 2)
            end = max(end, high)
        canvas.text(end + 10, middle, value[1], _NUMBER, INK, anchor="lm", halo=True)


def _text_width(text: str) -> float:
    return 0.56 * _NUMBER * len(text)


def _pale(colour: Colour) -> Colour:
    return tuple(round(255 - 0.5 * (255 - part)) for part in colour)


def _panels(result: Mapping[str, Any]) -> list[_Panel]:
    rows = [row for row in result["rows"] if row["summary"]]
    size = {row["key"]: (row["file_bytes"], size_text(row["file_bytes"], 2)) for row in result["rows"]}
    steps = {row["key"]: row["summary"]["step_s"] for row in rows}
    clips = {row["key"]: row["summary"]["warm_clip_s"] for row in rows}
    memory = "peak_gpu_gb" if any(row["summary"]["peak_gpu_gb"] for row in rows) else "peak_host_gb"
    peaks = {row["key"]: row["summary"][memory] for row in rows}
    quality = {row["key"]: row["quality"] or {} for row in rows}
    video = {key: found.get("video_error") for key, found in quality.items()}
    ssim = {key: found.get("ssim") for key, found in quality.items()}
    audio = {key: error for key, found in quality.items() if (error := found.get("audio_error")) is not None}
    reference = {result["reference"]: "reference"}
    return [
        _Panel("File", "size", 170, size, {}),
        _Panel(
            "Denoising step", "seconds; mark: repetitions", 270,
            {key: (step["median"], _seconds(step["median"])) if step else None for key, step in steps.items()},
            {key: (step["lowest"], step["highest"]) for key, step in steps.items() if step},
        ),
        _Panel(
            "Whole clip, warm", "seconds", 180,
            {key: (clip["median"], _seconds(clip["median"])) if clip else None for key, clip in clips.items()},
            {key: (clip["lowest"], clip["highest"]) for key, clip in clips.items() if clip},
        ),
        _Panel(
            "GPU memory, peak" if memory == "peak_gpu_gb" else "Host memory, peak",
            "GB, sampling and decoding", 180,
            {key: (peak, f"{peak:.1f}") if peak else None for key, peak in peaks.items()}, {},
        ),
        _Panel(
            "Latent error", "relative; dark video, pale audio", 276,
            {key: None if error is None else (error, _errors(quality[key])) for key, error in video.items()},
            {}, second=audio, absent=reference,
        ),
        _Panel(
            "SSIM of the frames", "1 = the reference's", 180,
            {key: None if value is None else (value, _ssim(value)) for key, value in ssim.items()}, {},
            top=1.0, absent=reference,
        ),
    ]  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _errors(quality: Mapping[str, Any]) -> str:
    audio = quality.get("audio_error")
    return _percent(quality["video_error"]) + (f" | {_percent(audio)}" if audio is not None else "")


def _percent(error: float) -> str:
    return "0" if error == 0 else f"{100 * error:.2g} %" if error < 0.1 else f"{100 * error:.0f} %"


def _ssim(value: float) -> str:
    return "1" if value == 1 else f"{value:.4f}" if value < 0.9999 else "> 0.9999"


def _notes(result: Mapping[str, Any]) -> list[str]:
    """The lines below: the reference, what is equal to the last bit, the warning about random weights."""
    labels = {row["key"]: row["label"] for row in result["rows"]}
    found = []
    if result["reference"]:
        found.append(f"Errors are relative to {labels[result['reference']]}; steps, sigmas, seed and VAE are the same.")
    equal = [
        f"{row['label']} = {labels[row['same_latents_as']]}" for row in result["rows"] if row["same_latents_as"]
    ]
    found += [f"The same latents to the last bit: {'; '.join(equal)}."] if equal else []
    found += [text for text in remarks(result) if "holds more than the model" in text]
    return found + [note for note in result["notes"] if note == RANDOM_NOTE]
