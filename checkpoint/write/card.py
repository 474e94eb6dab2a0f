# SPDX-License-Identifier: Apache-2.0
"""The model card beside a written file, and the provenance in its header.

The card leads with what makes people think a good file is a bad one: a preview decoder taken for the VAE, settings of
the undistilled model, sizes that the host snaps in silence. The record it is made of is what ``quantize`` returns.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...measure.escape import LONGEST_CELL, LONGEST_LINE, line, markdown, report
from ...measure.ltx import CFG, SIGMAS, sigmas_text
from ...measure.text import size_text
from ..file.container import sync_folder
from ..file.header import CheckpointError, Header
from ..file.place import write_small

logger = logging.getLogger(__name__)

PROVENANCE = "nvfp4_video"
CARD_ENDING = ".md"
_MAX_CARD_BYTES = 2**24
_SEAL = re.compile(rb"<!-- NVFP4 Video, ([0-9a-f]{64}) -->\n\Z")
_LICENCE_KEYS = ("license", "licence", "license_name", "modelspec.license", "ss_license")
_NO_LICENCE = "the original's; its header names none, see where the original was published"
_UNKNOWN_SHA = "0" * 64

_LTX_TRAPS = f"""\
- **Decode with the full VAE.** `taeltx2_3` and other preview decoders load without an error and are about five times
  softer (variance of the Laplacian about 45 against 205). {{vae}}
- **A distilled model takes {len(SIGMAS) - 1} steps at cfg {CFG}**, sigmas `{sigmas_text(SIGMAS)}`. \
With cfg 3, 20 steps or `LTXVScheduler(8)` it
  looks burnt or blurred. (An undistilled one takes the settings of its original.)
- **Frames: 8k + 1** (97, 121, ...). **Width and height: multiples of 32.** ComfyUI rounds others down in silence.
- **One frame rate**, the same in LTXVConditioning, LTXVEmptyLatentAudio and CreateVideo.
- **Memory, not speed.** Without FP4 tensor cores these weights are dequantized layer by layer: the file is smaller in
  memory, a step is not faster than in BF16."""
_OTHER_TRAPS = """\
- **Decode with the model's own full VAE**, not with a preview decoder (TAESD, taew and kin). {vae}
- **Use the steps, cfg and sampler of the original model**: quantizing changes none of them.
- **Memory, not speed.** Without FP4 tensor cores these weights are dequantized layer by layer: the file is smaller in
  memory, a step is not faster than in BF16."""


@functools.cache
def tool_version() -> str:
    """Name and version of this pack."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return f"NVFP4 Video {found[1]}" if found else "NVFP4 Video"


def licence_of(header: Header) -> str | None:
    """What the header says of the licence, cut to what a card has room for, or None; the header goes along whole."""
    found = next((header.metadata[key] for key in _LICENCE_KEYS if header.metadata.get(key)), None)
    return None if found is None else line(re.sub(r"\s+", " ", found, flags=re.ASCII), LONGEST_CELL)


def provenance(record: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Record, {source file: sha256} -> the text of the header entry.

    Its length does not depend on the hashes: they are known only when the last byte of the source has been read, and
    the header's length is needed before the first is written.
    """
    hashes = sources or {}
    files = [{"file": name, "sha256": hashes.get(name, _UNKNOWN_SHA)} for name in record["source_files"]]
    kept = ("tool", "recipe", "options", "search", "layers", "calibration", "licence")
    said = {"source": files} | {key: record[key] for key in kept}
    if record["loras"]:
        said["loras"] = [lora | {"sha256": lora["sha256"] or _UNKNOWN_SHA} for lora in record["loras"]]
    return json.dumps(said, separators=(",", ":"))


def provenance_of(header: Header) -> Mapping[str, Any]:
    """What the header's entry says, whoever wrote it; empty where there is none, or where it is no such thing."""
    try:
        said = json.loads(header.metadata.get(PROVENANCE, "{}"))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def loras_of(header: Header) -> list[tuple[str, float]]:
    """(file name, strength) of the LoRAs that the header says were folded in."""
    said = provenance_of(header).get("loras")
    found = [lora for lora in said if isinstance(lora, dict)] if isinstance(said, list) else []
    names = ((lora.get("file"), lora.get("strength")) for lora in found)
    return [(name, float(at)) for name, at in names if isinstance(name, str) and isinstance(at, (int, float))]


def model_card(record: Mapping[str, Any]) -> str:
    """Record of a written file -> Markdown, its last line a digest of the others, by which ``is_card`` knows it."""
    text = _card_text(record)
    return f"{text}<!-- NVFP4 Video, {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _card_text(record: Mapping[str, Any]) -> str:
    if record["has_vae"]:
        vae = "It is in this file: *NVFP4 VAE Loader* takes it from here."
    else:
        vae = "It is not in this file: take it from the original checkpoint."
    ltx = record["family"] and record["family"].startswith("LTX")
    traps = (_LTX_TRAPS if ltx else _OTHER_TRAPS).format(vae=vae)
    sources = record["sources"]
    kept = [f"| {markdown(reason)} | {count:,} |" for reason, count in record["kept"].items()]
    options = "; ".join(markdown(f"{key.replace('_', ' ')}: {value}") for key, value in record["options"].items())
    search = {
        "mse": "block scales chosen for the least squared error among candidates, same format as plain NVFP4",
        "amax": "plain block maxima, as comfy-kitchen's quantizer",
        "gptq": "GPTQ: rounding errors are made up for by later columns, as calibration inputs are correlated; "
        "block scales chosen on the way, same format as plain NVFP4",
    }[record["search"]]
    weighted = ", weighted by calibration statistics" if record["calibration"] and record["search"] == "mse" else ""
    calibrated = gptq_text(record)
    licence = markdown(record["licence"] or _NO_LICENCE, LONGEST_LINE)
    family = markdown(record["family"] or "A diffusion model")
    return "\n".join(
        [
            f"# {markdown(record['file'])}",
            "",
            f"{family} with {record['layers']:,} layers in NVFP4"
            f"{', ' + format(record['fp8'], ',') + ' in FP8' if record['fp8'] else ''}, for ComfyUI.",
            "",
            "## Before you judge it",
            "",
            traps,
            "",
            "## The file",
            "",
            "| | |",
            "|---|---|",
            f"| size | {size_text(record['nbytes'])}, {less_text(record)} than the source "
            f"({size_text(record['source_bytes'])}) |",
            f"| sha256 | `{record['sha256']}` |",
            *(f"| made from | {markdown(name)}, sha256 `{sha}` |" for name, sha in sources.items()),
            *(f"| LoRA folded in | {lora_text(lora)}, sha256 `{lora['sha256']}` |" for lora in record["loras"]),
            f"| made by | {record['tool']}, recipe {markdown(record['recipe'])} ({markdown(record['why'])}) |",
            *([f"| options | {options} |"] if options else []),
            *([f"| budget | {markdown(budget_text(record))} |"] if record.get("budget") else []),
            f"| scales | {search}{weighted} |",
            *([f"| calibration | {markdown(record['calibration'])}: {calibrated} |"] if calibrated else []),
            f"| licence | {licence} |",
            f"| contents | {markdown(record['contents'])} |",
            "",
            "Load it with ComfyUI's own loaders (NVFP4 needs ComfyUI 0.8 or later) or with *NVFP4 Model Loader*.",
            "",
            f"## Layers: {record['layers']:,} in NVFP4, {sum(record['kept'].values()):,} kept as they were",
            "",
            "| kept because | layers |",
            "|---|---|",
            *(kept or ["| - | 0 |"]),
            "",
            *(["Profile after: " + ", ".join(map(markdown, record["profile"])) + ".", ""] if record["profile"] else []),
            *(f"Warning: {markdown(text, LONGEST_LINE)}.\n" for text in record["warnings"]),
            "Check it against its source: `python <pack folder> verify FILE SOURCE`.",
            "",
        ]
    )


def text_of(record: Mapping[str, Any]) -> str:
    """Record of a written file, or of an estimate, -> lines for people."""
    size, before = size_text(record["nbytes"]), size_text(record["source_bytes"])
    lines = [f"{record['file']}: {size}, {less_text(record)} than the source ({before})"]
    if "sha256" in record:
        lines += [f"sha256: {record['sha256']}", f"time: {record['seconds']:.0f} s, card: {Path(record['card']).name}"]
    else:
        free = size_text(record["free_bytes"]) + ("" if record["fits"] else ", NOT ENOUGH")
        lines += [f"time: about {record['seconds'] / 60:.1f} min", f"free on disk: {free}"]
    lines += [f"layers: {record['layers']:,} in NVFP4, recipe {record['recipe']}: {record['why']}"]
    lines += [f"LoRA folded in: {lora_text(lora)}" for lora in record["loras"]]
    if record.get("budget"):
        lines += [f"budget {budget_text(record)}", *("  ".join(row) for row in curve_rows(record))]
    lines += [calibration_text(record)] if record["calibration"] else []
    lines += [f"kept: {count:,} {reason}" for reason, count in record["kept"].items()]
    lines += [f"warning: {text}" for text in record["warnings"]]
    return report(lines)


def less_text(record: Mapping[str, Any]) -> str:
    """Record of a file, or of an estimate -> `50.5 % less`, or `more`, to go on with "than the source"."""
    shrunk = 1 - record["nbytes"] / record["source_bytes"]
    return f"{100 * abs(shrunk):.1f} % {'less' if shrunk >= 0 else 'more'}"


def budget_text(record: Mapping[str, Any]) -> str:
    """Record of a file, or of an estimate, with a byte budget -> what was bought with it; "" without."""
    if not (found := record.get("budget")):
        return ""
    first = found["curve"][0]["error"]
    formats = f"{found['fp8']:,} in FP8 and {found['whole']:,} as in the source"
    errors = f"mean squared error of outputs {found['error']:.5f} where all in NVFP4 would have {first:.5f}"
    return f"{found['asked']}: of {found['layers']:,} calibrated layers {formats}, {errors}, by the plain search"


def curve_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Such a record -> rows of a table, its heading first: what files of other sizes would be; empty without."""
    rows = [
        (size_text(round(point["nbytes"])), f"{point['error']:.5f}", f"{point['fp8']:,}", f"{point['whole']:,}")
        for point in (record.get("budget") or {"curve": ()})["curve"]
    ]
    return [("size", "error of outputs", "in FP8", "as in the source"), *rows] if rows else []


def lora_text(lora: Mapping[str, Any]) -> str:
    """A LoRA of a record -> its name, strength and how many tensors it changed, for Markdown."""
    return f"{markdown(lora['file'])} at strength {lora['strength']:g}, which changes {lora['tensors']:,} tensors"


def calibration_text(record: Mapping[str, Any]) -> str:
    """Record of a written file, or of an estimate, with a calibration file -> a line on what that file did."""
    has = f"calibration: {record['calibration']} has {record['calibrated']:,} of {record['layers']:,} layers"
    fared = gptq_text(record)
    if not fared and record["search"] == "gptq":
        fared = "each takes GPTQ where its outputs on held-out tokens gain by it"
    return f"{has}; {fared}" if fared else has


def gptq_text(record: Mapping[str, Any]) -> str:
    """Record of a file -> how GPTQ fared; "" where it was not asked for, and in an estimate."""
    if not (found := record.get("gptq")):
        return ""
    parts = [f"{found['taken']:,} layers took GPTQ"]
    for key, text in (
        ("worse", "kept the plain search, which is as good on held-out tokens"),
        ("unseen", "kept the plain search for lack of tokens"),
        ("unfit", "kept the plain search, their sums cannot be used"),
    ):
        parts += [f"{found[key]:,} {text}"] if found[key] else []
    if found["error"] is not None:
        parts += [f"squared error of held-out outputs {found['error']:.2f} of the plain search's, mean of those layers"]
    return ", ".join(parts) + (", this run" if record["resumed"] else "")


def write_card(target: Path, record: Mapping[str, Any]) -> Path:
    """Write the card of ``target`` beside it, complete or not at all -> its path.

    A text of that name that is not our card, or was edited since, stays: the card gets the next free name.
    CheckpointError where none can be written.
    """
    text = model_card(record).encode()
    for number in itertools.count(1):
        path = target.with_suffix(CARD_ENDING if number == 1 else f".{number}{CARD_ENDING}")
        ours = is_card(path)
        if os.path.lexists(path) and not ours:
            logger.warning("%s is not our card, or was edited, and stays as it is.", path.name)
            continue
        try:
            write_small(path, text, overwrite=ours)
        except CheckpointError:  # it appeared at this moment
            continue
        except OSError as error:
            found, remedy = f"the card cannot be written ({error.strerror})", "mend the cause, and run it again"
            raise CheckpointError(found, where=path, remedy=f"{target.name} is complete: {remedy}") from error
        sync_folder(path.parent)
        return path
    raise AssertionError("unreachable")


def is_card(path: Path) -> bool:
    """Whether a file is a card as ``model_card`` made it: its last line is a digest of the lines before."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MAX_CARD_BYTES:
        return False
    data = path.read_bytes()
    seal = _SEAL.search(data[-128:])
    return seal is not None and hashlib.sha256(data[: -len(seal[0])]).hexdigest().encode() == seal[1]
