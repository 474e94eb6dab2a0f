# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints through everything that reads them: each is read rightly, or refused by the pack's own error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from ...checkpoint.file.container import planned, write_checkpoint
from ...checkpoint.file.header import CheckpointError, read_header
from ...checkpoint.file.shards import open_checkpoint
from ...checkpoint.identify.components import COMPONENTS, DIFFUSION_MODEL, find_components
from ...checkpoint.identify.dialects import AUTO, DIALECTS
from ...checkpoint.identify.report import inspect_checkpoint
from ...checkpoint.identify.text_encoder_signatures import find_projection, find_text_encoder
from ...checkpoint.identify.vae_signatures import pick_vae, refusal
from ...checkpoint.verify.verify import verify
from ...checkpoint.write.plan import AMAX, QuantizeSettings
from ...checkpoint.write.quantize import quantize_checkpoint
from ...checkpoint.write.recipes import Options
from ...checkpoint.write.repair import repair, restore_header
from ...checkpoint.write.split import split
from ...draw.inspect import inspection_picture
from ...measure.gpus import GPUS, pick_gpu
from ...measure.plan import make_plan
from ...measure.roofline import MODES, Clip
from ...samples import synthetic
from ...samples.damage import Draft, choose, damaged, read_draft
from ...samples.recorded import recorded
from . import stub
from .run import WRONG, Found, Kind, Outcome, judge

ALLOWED = (CheckpointError,)
# Without blocks kept at either end: these models have fewer than LTX-2's recipe keeps.
PLAIN = QuantizeSettings(search=AMAX, options=Options(keep_first_last=0))
_LONGER = 4  # of the readers that take most of the time, a case
KEPT = (
    "transformer_blocks.0.attn1.to_q", "transformer_blocks.2.attn1.to_q", "transformer_blocks.2.attn1.to_gate_logits",
    "transformer_blocks.2.audio_attn1.to_q", "transformer_blocks.3.ff.net.2", "transformer_blocks.5.attn1.to_q",
    "patchify_proj", "adaln_single.linear", "audio_adaln_single.linear", "scale_shift_table", "proj_out",
    "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
)  # fmt: skip


@dataclass(frozen=True)
class Bases:
    """Sound files to damage, and one to compare with."""

    drafts: tuple[Draft, ...]
    source: Path
    folder_paths: Any


def prepare(folder: Path) -> Bases:
    """A few layers of LTX-2.3 in every dialect, a text encoder, VAEs, old FP8 files: 5 to 200 kB each."""
    state, config = synthetic.small_ltx23()
    state = {name: small(part) for name, part in state.items() if name.startswith(KEPT)}
    packed = synthetic.quantize_layers(state, config)
    drafts = []
    for kind in synthetic.KINDS:
        for options in ({}, {"full": True}, {"sidecar": True}):
            place = folder / f"{kind}-{'-'.join(options)}"
            place.mkdir()
            synthetic.write(place / "m.safetensors", kind, state, config, packed, **options)
            drafts.append(read_draft(place / "m.safetensors"))
    for name, (tensors, metadata) in _others(state, config).items():
        (folder / name).mkdir()
        write_checkpoint(folder / name / "m.safetensors", planned(tensors), metadata)
        drafts.append(read_draft(folder / name / "m.safetensors"))
    source = folder / "bf16-" / "m.safetensors"
    folder_paths = stub.connect() if stub.there() else None
    bases = Bases(tuple(drafts), source, folder_paths)
    (folder / "first").mkdir()
    _read_all(bases, 0, [], 0, folder / "first")  # imports what the processes of the cases share
    return bases


def small(tensor: torch.Tensor) -> torch.Tensor:
    """The first 48 rows and 64 columns of a matrix."""
    return tensor[:48, :64].clone() if tensor.ndim == 2 else tensor[:48].clone()


def _others(state: synthetic.Tensors, config: dict) -> dict[str, tuple[synthetic.Tensors, dict[str, str]]]:
    metadata = {"config": json.dumps({"transformer": config})}
    old = {}
    for name, tensor in state.items():
        if name.endswith("to_q.weight"):
            parts = synthetic.fp8_tensors(tensor)
            old |= {name: parts["weight"], name.replace(".weight", ".scale_weight"): parts["weight_scale"]}
        else:
            old[name] = tensor
    old["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    vaes = {"config": json.dumps(recorded("ltx23_config"))}
    parts = {part: _cut(recorded("ltx_vae_keys")[part]) for part in ("video_vae", "audio_vae")}
    return {
        "old_fp8": (old, metadata),
        "video_vae": (parts["video_vae"], vaes),
        "audio_vae": (parts["audio_vae"], vaes),
        "encoder": (_gemma(), {}),
        "nothing": ({}, {}),
        "lora": ({"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 64)}, {}),
    }


def _cut(shapes: dict[str, list[int]]) -> synthetic.Tensors:
    """A fifth of the names of a VAE, those of its signature among them, in few numbers."""
    kept = {name: shape for i, (name, shape) in enumerate(shapes.items()) if i % 5 == 0 or "means" in name}
    for part in ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "encoder.down_blocks.7.conv.conv.weight"):
        kept |= {part: shapes[part]} if part in shapes else {}
    return {
        name: torch.zeros([side if axis == 0 else 1 for axis, side in enumerate(shape)], dtype=torch.bfloat16)
        for name, shape in kept.items()
    }


def _gemma() -> synthetic.Tensors:
    names = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "self_attn.q_proj"]
    found = {"model.embed_tokens.weight": torch.zeros(32, 16), "model.norm.weight": torch.zeros(16)}
    found["spiece_model"] = torch.arange(9, dtype=torch.uint8)
    for block in range(48):
        for name in names:
            shape = (16, 16) if "proj" in name else (16,)
            found[f"model.layers.{block}.{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    return found


def readers(bases: Bases, path: Path, rng: Random) -> dict[str, Callable[[], Any]]:
    """Every reader and writer of checkpoints, as a command, node or rule of the guard calls it, on one file."""
    out = path.parent / "out"
    out.mkdir()
    dialect = rng.choice((AUTO, AUTO, *DIALECTS))
    calls: dict[str, Callable[[], Any]] = {
        "header": lambda: read_header(path),
        "inspect": lambda: _inspected(path, dialect),
        "plan": lambda: _planned(path),
        "vae": lambda: [refusal(pick_vae(read_header(path), audio), audio) for audio in (False, True)],
        "encoder": lambda: _encoder(path),
    }
    alike = rng.random() < 0.3
    longer: dict[str, Callable[[], Any]] = {
        "verify": lambda: str(verify(path, shutil.copy(path, out / "a.safetensors") if alike else bases.source)),
        "repair": lambda: _sound(repair(path, out / "repaired.safetensors", dialect=dialect).path),
        "repair in place": lambda: _in_place(path, out, dialect),
        "split": lambda: _split(path, out, dialect),
        "quantize": lambda: _quantized(path, out, rng),
    }
    if rng.random() < 0.02:  # drawing takes a hundred times as long as all else
        calls["picture"] = lambda: inspection_picture(inspect_checkpoint(path, dialect))
    if bases.folder_paths is not None:
        longer |= _host_readers(bases.folder_paths, path, dialect)
    return calls | {name: longer[name] for name in rng.sample(list(longer), _LONGER)}


def _inspected(path: Path, dialect: str) -> None:
    found = inspect_checkpoint(path, dialect)
    json.dumps(found.as_dict(), allow_nan=False)
    str(found)


def _planned(path: Path) -> None:
    header = open_checkpoint(path).header
    parts, clip = find_components(header), Clip(768, 512, 121, 24.0)
    if DIFFUSION_MODEL in parts:
        str(make_plan(header.path.name, header.tensors, parts, clip, pick_gpu(next(iter(GPUS))), MODES[0], None))


def _encoder(path: Path) -> None:
    header = open_checkpoint(path).header
    find_projection(header, find_text_encoder(header))


def _in_place(path: Path, out: Path, dialect: str) -> None:
    twin = out / "twin.safetensors"
    shutil.copyfile(path, twin)
    done = repair(twin, in_place=True, dialect=dialect)
    _sound(done.path)
    if done.backup is not None:
        restore_header(twin)
        if twin.read_bytes() != path.read_bytes():
            raise AssertionError("undo did not bring the file back")


def _split(path: Path, out: Path, dialect: str) -> None:
    parts = list(find_components(open_checkpoint(path).header)) or list(COMPONENTS)
    for part in split(path, {part: f"{part}.safetensors" for part in parts}, base=out, dialect=dialect):
        _sound(part.path)


def _quantized(path: Path, out: Path, rng: Random) -> None:
    settings = replace(PLAIN, keep_non_finite=rng.random() < 0.5)
    quantize_checkpoint(path, out / "quantized.safetensors", settings)
    _sound(out / "quantized.safetensors")


def _sound(path: Path) -> None:
    """A file that was written is one that the reference reader takes, too."""
    if not path.exists():
        return  # there was nothing to repair
    header = read_header(path)
    try:
        from safetensors import safe_open
    except ImportError:
        return
    if not header.trailing and not any(info.dtype.startswith(("F4", "F6")) for info in header.tensors.values()):
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(header.tensors):
                raise AssertionError("the reference reader finds other tensors in the new file")


def _host_readers(folder_paths: Any, path: Path, dialect: str) -> dict[str, Callable[[], Any]]:
    from ...host.guard.files import file_facts
    from ...host.load.model import load_model
    from ...host.load.text_encoder import load_text_encoder
    from ...host.load.vae import load_vae

    folder_paths.folder_names_and_paths = {"vae": ([str(path.parent)], {".safetensors"})}
    return {
        "guard": lambda: file_facts(path.name, ("vae",)),
        "load model": lambda: str(load_model(str(path), dialect=dialect)[1]),
        "load text encoder": lambda: str(load_text_encoder(str(path), dialect=dialect)[1]),
        "load vae": lambda: str(load_vae(str(path), dialect=dialect)[1]),
        "load audio vae": lambda: str(load_vae(str(path), "audio", dialect=dialect)[1]),
    }


def case(bases: Bases, rng: Random, folder: Path) -> Outcome:
    """One damaged file through all readers."""
    base, changes, seed = rng.randrange(len(bases.drafts)), choose(rng), rng.getrandbits(32)
    return _read_all(bases, base, changes, seed, folder)


def _read_all(bases: Bases, base: int, changes: list, seed: int, folder: Path, only: str | None = None) -> Outcome:
    outcome = Outcome()
    (folder / "in").mkdir()
    path = damaged(bases.drafts[base], changes).write(folder / "in")
    before = path.read_bytes()
    for name, call in readers(bases, path, Random(seed)).items():  # noqa: S311
        if only in (None, name):
            judge(outcome, name, call, ALLOWED)
            if path.read_bytes() != before:
                outcome.found.append(Found(WRONG, name, "source: the file that was only to be read is changed"))
                return outcome
    return outcome


def minimise(bases: Bases, rng: Random, folder: Path, found: Found) -> list:
    """Leave out changes as long as the same is found -> those that are left; the file is written to ``folder``."""
    base, changes, seed = rng.randrange(len(bases.drafts)), choose(rng), rng.getrandbits(32)
    place = folder / "try"

    def shows(some: list) -> bool:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return any(other.key == found.key for other in _read_all(bases, base, some, seed, place, found.where).found)

    for change in list(changes):
        if len(changes) > 1 and shows([other for other in changes if other is not change]):
            changes = [other for other in changes if other is not change]
    shutil.rmtree(place, ignore_errors=True)
    damaged(bases.drafts[base], changes).write(folder)
    return [name for name, _ in changes]


KIND = Kind("damaged files through all readers", prepare, case, minimise)
