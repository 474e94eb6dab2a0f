# SPDX-License-Identifier: Apache-2.0
"""A patcher that never leaves the CPU: it holds the model, its options, patches, wrappers and attachments."""

from __future__ import annotations

import copy
import functools

import torch

__all__ = ["ModelPatcher"]


class ModelPatcher:
    """Clones share the model; ``cached_patcher_init`` is (factory, arguments) for those that must load it again."""

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.model_options = {"transformer_options": {}}
        self.patches, self.object_patches, self.attachments = {}, {}, {}
        self.wrappers, self.callbacks = {}, {}
        self.cached_patcher_init = None
        self.parent = None

    def is_dynamic(self):
        return False

    def model_size(self):
        if not self.size:
            self.size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        return self.size

    def model_dtype(self):
        return self.model.get_dtype() if hasattr(self.model, "get_dtype") else None

    def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
        other = copy.copy(self)
        other.model_options = copy.deepcopy(self.model_options)
        for name in ("patches", "object_patches", "attachments"):
            setattr(other, name, dict(getattr(self, name)))
        for name in ("wrappers", "callbacks"):
            kinds = getattr(self, name).items()
            setattr(other, name, {kind: {key: list(v) for key, v in keyed.items()} for kind, keyed in kinds})
        other.parent = self
        return other

    def is_clone(self, other):
        return self.model is getattr(other, "model", None)

    def model_state_dict(self, filter_prefix=None):
        state = self.model.state_dict()
        return {key: value for key, value in state.items() if filter_prefix is None or key.startswith(filter_prefix)}

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """The names among ``patches`` that the model has."""
        known = [key for key in patches if (key if isinstance(key, str) else key[0]) in self.model.state_dict()]
        for key in known:
            self.patches[key] = self.patches.get(key, []) + [(strength_patch, patches[key], strength_model)]
        return known

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> torch.nn.Module:
        if name in self.object_patches:
            return self.object_patches[name]
        return functools.reduce(getattr, name.split("."), self.model)

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def add_wrapper(self, wrapper_type, wrapper):
        self.add_wrapper_with_key(wrapper_type, None, wrapper)

    def get_all_wrappers(self, wrapper_type):
        return [wrapper for keyed in self.wrappers.get(wrapper_type, {}).values() for wrapper in keyed]

    def add_callback_with_key(self, call_type, key, callback):
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def get_attachment(self, key):
        return self.attachments.get(key)


# The host's own choice for most models; with DynamicVRAM it is another class. The pack does not name it.
CoreModelPatcher = ModelPatcher
