# SPDX-License-Identifier: Apache-2.0
"""The patcher of models with LoRA branches, on a stubbed host: when branches come and go, what stays the host's."""

from __future__ import annotations

from collections import namedtuple

import comfy.model_patcher
import pytest
import torch
from nvfp4_video.host.compute import lora, lora_patcher
from nvfp4_video.tests.support.lora_helpers import CPU, adapter, build, patches_of


class LowVram:
    """As the host's LowVramPatch."""

    def __init__(self, key, patches):
        self.key, self.patches = key, patches


class Hook(namedtuple("Hook", "hook_ref strength")):
    pass


class HostPatcher(comfy.model_patcher.ModelPatcher):
    """What the host's patchers do with weights: ``dynamic`` leaves every patch waiting, else all are applied."""

    dynamic = False

    def __init__(self, model):
        super().__init__(model, CPU, CPU)
        self.patches_uuid = None
        self.backup, self.weight_wrapper_patches, self.current_hooks, self.hook_patches = {}, {}, None, {}
        self.log = []

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False):
        self.log.append(key)
        self.backup[key] = "the weight"

    def load(self, device_to=None):
        self.unpatch_hooks()
        for key in self.patches:
            module = self.model.get_submodule(key.removesuffix(".weight"))
            module.weight_lowvram_function = None
            if self.dynamic:
                module.weight_lowvram_function = LowVram(key, self.patches)
            else:
                self.patch_weight_to_device(key, device_to)

    def partially_load(self, device_to, extra_memory=0):
        """Other patches than those that are loaded: taken off first, unless they wait in the layers."""
        self.unpatch_model(device_to, unpatch_weights=not self.dynamic)
        self.load(device_to)

    def partially_unload(self, device_to, memory_to_free=0):
        for key in self.patches:
            module = self.model.get_submodule(key.removesuffix(".weight"))
            module.weight_function = [*module.weight_function, LowVram(key, self.patches)]
        return 5

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        self.backup.clear()

    def memory_required(self, input_shape):
        return 1000

    def get_combined_hook_patches(self, hooks):
        return {} if hooks is None else self.hook_patches

    def patch_hooks(self, hooks):
        self.unpatch_hooks()
        self.log += self.get_combined_hook_patches(hooks)
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set=None):
        self.current_hooks = None

    def clear_cached_hook_weights(self):
        self.patch_hooks(None)


KEY = "to_q.weight"


@pytest.fixture
def patcher(monkeypatch: pytest.MonkeyPatch) -> HostPatcher:
    monkeypatch.setattr(comfy.model_patcher, "LazyCastingQuantizedParam", object, raising=False)
    layer, _ = build(24, 32)
    return lora_patcher.use_branches(HostPatcher(torch.nn.ModuleDict({"to_q": layer})))


def layer_of(patcher) -> torch.nn.Module:
    return patcher.model["to_q"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_loading_makes_a_branch_in_the_place_of_the_host_s_patch(patcher, dynamic):
    patcher.dynamic, patcher.patches = dynamic, {KEY: patches_of("three", 24, 32)}
    patcher.load(CPU)
    layer = layer_of(patcher)
    assert layer.nvfp4_lora.down.shape == (22, 32) and layer.nvfp4_lora_refused == ""
    assert layer.weight_lowvram_function is None and patcher.log == [] and patcher.backup == {}
    patcher.partially_unload(CPU)
    assert layer.weight_function == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_refused_stays_the_host_s_and_the_reason_is_kept_and_logged_once(patcher, dynamic, caplog):
    dora = (1.0, adapter(24, 32, 2, dora=torch.ones(24, 1)), 1.0, None, None)
    patcher.dynamic, patcher.patches = dynamic, {KEY: [dora]}
    caplog.set_level("INFO", logger=lora_patcher.logger.name)
    patcher.load(CPU)
    patcher.load(CPU)
    layer = layer_of(patcher)
    assert not hasattr(layer, "nvfp4_lora") and layer.nvfp4_lora_refused == "it is a DoRA"
    assert (layer.weight_lowvram_function is not None) == dynamic
    assert patcher.log == ([] if dynamic else [KEY, KEY])
    assert [record.message for record in caplog.records if "DoRA" in record.message] == [
        "a patch of 1 NVFP4 layers is computed into the weight by ComfyUI: it is a DoRA"
    ]
    patcher.partially_unload(CPU)
    assert len(layer.weight_function) == 1


def test_a_weight_that_another_node_wraps_stays_the_host_s(patcher):
    patcher.patches, patcher.weight_wrapper_patches = {KEY: patches_of("one", 24, 32)}, {KEY: [abs]}
    patcher.load(CPU)
    assert patcher.log == [KEY] and not hasattr(layer_of(patcher), "nvfp4_lora")


def test_a_branch_stays_while_its_patches_do_and_follows_them(patcher):
    patches = patches_of("three", 24, 32)
    patcher.patches = {KEY: patches}
    patcher.load(CPU)
    first = layer_of(patcher).nvfp4_lora
    patcher.load(CPU)
    assert layer_of(patcher).nvfp4_lora is first
    patcher.patches = {KEY: patches[1:]}
    patcher.load(CPU)
    assert layer_of(patcher).nvfp4_lora is not first
    patcher.patches = {}
    patcher.load(CPU)
    assert not hasattr(layer_of(patcher), "nvfp4_lora")


@pytest.mark.parametrize("dynamic", [False, True])
def test_another_strength_leaves_the_adapters_where_they_are(patcher, dynamic, monkeypatch):
    patches = patches_of("three", 24, 32)
    patcher.dynamic, patcher.patches = dynamic, {KEY: patches}
    patcher.partially_load(CPU)
    layer, x = layer_of(patcher), torch.randn(40, 32).bfloat16()
    first, before = layer.nvfp4_lora, layer(x)
    made = []
    monkeypatch.setattr(lora_patcher, "make_branch", lambda *given: made.append(1))
    clone = patcher.clone()
    clone.patches = {KEY: [(0.5, *patches[0][1:]), *patches[1:]]}
    clone.partially_load(CPU)
    assert layer.nvfp4_lora is first and not made
    assert not torch.equal(layer(x), before)
    patcher.partially_load(CPU)
    assert torch.equal(layer(x), before) and not made


def test_a_model_that_is_not_loaded_again_after_unpatching_keeps_no_adapters(patcher, monkeypatch):
    patcher.patches = {KEY: patches_of("one", 24, 32)}
    patcher.partially_load(CPU)

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(HostPatcher, "load", fails)
    with pytest.raises(MemoryError):
        patcher.partially_load(CPU)
    assert not hasattr(layer_of(patcher), "nvfp4_lora")


def test_adapters_beyond_the_budget_are_kept_in_8_bits_and_the_log_names_it(patcher, monkeypatch, caplog):
    caplog.set_level("INFO", logger=lora_patcher.logger.name)
    monkeypatch.setattr(lora, "ADAPTER_BYTES", 2000)
    monkeypatch.setattr(lora_patcher, "ADAPTER_BYTES", 2000)
    patcher.patches = {KEY: patches_of("three", 24, 32)}
    expected = patcher.memory_required((1,)) - 1000
    patcher.load(CPU)
    branch = layer_of(patcher).nvfp4_lora
    assert branch.packed and branch.nbytes == expected
    assert "all in 8 bits: in 16 they would hold 0.00 GB, the budget is 2e-06 GB" in caplog.text


def test_a_lora_of_strength_0_makes_no_branch_and_touches_no_weight(patcher):
    patcher.patches = {KEY: [(0.0, adapter(24, 32, 2), 1.0, None, None)]}
    patcher.load(CPU)
    assert not hasattr(layer_of(patcher), "nvfp4_lora") and patcher.log == []


def test_unpatching_drops_the_branch_unless_the_weights_are_to_stay(patcher):
    patcher.patches = {KEY: patches_of("one", 24, 32)}
    patcher.load(CPU)
    patcher.unpatch_model(unpatch_weights=False)
    assert hasattr(layer_of(patcher), "nvfp4_lora")
    patcher.unpatch_model()
    assert not hasattr(layer_of(patcher), "nvfp4_lora")


def test_clones_make_branches_too_and_share_those_of_the_model(patcher):
    clone = patcher.clone()
    clone.patches = {KEY: patches_of("one", 24, 32)}
    clone.load(CPU)
    assert hasattr(layer_of(patcher), "nvfp4_lora")
    patcher.load(CPU)
    assert not hasattr(layer_of(patcher), "nvfp4_lora")
    plain = HostPatcher(patcher.model)
    assert lora_patcher.use_branches(lora_patcher.use_branches(plain)) is plain
    assert type(plain).__mro__.count(HostPatcher) == 1


def test_the_host_is_told_of_the_adapters_bytes(patcher):
    assert patcher.memory_required((1,)) == 1000
    patcher.patches = {KEY: patches_of("three", 24, 32)}
    expected = 1000 + 2 * 22 * (24 + 32) + 4 * 22
    assert patcher.memory_required((1,)) == expected
    patcher.load(CPU)
    assert patcher.memory_required((1,)) == expected == 1000 + layer_of(patcher).nvfp4_lora.nbytes


def test_a_hook_adds_its_lora_to_the_model_s_and_takes_it_off_again(patcher):
    x = torch.randn(5, 32).bfloat16()
    patcher.patches, patcher.hook_patches = {KEY: patches_of("one", 24, 32)}, {KEY: patches_of("negative", 24, 32)}
    patcher.load(CPU)
    layer = layer_of(patcher)
    constant, before = layer.nvfp4_lora, layer(x)
    group = namedtuple("Group", "hooks")([Hook("a", 1.0)])
    patcher.patch_hooks(group)
    assert layer.nvfp4_lora.down.shape[0] == constant.down.shape[0] + 3
    hooked = layer.nvfp4_lora
    patcher.patch_hooks(None)
    assert layer.nvfp4_lora is constant and torch.equal(layer(x), before)
    patcher.patch_hooks(group)
    assert layer.nvfp4_lora is hooked, "it is kept for the next step"
    at_one = layer(x)
    patcher.hook_patches = {KEY: [(0.5, *patcher.hook_patches[KEY][0][1:])]}
    patcher.patch_hooks(namedtuple("Group", "hooks")([Hook("a", 0.5)]))
    assert layer.nvfp4_lora is hooked and not torch.equal(layer(x), at_one), "a keyframe changes the strength only"
    patcher.load(CPU)
    assert layer.nvfp4_lora is constant and patcher.log == []
    patcher.patch_hooks(group)
    patcher.unpatch_model()
    assert not hasattr(layer, "nvfp4_lora")


def test_a_hook_that_is_no_plain_lora_is_the_host_s_work(patcher):
    patcher.hook_patches = {KEY: [(1.0, adapter(24, 32, 2, name="lokr"), 1.0, None, None)]}
    patcher.patch_hooks(namedtuple("Group", "hooks")([Hook("a", 1.0)]))
    assert patcher.log == [KEY] and not hasattr(layer_of(patcher), "nvfp4_lora")


def test_a_host_that_cannot_save_patched_packed_weights_keeps_its_own_way(monkeypatch):
    monkeypatch.delattr(comfy.model_patcher, "LazyCastingQuantizedParam", raising=False)
    layer, _ = build(24, 32)
    found = lora_patcher.use_branches(HostPatcher(torch.nn.ModuleDict({"to_q": layer})))
    assert type(found) is HostPatcher
