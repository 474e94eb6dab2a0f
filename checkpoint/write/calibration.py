# SPDX-License-Identifier: Apache-2.0
"""The calibration file: what the inputs of a model's layers are like, for a quantiser to judge errors by outputs.

A safetensors file with, for each input (named after the first layer that has it; Linears may share one):

* ``<input>.mean_square``  (K,) F32: mean square of each column.
* ``<input>.gram``         (G, B, B) F32: X^T X of blocks of B columns, summed over tokens, padded with zeros.
* ``<input>.held_out``     the same of other tokens, on which choices are judged.

and the header entry ``nvfp4_calibration``, JSON: ``format`` (1), ``tool``, ``model`` (``model_identity``), ``recipe``,
``prompts``, ``complete``, ``layers`` {layer: input}, ``tokens`` {input: [counted, held out]}. Layers are named without
the model's prefix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...kernels.format import BLOCK
from ...measure.moments import Moments
from ..file.container import planned, write_checkpoint
from ..file.header import CheckpointError, Header, open_regular, quote, read_header
from ..file.shards import Checkpoint, Source
from ..identify.components import DIFFUSION_MODEL, find_components
from .card import tool_version
from .weights import FloatWeight

ENTRY = "nvfp4_calibration"
FORMAT = 1
MIN_TOKENS = 128  # of an input, held-out ones among them: with fewer neither the sums nor the judgement mean much
_AGAIN = "collect it again with the model that is to be quantized"
_PROBE = 64


@dataclass(frozen=True)
class Calibration:
    """A checked file. ``layers``: layer without prefix -> its input, for inputs of enough tokens."""

    header: Header
    layers: Mapping[str, str]
    few: tuple[str, ...]
    model: str
    recipe: str
    prompts: int
    tokens: int

    def moments(self, layer: str, device: torch.device) -> Moments:
        """The sums of a layer's input. CheckpointError if they are not finite."""
        name = self.layers[layer]
        with _reader(self.header) as reader:
            gram, held = (reader.tensor(f"{name}.{kind}").to(device) for kind in ("gram", "held_out"))
        if not (torch.isfinite(gram).all() and torch.isfinite(held).all()):
            raise CheckpointError("NaN or infinity in it", where=f"{self.header.path.name}, {name}", remedy=_AGAIN)
        return Moments(self.header.tensors[f"{name}.mean_square"].shape[0], gram, held)

    def mean_square(self, layer: str) -> torch.Tensor:
        """(K,) fp32, on the CPU."""
        with _reader(self.header) as reader:
            return reader.tensor(f"{self.layers[layer]}.mean_square")

    def columns(self, layer: str) -> int:
        """Columns of a layer's input."""
        return self.header.tensors[f"{self.layers[layer]}.mean_square"].shape[0]


def model_identity(checkpoint: Checkpoint) -> str:
    """Digest of a diffusion model: names without prefix, dtypes, shapes, and the first bytes of every matrix.

    A fine-tune has another one than its base, a model split from its checkpoint the same.
    """
    header = checkpoint.header
    component = find_components(header).get(DIFFUSION_MODEL)
    names = component.names if component else {name: name for name in header.tensors}
    digest = hashlib.sha256()
    with contextlib.ExitStack() as opened:
        files = {file.path: opened.enter_context(open_regular(file.path)) for file in checkpoint.files}
        for name in sorted(names, key=names.get):
            info = header.tensors[name]
            digest.update(f"{names[name]} {info.dtype} {info.shape}\n".encode())
            if len(info.shape) == 2:
                file = files[checkpoint.homes[name].path]
                file.seek(info.start)
                digest.update(file.read(min(_PROBE, info.nbytes)))
    return digest.hexdigest()


def write_calibration(
    path: str | os.PathLike[str],
    moments: Mapping[str, Moments],
    inputs: Mapping[str, str],
    *,
    model: str,
    recipe: str,
    prompts: int,
    complete: bool = True,
    overwrite: bool = False,
) -> None:
    """Write moments by input, {layer: input}, as a whole file or none.

    ``complete``: False while more is to come; the quantiser takes no such file. Raises CheckpointError for sums that
    are not finite, by layer, and for a file that cannot be written.
    """
    tensors = {}
    for name, found in moments.items():
        if not (torch.isfinite(found.gram).all() and torch.isfinite(found.held_out).all()):
            remedy = "the model gave NaN or infinity there: look for it in the images, or leave the layer out"
            raise CheckpointError("its inputs were not finite", where=name, remedy=remedy)
        tensors[f"{name}.mean_square"] = found.mean_square
        tensors[f"{name}.gram"], tensors[f"{name}.held_out"] = found.gram, found.held_out
    entry = {
        "format": FORMAT,
        "tool": tool_version(),
        "model": model,
        "recipe": recipe,
        "prompts": prompts,
        "complete": complete,
        "layers": dict(inputs),
        "tokens": {name: [found.tokens, found.held_tokens] for name, found in moments.items()},
    }
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_checkpoint(path, planned(tensors), {ENTRY: json.dumps(entry, separators=(",", ":"))}, overwrite=overwrite)


def is_calibration(header: Header) -> bool:
    """Whether a file says of itself that it is one."""
    return ENTRY in header.metadata


def is_calibration_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a calibration file, whatever its format."""
    try:
        return is_calibration(read_header(path))
    except CheckpointError:
        return False


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """File -> Calibration; reads the header and the mean squares. CheckpointError for one that cannot be relied on."""
    header = read_header(path)
    where = header.path.name
    try:
        entry = json.loads(header.metadata.get(ENTRY, "null"))
    except (ValueError, RecursionError) as error:
        raise header.unreadable(ENTRY, error, "JSON") from error
    if not isinstance(entry, dict):
        found = f"it has no entry {ENTRY} in its header"
        raise CheckpointError(found, where=where, expected="a calibration file", remedy=_AGAIN)
    if entry.get("format") != FORMAT:
        found = f"its format is {quote(entry.get('format'))}, written by {quote(entry.get('tool'))}"
        raise CheckpointError(found, where=where, expected=f"format {FORMAT}", remedy="update this pack")
    try:
        layers, tokens = dict(entry["layers"]), {name: (int(a), int(b)) for name, (a, b) in entry["tokens"].items()}
        model, recipe, prompts = str(entry["model"]), str(entry["recipe"]), int(entry["prompts"])
        names = sorted({str(name) for name in layers.values()})
        few = {name for name in names if tokens[name][0] + tokens[name][1] < MIN_TOKENS or not all(tokens[name])}
        for name in names:
            _check_shapes(header, name)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise header.unreadable(ENTRY, error, "layers, tokens, model, recipe and prompts") from error
    if entry.get("complete") is not True:
        remedy = "let the collection come to its end, or collect again"
        raise CheckpointError("its collection was interrupted", where=where, remedy=remedy)
    if not names or len(few) == len(names):
        most = max((sum(tokens[name]) for name in names), default=0)
        found, expected = f"no layer saw more than {most:,} tokens", f"at least {MIN_TOKENS}, some of them held out"
        raise CheckpointError(found, where=where, expected=expected, remedy="sample more, or larger, and collect again")
    _check_finite(header, names)
    good = {layer: name for layer, name in layers.items() if name not in few}
    lacking = tuple(layer for layer, name in layers.items() if name in few)
    return Calibration(header, good, lacking, model, recipe, prompts, max(sum(tokens[name]) for name in names))


def check_belongs(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """CheckpointError for a calibration that was collected with another model."""
    if calibration.model != model_identity(checkpoint):
        found = f"it was collected with another model than {checkpoint.header.path.name}"
        raise CheckpointError(found, where=calibration.header.path.name, remedy=_AGAIN)


def _check_shapes(header: Header, name: str) -> None:
    """ValueError or KeyError unless the three tensors of an input fit each other."""
    (columns,) = header.tensors[f"{name}.mean_square"].shape
    shapes = {header.tensors[f"{name}.{kind}"].shape for kind in ("gram", "held_out")}
    ((count, width, also),) = shapes
    dtypes = {header.tensors[f"{name}.{kind}"].dtype for kind in ("mean_square", "gram", "held_out")}
    if width != also or not width or width % BLOCK or not 0 <= count * width - columns < width or dtypes != {"F32"}:
        raise ValueError(f"input {quote(name)} has blocks {quote(shapes)} of {quote(dtypes)} for {columns} columns")


def _check_finite(header: Header, names: Iterable[str]) -> None:
    """CheckpointError for mean squares that are none: a NaN or infinity in any input would be in them."""
    with _reader(header) as reader:
        for name in names:
            values = reader.tensor(f"{name}.mean_square")
            if not torch.isfinite(values).all() or (values < 0).any():
                where = f"{header.path.name}, {name}"
                raise CheckpointError(
                    "it holds other numbers than mean squares", where=where, expected="finite numbers from 0",
                    remedy=_AGAIN,
                )  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """What a file says of the layers that are to be packed. ``tensors``: source tensor -> its name in the file.

    ``calibration``: the file, if it is one; else it holds mean squares alone, under the layers' names.
    """

    header: Header
    tensors: Mapping[str, str]
    calibration: Calibration | None = None

    def mean_square(self, weight: str, device: torch.device) -> torch.Tensor | None:
        """(K,) fp32 of the inputs of a source tensor, None if the file has none. CheckpointError if they are none."""
        if (name := self.tensors.get(weight)) is None:
            return None
        if self.calibration is not None:
            return self.calibration.mean_square(name).to(device)
        with _reader(self.header) as reader:
            values = reader.tensor(name).float()
        if not torch.isfinite(values).all() or (values < 0).any():
            where, expected = f"{self.header.path.name}, {name}", "mean squares: finite, not negative"
            raise CheckpointError("it holds other numbers", where=where, expected=expected)
        return values.to(device)

    @property
    def width(self) -> int:
        """Columns of the widest block of a Gram matrix; 0 in a file without."""
        if self.calibration is None:
            return 0
        inputs = {self.calibration.layers[name] for name in self.tensors.values()}
        return max(self.header.tensors[f"{name}.gram"].shape[1] for name in inputs)

    def moments(self, weight: str, device: torch.device) -> Moments | None:
        """The sums of the inputs of a source tensor, None if the file has none."""
        if self.calibration is None or weight not in self.tensors:
            return None
        return self.calibration.moments(self.tensors[weight], device)


def find_statistics(
    path: str | os.PathLike[str], jobs: Mapping[str, FloatWeight], prefix: str, checkpoint: Checkpoint, grams: bool
) -> Statistics:
    """File, {layer without prefix: its weight}, the model's prefix -> Statistics of those layers.

    ``grams``: whether mean squares alone will not do. CheckpointError for a file of another model or of no layer.
    """
    header, calibration = read_header(path), None
    where = header.path.name
    if is_calibration(header):
        calibration = read_calibration(path)
        check_belongs(calibration, checkpoint)
    elif grams:
        found, remedy = "it has no Gram matrices of the inputs", "choose the quality `best`, which takes mean squares"
        raise CheckpointError(found, where=where, expected="a calibration file of this pack", remedy=remedy)
    found = {}
    for layer, job in jobs.items():
        known = calibration.layers if calibration else header.tensors
        name = next((key for key in (layer, prefix + layer) if key in known), None)
        if name is None:
            continue
        shape = (calibration.columns(name),) if calibration else header.tensors[name].shape
        if shape != job.info.shape[1:]:
            text, remedy = f"tensor {name} has shape {shape}", "these statistics belong to another model"
            raise CheckpointError(text, where=where, expected=f"{job.info.shape[1:]}", remedy=remedy)
        found[job.name] = name
    if not found:
        remedy = "name a calibration file, or a safetensors file with one vector a layer, named as the layer"
        raise CheckpointError("it has statistics of none of the layers", where=where, remedy=remedy)
    return Statistics(header, found, calibration)


def _reader(header: Header) -> Source:
    return Source(Checkpoint(header, dict.fromkeys(header.tensors, header), (header,)))
