# SPDX-License-Identifier: Apache-2.0
"""What DynamicVRAM writes into the layers of a loaded model, as one line of JSON; run by test_residency_host.py and by
record_contract.py.

usage: <the host's python> dynamic_in_process.py <empty folder>, in the folder of a ComfyUI checkout

The host's own ``ModelPatcherDynamic.load``, block prefetch and ``cast_bias_weight`` run on the CPU; only the library
that manages GPU memory is replaced, by one that always has room.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

MARK = "facts: "
RECORDED = ("loaded", "prefetch", "brought")


def load(name: str):
    return importlib.import_module(name)


def dynamic_patcher(scene, make=None):
    """Our patcher of the small model with a LoRA, turned into one for DynamicVRAM and loaded; all layers in one block.

    ``make``: what makes a patcher class of the host's.
    """
    torch, model_patcher = load("torch"), load("comfy.model_patcher")
    load("comfy_aimdo.host_buffer").HostBuffer = lambda *sizes: None
    patcher = scene.with_lora(scene.ours("comfy_markers"))
    patcher.__class__ = make(model_patcher.ModelPatcherDynamic)
    patcher.model.dynamic_vbars, patcher.model.dynamic_pins, patcher.model.dynamic_patchers = {}, {}, set()
    patcher.register_load_device(patcher.load_device)
    patcher.load(patcher.load_device)
    vbar = load("comfy_aimdo.model_vbar")
    vbar.vbar_fault = lambda v: ("signature", v)
    vbar.vbar_signature_compare = lambda one, other: one == other
    vbar.vbar_unpin = lambda v: None
    load("comfy_aimdo.torch").aimdo_to_tensor = lambda v, device: torch.zeros(v[2], dtype=torch.uint8)
    load("comfy.cli_args").args.disable_pinned_memory = True
    return patcher


def names(layer) -> list[str]:
    """What the pack may ask for, of what the layer has."""
    known = ("_v", "_prefetch", "_v_weight", "_v_bias", "_v_signature")
    kinds = [f"{parameter}_{kind}" for parameter in ("weight", "bias") for kind in ("function", "lowvram_function")]
    return [name for name in (*known, *kinds) if name in layer.__dict__]


def books(scene) -> dict:
    """Names in a layer with a LoRA after the host's own ``load`` and after it was brought; keys of ``_prefetch``."""
    memory, ops = load("comfy.memory_management"), load("comfy.ops")
    patcher = dynamic_patcher(scene, lambda host: host)
    model = patcher.model.diffusion_model
    key, layer = next((key, found) for key in scene.lora_layers if large(found := model.get_submodule(key)))
    found: dict = {"loaded": names(layer)}
    residency = load("nvfp4_video.host.residency")
    found["patched"] = residency.patched(layer)
    found["patch left"] = residency.take_patch(layer, f"diffusion_model.{key}.weight")
    found["patched afterwards"] = residency.patched(layer)
    layer._v = (0, 0, memory.vram_aligned_size([layer.weight, layer.bias]))
    device = patcher.load_device
    ops.cast_modules_with_vbar([layer], None, device, None, False)
    found["prefetch"] = sorted(layer._prefetch)
    found["resident before it is brought"] = residency.resident(layer.__dict__, device) is not None
    dtype = layer.weight._params.orig_dtype
    weight, bias = ops.resolve_cast_module_with_vbar(layer, dtype, device, dtype, None, False)
    found["brought"] = names(layer)
    held = residency.resident(layer.__dict__, device)
    found["what the host brings"] = held is not None and held[0] is weight and held[1] is bias
    same = [(held[0]._qdata, layer.weight._qdata), (held[1], layer.bias)] if held else [(weight, None)]
    found["equal"] = all(load("torch").equal(one, other) for one, other in same)
    return found


def hooked(scene) -> dict:
    """What the pack's wrapper of the model and its clean-up get when a dynamic model is sampled with a weight hook."""
    extension, lora_patcher = load("comfy.patcher_extension"), load("nvfp4_video.host.compute.lora_patcher")
    patcher = dynamic_patcher(scene, lora_patcher._patcher_class)
    patcher.non_dynamic_delegate_model = None  # as its __init__ leaves it
    entered, branched, cleaned = [], [], []

    def wrapper(executor, *given, **named):
        linears = [module for module in executor.class_obj.modules() if "nvfp4_mode" in module.__dict__]
        entered.append(executor.class_obj)
        branched.append(sum("nvfp4_lora" in module.__dict__ for module in linears))
        return executor(*given, **named)

    patcher.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    patcher.add_callback_with_key(extension.CallbacksMP.ON_CLEANUP, "test", lambda one: cleaned.append(one.model))
    lora = load("comfy.utils").load_torch_file(str(scene.folder / "change.safetensors"))
    scene.sample(patcher, hooks=load("comfy.hooks").create_hook_lora(lora, 1.0, 0.0))
    return {
        "models": len({id(model) for model in entered}),
        "the loaded one": patcher.model.diffusion_model in entered,
        "cleaned up": [model.diffusion_model for model in cleaned] == entered[:1],
        "branches": min(branched) > 0,
    }


def large(layer) -> bool:
    """Whether DynamicVRAM would manage it."""
    return layer.weight._qdata.nbytes > 16 * 1024 if hasattr(layer.weight, "_qdata") else False


def main(folder: Path) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = load("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    scene = in_process.Scene(folder)
    facts["ltx"], facts["checked"] = scene.ltx, str(load("nvfp4_video.host.residency").check())
    if scene.ltx is not None and hasattr(load("comfy.model_patcher"), "ModelPatcherDynamic"):
        for topic in (books, hooked):
            try:
                facts[topic.__name__] = topic(scene)
            except Exception:
                facts[topic.__name__] = {"failed": traceback.format_exc()}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
