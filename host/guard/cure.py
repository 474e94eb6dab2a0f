# SPDX-License-Identifier: Apache-2.0
"""The cure for the prefetch crash, per model and without a launch flag; and what the NVFP4LaunchGuard node does.

The host asks for the prefetch of a dynamic model's blocks through ``transformer_options["prefetch_dynamic_vbars"]``,
which its ``_apply_model`` sets anew in every call, after all model options. A wrapper around the diffusion model comes
later than that, so it has the last word.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from comfy import patcher_extension

from ...kernels.errors import PackError
from ..doctor.probe import probe
from ..residency import PREFETCH_FLAG as FLAG
from . import check as guard

logger = logging.getLogger(__name__)

KEY = "nvfp4_video.without_prefetch"
_KIND = patcher_extension.WrappersMP.DIFFUSION_MODEL


class CureError(PackError):
    """The cure did not take, which is said instead of believed."""


def without_prefetch(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A DIFFUSION_MODEL wrapper that turns the prefetch off in the options that the model is about to get.

    Models take the options at different places, so they are found by the flag. The dict is the host's copy for this
    one call.
    """
    for options in (*args, *kwargs.values()):
        if isinstance(options, dict) and FLAG in options:
            options[FLAG] = False
    return executor(*args, **kwargs)


def cure(model: Any) -> Any:
    """MODEL -> a clone of it that samples without the prefetch; the model given is left as it is."""
    clone = model.clone()
    if not clone.wrappers.get(_KIND, {}).get(KEY):
        clone.add_wrapper_with_key(_KIND, KEY, without_prefetch)
    return clone


def prove(model: Any) -> str:
    """Send the flag, on, through the host's own chain to a model that records what it gets -> what happened.

    The chain is the host's WrapperExecutor over the wrappers that it finds in the options it would sample with, those
    of other packs left out, since they expect a real model. Raises CureError if the flag arrives on, or if the host
    would prefetch all the same.
    """
    options: dict[str, Any] = {"wrappers": {}, FLAG: True}
    for wrappers in (model.model_options.get("transformer_options", {}).get("wrappers", {}), model.wrappers):
        patcher_extension.merge_nested_dicts(options["wrappers"], wrappers, copy_dict1=False)
    before = options[FLAG]
    ours = [found for found in patcher_extension.get_all_wrappers(_KIND, options) if found is without_prefetch]
    arrived: list[Any] = []

    def record(*args: Any, transformer_options: Mapping[str, Any], **_: Any) -> None:
        arrived.append(transformer_options.get(FLAG))

    executor = patcher_extension.WrapperExecutor.new_class_executor(record, None, ours)
    executor.execute(None, transformer_options=options)
    if arrived != [False]:
        raise CureError(
            f"the prefetch flag reached the model as {arrived}, with {len(ours)} of this pack's wrappers in the host's "
            "chain; expected [False]. Start ComfyUI with --disable-async-offload instead, and report this"
        )
    queue = _queue_of_host(options, model.load_device)
    if queue is not None:
        raise CureError(
            "the host makes a prefetch queue although the flag is off. Start it with --disable-async-offload instead"
        )
    return f"prefetch flag {before} -> {arrived[0]} behind the host's wrapper chain; the host makes no prefetch queue"


def _queue_of_host(options: dict[str, Any], device: Any) -> Any:
    """What the host's own decision on prefetching comes to; None too where it has no prefetch."""
    try:
        prefetch = importlib.import_module("comfy.model_prefetch")
    except ImportError:
        return None
    return prefetch.make_prefetch_queue([None], device, options)


def guard_model(model: Any, policy: str, prompt: Any) -> tuple[Any, str]:
    """What NVFP4LaunchGuard does: MODEL, policy, API prompt -> MODEL, report.

    ``cure`` wraps the model only on a host that needs it, or of which that is not known. ``block`` raises PackError
    for errors in the prompt, for runs that no prompt handler saw. ``prompt`` may be None, then only the host is judged.
    """
    facts = probe()
    findings = guard.check_host(facts) + guard.check(prompt, facts)
    errors = [finding for finding in findings if finding.severity == guard.ERROR]
    if policy == guard.BLOCK and errors:
        raise PackError(guard.describe(errors))
    lines = [guard.describe(findings)]
    if policy == guard.CURE:
        crash = facts.get("prefetch_crash")
        if getattr(crash, "value", None) is False:
            lines.append("cure: not needed, the prefetch of this ComfyUI is sound; the model is passed on unchanged")
        else:
            model = cure(model)
            lines.append(f"cure: {prove(model)}")
            logger.info("NVFP4 guard: %s", lines[-1])
    return model, "\n".join(lines)
