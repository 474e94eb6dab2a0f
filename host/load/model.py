# SPDX-License-Identifier: Apache-2.0
"""An NVFP4 file of any dialect -> the host's MODEL, and a report of what was loaded and how it will compute.

The host does the loading. This module decides how each layer computes, has the state dict brought to the host's layout
(state_dict.py), passes an operations class (host/compute/linear.py) and installs on the loaded model what belongs to
it: LoRA branches, layers that share rows, CUDA graphs of the blocks. report.py tells what came of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...checkpoint.file.header import CheckpointError, Header
from ...checkpoint.file.shards import open_checkpoint
from ...checkpoint.identify.dialects import AUTO, DIALECTS, DialectPlan
from ...checkpoint.identify.signatures import Model, config_fault, find_model, transformer_config
from ...kernels import backends
from ..compute.attention import BY_COMPUTE, use_attention
from ..compute.block_graphs import use_graphs
from ..compute.device_modes import remember
from ..compute.fusions import fuse
from ..compute.linear import weight_only_operations
from ..compute.lora_patcher import use_branches
from ..compute.modes import AUTO as FASTEST
from ..compute.modes import AUTOMATIC, MODES, Compute, parse_overrides, pick_mode, plan_layers
from ..compute.positions import use_positions
from .built import as_named, build_again, check_model
from .files import read_tensors
from .report import LoadReport, report_of
from .state_dict import plan_file, rewrite

logger = logging.getLogger(__name__)

COMPUTE_MODES = (*MODES, FASTEST)


def load_model(
    path: str,
    compute: str = "bf16",
    dialect: str = AUTO,
    backend: str = "auto",
    config_from: str | None = None,
    disable_dynamic: bool = False,
    layer_compute: str = "",
    attention: str = BY_COMPUTE,
) -> tuple[Any, LoadReport]:
    """File, options -> (ModelPatcher, LoadReport).

    ``compute``, ``layer_compute``: host/compute/modes.py; ``attention``: host/compute/attention.py.
    ``config_from``: a safetensors file whose header entry `config` is used where ``path`` has none. Raises
    CheckpointError for a file that cannot be loaded rightly, ValueError for an option that cannot be had.
    """
    device = comfy.model_management.get_torch_device()
    planned_for, picked, overrides = _pick_device(device, compute, layer_compute)
    backend_name, reason = backends.pick_backend(device, backend)
    checkpoint = open_checkpoint(path)
    header = checkpoint.header
    model = _known_to_host(find_model(header), header)
    plan = plan_file(checkpoint, dialect, model.prefix)
    how = _plan_compute(picked, overrides, plan, model)
    state_dict, metadata = read_tensors(checkpoint)
    config_source = _complete_config(metadata, header, model, config_from)
    state_dict = {key: tensor for key, tensor in state_dict.items() if key.startswith(model.prefix)}
    state_dict = {key[len(model.prefix) :]: tensor for key, tensor in rewrite(plan, state_dict).items()}
    with _by_host(header.path.name):
        compute_dtype = _compute_dtype(state_dict, metadata, device, header.path.name)
    operations = weight_only_operations(compute_dtype, planned_for, backend, header.path.name, how)
    options = {"custom_operations": operations}
    given = dict(state_dict)  # the host empties what it is handed
    with _by_host(header.path.name):
        patcher = use_branches(_load(state_dict, options, metadata, disable_dynamic, header.path.name))
    dit = patcher.model.diffusion_model
    again = functools.partial(build_again, patcher.model)
    named = as_named(patcher.model, given)
    lacks = check_model(dit, operations.Linear, named, header.path.name, again, whole=model.needs_config)
    fusions = fuse(dit, operations.Linear)

    def compute_on(other: torch.device) -> Compute:
        modes = AUTOMATIC if how.uses("fp4") else tuple(mode for mode in AUTOMATIC if mode != "fp4")
        return _plan_compute(pick_mode(compute, other, modes), parse_overrides(layer_compute, other), plan, model)

    remember(dit, planned_for, operations.Linear, compute_on)
    patcher.cached_patcher_init = (_reload, (path, compute, dialect, backend, config_from, layer_compute, attention))
    attends = use_attention(patcher, attention, how.mode)
    use_positions(patcher)
    graphs = use_graphs(patcher)
    place = f"{device} (on another GPU modes are chosen again)" if len(_gpus()) > 1 else str(device)
    found = attends, graphs, fusions, lacks
    report = report_of(plan, model, how, (backend_name, reason), place, patcher, config_source, *found)
    logger.info("%s", str(report).replace("\n", "; "))
    return patcher, report


def _reload(
    path, compute, dialect, backend, config_from, layer_compute="", attention=BY_COMPUTE, disable_dynamic: bool = False
):
    """The host's factory for clones that need weights of their own: another GPU, or no DynamicVRAM."""
    return load_model(path, compute, dialect, backend, config_from, disable_dynamic, layer_compute, attention)[0]


def _gpus() -> list[torch.device]:
    """All GPUs of a host that can place a model on any of them."""
    return getattr(comfy.model_management, "get_all_torch_devices", list)()


def _pick_device(
    default: torch.device, compute: str, layer_compute: str
) -> tuple[torch.device, tuple[str, str], dict[str, str]]:
    """-> the first device, the host's own before others, that runs all modes asked for; (mode, reason); overrides.

    The host places a model on another GPU after it was loaded. Until then nothing runs, and ``settle`` refuses a
    device that cannot run a mode asked for. ValueError where none can.
    """
    refusal = None
    for device in (default, *(other for other in _gpus() if other != default)):
        try:
            (mode, reason), overrides = pick_mode(compute, device), parse_overrides(layer_compute, device)
        except ValueError as error:
            refusal = refusal or error
            continue
        if device != default:
            reason = f"for {device}, where SelectModelDevice has to place the model; on {default}, {refusal}"
        return device, (mode, reason), overrides
    raise refusal


def _known_to_host(model: Model, header: Header) -> Model:
    """A model of a family that only the host may know lies under the prefix that the host would strip."""
    if model.family is None and not model.prefix:
        prefix = comfy.model_detection.unet_prefix_from_state_dict(header.tensors)
        if any(name.startswith(prefix) for name in header.tensors):
            return Model(None, prefix)
    return model


def _plan_compute(picked: tuple[str, str], overrides: dict[str, str], plan: DialectPlan, model: Model) -> Compute:
    """Modes by layer, named as the model will name them."""
    start = len(model.prefix)
    matrices = [
        layer[start:]
        for layer, group in plan.groups.items()
        if layer in plan.nvfp4 or "weight" in group and len(group["weight"].shape) == 2
    ]
    return plan_layers(picked, overrides, plan.header, [layer[start:] for layer in plan.nvfp4], matrices)


def _complete_config(metadata: dict, header, model: Model, config_from: str | None) -> str | None:
    """Make sure the metadata has the `config` the model needs -> the name of the file it came from, if another."""
    lacks = config_fault(header)
    if not lacks:
        return None
    if config_from is not None:
        other = open_checkpoint(config_from).header
        if config_fault(other):
            found = "its header has no `config` with a `transformer` section"
            raise CheckpointError(found, where=other.path.name, expected="the file of a model of the same version")
        metadata["config"] = other.metadata["config"]
        return other.path.name
    if model.needs_config:
        raise CheckpointError(
            f"{lacks}, and {model.family} cannot be built rightly without it: ComfyUI would guess "
            "dimensions and leave rotary embeddings and time scales at wrong defaults",
            where=header.path.name,
            expected="the header entry `config` of the original file",
            remedy="set `config_from` to another file of the same model version, or convert the file again",
        )
    transformer_config(header)  # of any family, the host stops at an entry that is no JSON
    return None


def _compute_dtype(state_dict: dict, metadata: dict, device: torch.device, name: str) -> torch.dtype:
    """The dtype the host would compute this model's quantised layers in on ``device``."""
    # The host looks behind its own prefixes first, then takes the names as they are.
    for candidate in (comfy.model_detection.unet_prefix_from_state_dict(state_dict), ""):
        found = comfy.model_detection.model_config_from_unet(state_dict, candidate, metadata=metadata)
        if found is not None:
            supported = found.supported_inference_dtypes
            return comfy.model_management.unet_manual_cast(None, device, supported) or torch.bfloat16
    raise CheckpointError(
        "ComfyUI does not recognise a diffusion model in it",
        where=name,
        expected="a model family this ComfyUI knows",
        remedy="update ComfyUI, or pick the diffusion model's own file",
    )


@contextlib.contextmanager
def _by_host(name: str) -> Iterator[None]:
    """What the host raises at tensors or a `config` it cannot build from becomes CheckpointError."""
    try:
        yield
    except (CheckpointError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        found = f"ComfyUI could not build a model from it ({' '.join(str(error).split())[:300]})"
        remedy = "the file is damaged, or of another version of the model than its `config` says: download it again"
        raise CheckpointError(found, where=name, remedy=remedy) from error


def _load(state_dict: dict, options: dict, metadata: dict, disable_dynamic: bool, name: str):
    load = comfy.sd.load_diffusion_model_state_dict
    arguments = {"model_options": options, "metadata": metadata}
    if "disable_dynamic" in inspect.signature(load).parameters:  # since 0.15.1
        arguments["disable_dynamic"] = disable_dynamic
    try:
        patcher = load(state_dict, **arguments)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):  # torch's words for tensors of another shape than the model's
            raise
        found = f"ComfyUI cannot load it into the model it is taken for ({' '.join(str(error).split())[:300]})"
        remedy = "the file is damaged, or of another version of the model than its `config` says: download it again"
        raise CheckpointError(found, where=name, remedy=remedy) from error
    if patcher is None:
        raise CheckpointError("ComfyUI could not build a model from it", where=name, remedy="update ComfyUI")
    return patcher


__all__ = ["COMPUTE_MODES", "DIALECTS", "load_model"]
