# SPDX-License-Identifier: Apache-2.0
"""The kinds of wrappers a model takes, and the chain in which they run."""

from __future__ import annotations

__all__ = ["CallbacksMP", "WrapperExecutor", "WrappersMP", "get_all_wrappers", "merge_nested_dicts"]


class CallbacksMP:
    ON_CLONE = "on_clone"
    ON_LOAD = "on_load_after"
    ON_CLEANUP = "on_cleanup"
    ON_DETACH = "on_detach_after"
    ON_PRE_RUN = "on_pre_run"


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    SAMPLER_SAMPLE = "sampler_sample"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class WrapperExecutor:
    """Each wrapper gets the executor of those after it; the last one calls ``original``."""

    def __init__(self, original, class_obj, wrappers, idx):
        self.original, self.class_obj, self.wrappers, self.idx = original, class_obj, list(wrappers), idx

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1).execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    @classmethod
    def new_class_executor(cls, original, class_obj, wrappers, idx=0):
        return cls(original, class_obj, wrappers, idx)


def get_all_wrappers(wrapper_type, transformer_options, is_model_options=False):
    if is_model_options:
        transformer_options = transformer_options.get("transformer_options", {})
    keyed = transformer_options.get("wrappers", {}).get(wrapper_type, {})
    return [wrapper for wrappers in keyed.values() for wrapper in wrappers]


def merge_nested_dicts(dict1, dict2, copy_dict1=True):
    """Lists are joined, dicts merged, everything else replaced."""
    merged = dict(dict1) if copy_dict1 else dict1
    for key, value in dict2.items():
        if isinstance(value, dict):
            merged[key] = merge_nested_dicts(merged.get(key, {}), value)
        elif isinstance(value, list):
            merged[key] = [*merged.get(key, []), *value]
        else:
            merged[key] = value
    return merged
