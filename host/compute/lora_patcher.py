# SPDX-License-Identifier: Apache-2.0
"""The patcher of a model whose LoRAs are branches beside its packed weights (host/compute/lora.py).

``use_branches`` gives a patcher of the host a subclass of its own class, which makes and drops branches where the host
would patch; clones, unpatching, backups and ``patches_uuid`` stay the host's, and saving still bakes a LoRA in. Nothing
else of the host knows of it. What goes the host's way is logged, and noted in the layer as ``nvfp4_lora_refused``.

Weight hooks (LoRA of one conditioning) exchange branches too, in every Linear of the pack whatever its format: the
host's own way cannot patch a Linear of its mixed-precision operations with a hook.

Memory: the host learns of the adapters' bytes through ``memory_required``, as memory to keep free while it samples, not
through ``loaded_size``, since it could not move or drop them one by one. They go with the patches, or with the model.
As long as the model stays loaded with the same LoRAs, a branch keeps its tensors and their addresses, also when their
strengths change: the host unpatches and loads the model again for that, but the adapters stay on the GPU meanwhile.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import torch

from .. import residency
from .device_modes import settle
from .lora import ADAPTER_BYTES, OTHER_FORMAT, Branch, Term, adapter_bytes, make_branch, obstacle, terms_of, to_pack

logger = logging.getLogger(__name__)

_MOST_HOOKED = 4  # combinations of hooks whose branches stay on the GPU


@dataclass(eq=False)
class _Layers:
    """What the patchers of one model share: its Linears of the pack by the name of their weight, and their branches."""

    linears: dict[str, torch.nn.Module]
    patched: dict[str, Branch] = field(default_factory=dict)
    hooked: dict[tuple, dict[str, Branch]] = field(default_factory=dict)
    active: Iterable[str] = ()
    reloads: bool = False  # the host loads the model, and may unpatch it for that
    unpatched: bool = False  # it did
    told: tuple = ()

    def show(self, key: str, branch: Branch | None) -> None:
        own = self.linears[key].__dict__
        if branch is not None:
            own["nvfp4_lora"] = branch
        else:
            own.pop("nvfp4_lora", None)

    def sizes(self, terms: Mapping[str, Sequence[Term]]) -> dict[str, tuple[tuple[int, int], list[int]]]:
        """Of the layers that have any: (N, K) and the ranks of their LoRAs."""
        modules = self.linears
        return {
            key: ((modules[key].out_features, modules[key].in_features), [down.shape[0] for _, _, down in found])
            for key, found in terms.items()
            if found
        }

    def settle(self, wanted: Mapping[str, Sequence[Term]], device: torch.device) -> None:
        """Make the branches of these LoRAs; one made of the same tensors stays, and takes the new strengths."""
        before, self.patched = self.patched, {}
        self.active, self.unpatched = (), False
        packed = to_pack(self.sizes(wanted))
        for key in self.linears:
            if terms := wanted.get(key):
                self.patched[key] = self._made(before.get(key), key, terms, device, key in packed)
            self.show(key, self.patched.get(key))
        if before.keys() != self.patched.keys() or any(before[key] is not self.patched[key] for key in before):
            self.hooked.clear()

    def _made(
        self, branch: Branch | None, key: str, terms: Sequence[Term], device: torch.device, packed: bool
    ) -> Branch:
        if branch is None or not branch.is_of(terms, device, packed):
            return make_branch(self.linears[key], terms, device, packed)
        branch.set_strengths(terms)
        return branch

    def unhook(self) -> None:
        for key in self.active:
            self.show(key, self.patched.get(key))
        self.active = ()

    def hook(self, state: tuple, patches: Mapping[str, Sequence], device: torch.device) -> None:
        """Add the hooks' LoRAs to those of the model; ``state`` identifies the hooks, whatever their strengths."""
        known = self.hooked.pop(state, {})
        while len(self.hooked) >= _MOST_HOOKED:
            del self.hooked[next(iter(self.hooked))]
        terms = {}
        for key, added in patches.items():
            base = self.patched.get(key)
            terms[key] = [*(base.terms if base else ()), *terms_of(added)]
        packed = to_pack(self.sizes(terms))
        self.active = self.hooked[state] = {
            key: self._made(known.get(key), key, found, device, key in packed) for key, found in terms.items() if found
        }
        for key, branch in self.active.items():
            self.show(key, branch)


def _layers(model: torch.nn.Module) -> _Layers:
    found = model.__dict__.get("nvfp4_layers")
    if found is None:
        named = model.named_modules()
        linears = {f"{name}.weight": module for name, module in named if "nvfp4_mode" in module.__dict__}
        found = model.__dict__["nvfp4_layers"] = _Layers(linears)
    return found


def use_branches(patcher: Any) -> Any:
    """The host's patcher of a model with the pack's Linears -> the same object, which now makes branches.

    A host that cannot write a LoRA into a packed weight while it saves keeps its own way, and so does one whose own
    patches could not be told.
    """
    if not residency.check().patches:
        return patcher
    if hasattr(comfy.model_patcher, "LazyCastingQuantizedParam") and not getattr(patcher, "nvfp4_branches", False):
        patcher.__class__ = _patcher_class(type(patcher))
    return patcher


@functools.cache
def _patcher_class(base: type) -> type:
    class BranchingPatcher(base):
        nvfp4_branches = True

        def clone(self, *args, **kwargs):
            # Without DynamicVRAM the host clones into its own plain class.
            return use_branches(super().clone(*args, **kwargs))

        def _refusal(self, key: str) -> str:
            if key in getattr(self, "weight_wrapper_patches", ()):
                return "another node wraps the weight"
            return obstacle(_layers(self.model).linears[key], self.patches[key])

        def _takes(self, key: str) -> bool:
            return key in self.patches and key in _layers(self.model).linears and not self._refusal(key)

        def memory_required(self, *args, **kwargs):
            layers = _layers(self.model)
            sizes = layers.sizes({key: terms_of(self.patches[key]) for key in self.patches if self._takes(key)})
            packed = to_pack(sizes)
            adapters = sum(adapter_bytes(*size, packed=key in packed) for key, size in sizes.items())
            return super().memory_required(*args, **kwargs) + adapters

        def partially_load(self, *args, **kwargs):
            layers = _layers(self.model)
            layers.reloads = True
            try:
                return super().partially_load(*args, **kwargs)
            finally:
                layers.reloads = False
                if layers.unpatched:  # and it was not loaded after that
                    layers.settle({}, self.load_device)

        def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, **kwargs):
            if not return_weight and not kwargs.get("force_cast") and self._takes(key):
                return None  # `load` makes the branch
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)

        def load(self, device_to=None, *args, **kwargs):
            device = self.load_device if device_to is None else device_to
            settle(getattr(self.model, "diffusion_model", None), device)
            super().load(device_to, *args, **kwargs)
            self._settle(device)

        def partially_unload(self, *args, **kwargs):
            freed = super().partially_unload(*args, **kwargs)
            self._take_from_host()
            return freed

        def unpatch_model(self, device_to=None, unpatch_weights=True):
            super().unpatch_model(device_to, unpatch_weights)
            layers = _layers(self.model)
            if unpatch_weights and layers.reloads:
                layers.unpatched = True
            elif unpatch_weights:
                layers.settle({}, self.load_device)

        def model_state_dict_for_saving(self, model=None, prefix=""):
            linears = _layers(self.model).linears
            packed = {key: m for key, m in linears.items() if hasattr(m._parameters.get("weight"), "_qdata")}
            with _as_if_patched(packed.values()):
                state = super().model_state_dict_for_saving(model, prefix)
            for key in packed.keys() & self.patches.keys() - self.backup.keys():
                caster = comfy.model_patcher.LazyCastingQuantizedParam(self, key)
                for name in packed[key].weight.state_dict(key):
                    if (short := name.removeprefix(prefix)) in state:
                        state[short] = _piece()(caster, name, state[short])
            return state

        def _settle(self, device: torch.device) -> None:
            layers, wanted, refused = _layers(self.model), {}, {}
            for key in self.patches.keys() & layers.linears.keys():
                reason = self._refusal(key)
                if not reason and key in self.backup:
                    reason = "ComfyUI keeps so small a layer patched"
                if reason:
                    refused[key] = reason
                else:
                    wanted[key] = terms_of(self.patches[key])
            for key, module in layers.linears.items():
                module.__dict__["nvfp4_lora_refused"] = refused.get(key, "")
            layers.settle(wanted, device)
            refused |= self._take_from_host()
            if self.current_hooks is not None:
                self._hook(self.current_hooks)
            _tell(layers, refused)

        def _take_from_host(self) -> dict[str, str]:
            """Remove from the layers what the host left there to patch a weight that a branch is for.

            -> weights of which it still has a patch, under a name unknown here, with the reason: their layers are
            computed ComfyUI's own way from now on and without a branch, or the LoRA would count twice.
            """
            layers, kept = _layers(self.model), {}
            for key in self.patches.keys() & layers.linears.keys():
                own = layers.linears[key].__dict__
                if not own.get("nvfp4_lora_refused") and (name := residency.take_patch(layers.linears[key], key)):
                    kept[key] = f"it keeps a patch of its own as {name}, which this pack does not know"
                    own["nvfp4_mode"], own["nvfp4_lora_refused"] = None, kept[key]
                    layers.patched.pop(key, None)
                    layers.show(key, None)
            return kept

        def get_combined_hook_patches(self, hooks):
            return {key: found for key, found in self._combined(hooks).items() if not self._hookable(key, found)}

        def _combined(self, hooks) -> dict:
            return super().get_combined_hook_patches(hooks)

        def _hookable(self, key: str, patches: Sequence) -> bool:
            module = _layers(self.model).linears.get(key)
            wrapped = key in getattr(self, "weight_wrapper_patches", ())
            return module is not None and not wrapped and not obstacle(module, patches, hook=True)

        def patch_hooks(self, hooks):
            super().patch_hooks(hooks)
            self._hook(hooks)

        def unpatch_hooks(self, whitelist_keys_set=None):
            super().unpatch_hooks(whitelist_keys_set)
            if not whitelist_keys_set:
                _layers(self.model).unhook()

        def _hook(self, hooks) -> None:
            layers = _layers(self.model)
            layers.unhook()
            if hooks is not None:
                state = tuple((hook.hook_ref, bool(hook.strength)) for hook in hooks.hooks)
                patches = {key: found for key, found in self._combined(hooks).items() if self._hookable(key, found)}
                layers.hook(state, patches, self.load_device)

        def clear_cached_hook_weights(self):
            super().clear_cached_hook_weights()
            _layers(self.model).hooked.clear()

    return BranchingPatcher


@contextmanager
def _as_if_patched(modules: Iterable[torch.nn.Module]):
    """Have the host take the packed tensors of these layers into a state dict as they are.

    Its own way for weights it has not patched, which with DynamicVRAM are all, fails for packed ones: it wraps each
    tensor into a Parameter that asks for gradients, and theirs are of integers.
    """
    before = [(module, module.__dict__.get("comfy_patched_weights")) for module in modules]
    for module, _ in before:
        module.comfy_patched_weights = True
    try:
        yield
    finally:
        for module, value in before:
            module.comfy_patched_weights = value
            if value is None:
                del module.comfy_patched_weights


@functools.cache
def _piece() -> type:
    """The host's tensor that is patched and packed when a file is written, for dtypes without gradients too."""

    class Piece(comfy.model_patcher.LazyCastingParamPiece):
        def __new__(cls, caster, state_dict_key, tensor):
            return torch.nn.Parameter.__new__(cls, tensor, False)

    return Piece


def _tell(layers: _Layers, refused: Mapping[str, str]) -> None:
    """Log what became of the patches, once for each set of them."""
    reasons = Counter(reason for reason in refused.values() if reason != OTHER_FORMAT)
    nbytes = sum(branch.nbytes for branch in layers.patched.values())
    told = (len(layers.patched), nbytes, tuple(sorted(reasons.items())))
    if told == layers.told:
        return
    layers.told = told
    if layers.patched:
        text = "LoRA beside the packed weights of %d layers, %.2f GB%s"
        logger.info(text, len(layers.patched), nbytes / 1e9, _in_8_bits(layers))
    for reason, count in reasons.items():
        logger.info("a patch of %d NVFP4 layers is computed into the weight by ComfyUI: %s", count, reason)


def _in_8_bits(layers: _Layers) -> str:
    """Which adapters are kept in 8 bits and why, as the end of a sentence."""
    packed = sum(branch.packed for branch in layers.patched.values())
    if not packed:
        return ""
    sizes = layers.sizes({key: branch.terms for key, branch in layers.patched.items()})
    whole = sum(adapter_bytes(*size) for size in sizes.values()) / 1e9
    count = "all" if packed == len(layers.patched) else f"the largest {packed:,}"
    return f", {count} in 8 bits: in 16 they would hold {whole:.2f} GB, the budget is {ADAPTER_BYTES / 1e9:g} GB"
