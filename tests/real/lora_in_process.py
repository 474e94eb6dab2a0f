# SPDX-License-Identifier: Apache-2.0
"""Facts about LoRA inside a real ComfyUI process on the CPU, as one line of JSON; run by test_lora_host.py.

usage: <the host's python> lora_in_process.py <empty folder>, in the folder of a ComfyUI checkout

"merged" is the host's own loader with the unquantised or the decoded BF16 weights and the LoRA, "stock" the host's own
loader of the NVFP4 file, which packs the patched weights again.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

MARK = "facts: "


def load(name: str):
    return importlib.import_module(name)


def error(found, expected) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def missed(found, without, expected) -> float:
    """Error of latents in terms of what the LoRA does to them: after a few steps they are mostly the noise."""
    return ((found - expected).norm() / (expected - without).norm()).item()


class Loras:
    """Two LoRAs of the small model: that of ``Scene``, and another of higher rank with an alpha."""

    def __init__(self, scene):
        torch = load("torch")
        self.scene = scene
        self.first = load("comfy.utils").load_torch_file(str(scene.folder / load("in_process").LORA))
        generator = torch.Generator().manual_seed(3)
        self.second = {}
        for layer in scene.lora_layers:
            rows, cols = scene.state[f"{layer}.weight"].shape
            name = f"diffusion_model.{layer}"
            self.second[f"{name}.lora_A.weight"] = torch.randn(6, cols, generator=generator) / cols**0.5
            self.second[f"{name}.lora_B.weight"] = torch.randn(rows, 6, generator=generator) * 0.1
            self.second[f"{name}.alpha"] = torch.tensor(3.0)

    def on(self, patcher, *strengths: float):
        for lora, strength in zip((self.first, self.second), strengths, strict=False):
            patcher = load("comfy.sd").load_lora_for_models(patcher, None, lora, strength, 0.0)[0]
        return patcher

    def change(self, layer: str, first: float, second: float = 0.0):
        name = f"diffusion_model.{layer}.lora"
        one, two = (lora[f"{name}_B.weight"].float() @ lora[f"{name}_A.weight"].float() for lora in self.both)
        return one * first + two * second * (3 / 6)

    @property
    def both(self) -> tuple:
        return self.first, self.second


def linears(patcher, scene) -> list:
    return [(layer, patcher.model.diffusion_model.get_submodule(layer)) for layer in scene.lora_layers]


def branches(patcher, scene) -> int:
    return sum("nvfp4_lora" in module.__dict__ for _, module in linears(patcher, scene))


def layer_errors(patcher, loras: Loras, state: dict, *strengths: float, tokens: int = 7) -> list[float]:
    """Of each layer's output for BF16 inputs, against FP32 with the weights of ``state`` and the LoRAs."""
    torch, scene = load("torch"), loras.scene
    generator, found = torch.Generator().manual_seed(4), []
    for layer, module in linears(patcher, scene):
        x = torch.randn(tokens, module.in_features, generator=generator).bfloat16()
        weight = state[f"{layer}.weight"].float() + loras.change(layer, *strengths)
        wanted = torch.nn.functional.linear(x.float(), weight, scene.state[f"{layer}.bias"].float())
        with torch.no_grad():
            found.append(error(module(x), wanted))
    return found


def errors(scene, loras: Loras) -> dict:
    """Ours and stock against merged LoRAs: latents and outputs of layers."""
    management, merged = load("comfy.model_management"), {}
    for kind in ("bf16", "bf16_decoded"):
        patcher = scene.stock(kind)
        merged[kind] = scene.sample(patcher), scene.sample(loras.on(patcher, 1.0))
    found: dict = {"latents": {}, "layers": {}}
    for name, patcher in {"ours": scene.ours("comfy_markers"), "stock": scene.stock("comfy_markers")}.items():
        patched = loras.on(patcher, 1.0)
        latents = scene.sample(patched)
        found["latents"][name] = {kind: missed(latents, *both) for kind, both in merged.items()}
        management.load_models_gpu([patched])
        found["layers"][name] = {
            kind: layer_errors(patched, loras, state, 1.0)
            for kind, state in (("bf16", scene.state), ("bf16_decoded", scene.decoded))
        }
        found["layers"][name]["many tokens"] = layer_errors(patched, loras, scene.decoded, 1.0, tokens=400)
        found["layers"][name]["branches"] = branches(patched, scene)
        management.unload_all_models()
        found["layers"][name]["branches left"] = branches(patched, scene)
    return found | {"layers_changed": len(scene.lora_layers)}


def strengths(scene, loras: Loras) -> dict:
    """Several LoRAs at several strengths on clones of one patcher, in turn, and what is left of them."""
    torch, management = load("torch"), load("comfy.model_management")
    patcher = scene.ours("comfy_markers")
    before = scene.sample(patcher)
    found: dict = {"errors": {}}
    for pair in ((1.0,), (0.5,), (-0.75,), (1.0, 0.6), (0.3, -1.2)):
        patched = loras.on(patcher, *pair)
        management.load_models_gpu([patched])
        name = " and ".join(map(str, pair))
        found["errors"][name] = max(layer_errors(patched, loras, scene.decoded, *pair))
    kept = [linear.__dict__["nvfp4_lora"] for _, linear in linears(patched, scene)[1:]]
    other = loras.on(patcher, 0.9, 0.4)
    management.load_models_gpu([other])
    now = [linear.__dict__["nvfp4_lora"] for _, linear in linears(other, scene)[1:]]
    found["another strength moves nothing"] = all(map(lambda one, two: one is two, kept, now))
    found["errors"]["0.9 and 0.4"] = max(layer_errors(other, loras, scene.decoded, 0.9, 0.4))
    one = loras.on(patcher, 1.0)
    latents = scene.sample(one)
    places = [module.__dict__["nvfp4_lora"].down.data_ptr() for _, module in linears(one, scene)[1:]]
    scene.sample(one)
    again = [module.__dict__["nvfp4_lora"].down.data_ptr() for _, module in linears(one, scene)[1:]]
    found["addresses stay"] = places == again
    zero = scene.sample(load("comfy.sd").load_lora_for_models(patcher, None, loras.first, 0.0, 0.0)[0])
    zeros = patcher.clone()
    key_map = load("comfy.lora").model_lora_keys_unet(patcher.model, {})
    zeros.add_patches(load("comfy.lora").load_lora(loras.first, key_map), 0.0)
    found["zero"] = torch.equal(zero, before) and torch.equal(scene.sample(zeros), before)
    found["removed"] = torch.equal(scene.sample(patcher), before)
    found["put back"] = torch.equal(scene.sample(one), latents)
    found["differs"] = not torch.equal(latents, before)
    return found


def hooks(scene, loras: Loras) -> dict:
    """A LoRA of the positive conditioning only, against the same LoRA on the model; keyframes; after it."""
    torch, comfy_hooks = load("torch"), load("comfy.hooks")
    patcher = scene.ours("comfy_markers")
    before = scene.sample(patcher)
    group = comfy_hooks.create_hook_lora(loras.first, 1.0, 0.0)
    hooked = scene.sample(patcher, hooks=group)
    constant = scene.sample(loras.on(patcher, 1.0))
    both = scene.sample(loras.on(patcher, 1.0, 0.5))
    second = comfy_hooks.create_hook_lora(loras.second, 0.5, 0.0)
    on_top = scene.sample(loras.on(patcher, 1.0), hooks=second)
    frames = comfy_hooks.HookKeyframeGroup()
    frames.add(comfy_hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    off = comfy_hooks.create_hook_lora(loras.first, 1.0, 0.0)
    off.set_keyframes_on_hooks(frames)
    found = {
        "against the constant one": missed(hooked, before, constant),
        "on top of another": missed(on_top, before, both),
        "restored": torch.equal(scene.sample(patcher), before),
        "keyframe of strength 0": torch.equal(scene.sample(patcher, hooks=off), before),
        "constant one again": torch.equal(scene.sample(loras.on(patcher, 1.0)), constant),
    }
    try:
        scene.sample(scene.stock("comfy_markers"), hooks=group)
        found["stock"] = "works"
    except Exception as failure:
        found["stock"] = type(failure).__name__
    return found


def saving(scene, loras: Loras) -> dict:
    """What a model with a LoRA is saved as: ours and the host's own, tensor by tensor."""
    torch = load("torch")
    states = {}
    for name, patcher in {"ours": scene.ours("comfy_markers"), "stock": scene.stock("comfy_markers")}.items():
        patched = loras.on(patcher, 1.0)
        before = scene.sample(patched)
        path = scene.path(f"saved_{name}")
        load("comfy.sd").save_checkpoint(path, patched, metadata={})
        states[name] = load("comfy.utils").load_torch_file(path)
        after = torch.equal(scene.sample(patched), before)
        states[name + " samples as before"] = after
    ours, stock = states["ours"], states["stock"]
    raw = load("comfy.utils").load_torch_file(scene.path("comfy_markers"))
    changed = [
        layer
        for layer in scene.lora_layers
        if not torch.equal(
            ours[f"model.diffusion_model.{layer}.weight"].view(torch.uint8),
            next(value for key, value in raw.items() if key.endswith(f"{layer}.weight")).view(torch.uint8),
        )
    ]
    offloaded = loras.on(scene.ours("comfy_markers"), 1.0)
    offloaded.patch_model(load_weights=False)
    offloaded.load(offloaded.load_device, lowvram_model_memory=1)
    state = offloaded.state_dict_for_saving()
    pieces = all(_same(ours[key], state[key].to("cpu")) for key in ours)
    offloaded.detach()
    return {
        "equal from offloaded layers": ours.keys() == state.keys() and pieces,
        "equal": ours.keys() == stock.keys() and all(_same(ours[key], stock[key]) for key in ours),
        "changed": len(changed),
        "layers": len(scene.lora_layers),
        "samples as before": states["ours samples as before"],
    }


def _same(one, other) -> bool:
    torch = load("torch")
    one, other = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return torch.equal(one, other)


def partial(scene, loras: Loras) -> dict:
    """Layers that stay offloaded, or are moved off the device later."""
    patched = loras.on(scene.ours("comfy_markers"), 1.0)
    patched.patch_model(load_weights=False)
    patched.load(patched.load_device, lowvram_model_memory=1)
    found = {"low VRAM": layer_errors(patched, loras, scene.decoded, 1.0)}
    found["low VRAM, waiting"] = sum(bool(module.weight_function) for _, module in linears(patched, scene))
    patched.detach()
    load("comfy.model_management").load_models_gpu([patched])
    patched.partially_unload(patched.offload_device, 1e12)
    found["unloaded"] = layer_errors(patched, loras, scene.decoded, 1.0)
    found["unloaded, waiting"] = sum(bool(module.weight_function) for _, module in linears(patched, scene))
    patched.detach()
    found["left"] = branches(patched, scene)
    return found


def dynamic(scene, loras: Loras) -> dict:
    """The host's patcher for DynamicVRAM, which a CPU does not get: its ``load``, without memory to manage."""
    model_patcher = load("comfy.model_patcher")
    make = load("nvfp4_video.host.compute.lora_patcher")._patcher_class
    load("comfy_aimdo.host_buffer").HostBuffer = lambda *sizes: None
    found = {}
    for name, strengths in {"one": (1.0,), "two": (0.4, 0.8), "none": ()}.items():
        patcher = loras.on(scene.ours("comfy_markers"), *strengths)
        patcher.__class__ = make(model_patcher.ModelPatcherDynamic)
        patcher.model.dynamic_vbars, patcher.model.dynamic_pins, patcher.model.dynamic_patchers = {}, {}, set()
        patcher.register_load_device(patcher.load_device)
        patcher.load(patcher.load_device)
        owns = [module.__dict__ for _, module in linears(patcher, scene)]
        waiting = sum(own.get("weight_lowvram_function") is not None for own in owns[1:])
        small = sum(f"diffusion_model.{layer}.weight" in patcher.backup for layer in scene.lora_layers)
        found[name] = {"waiting": waiting, "small": small, "branches": branches(patcher, scene)}
        errors_of = layer_errors(patcher, loras, scene.decoded, *strengths) if strengths else ()
        pairs = zip(errors_of, owns, strict=False)
        found[name]["errors"] = [one for one, own in pairs if "nvfp4_lora" in own]
        patcher.__class__ = make(model_patcher.ModelPatcher)
    return found


def refused(scene, loras: Loras) -> dict:
    """A DoRA, a LoKr and a strength of the model: the host's way, on the stock model and on ours alike."""
    torch = load("torch")
    layer = scene.lora_layers[1]
    rows, cols = scene.state[f"{layer}.weight"].shape
    name = f"diffusion_model.{layer}"
    generator = torch.Generator().manual_seed(5)
    lokr = {f"{name}.lokr_w1": torch.randn(2, 2, generator=generator) * 0.1}
    lokr[f"{name}.lokr_w2"] = torch.randn(rows // 2, cols // 2, generator=generator) * 0.1
    dora = {key: value for key, value in loras.first.items() if key.startswith(f"{name}.lora")}
    dora[f"{name}.dora_scale"] = torch.ones(rows, 1)
    found = {}
    for kind, tensors in {"lokr": lokr, "dora": dora}.items():
        latents = []
        for patcher in (scene.ours("comfy_markers"), scene.stock("comfy_markers")):
            patched = load("comfy.sd").load_lora_for_models(patcher, None, tensors, 1.0, 0.0)[0]
            latents.append(scene.sample(patched))
            if not latents[1:]:
                own = patched.model.diffusion_model.get_submodule(layer).__dict__
                found[kind] = {"reason": own["nvfp4_lora_refused"], "branch": "nvfp4_lora" in own}
        found[kind]["equal"] = torch.equal(*latents)
    return found


def compiling(scene, loras: Loras) -> dict:
    """Graph breaks of a Linear with a branch, few and many rows, and whole latents the host's way."""
    torch, dynamo = load("torch"), load("torch._dynamo")
    helpers = load("comfy_api.torch_helpers")
    patched = loras.on(scene.ours("comfy_markers"), 1.0)
    eager = scene.sample(patched, steps=1)
    layer = patched.model.diffusion_model.get_submodule(scene.lora_layers[1])
    found: dict = {"branch": "nvfp4_lora" in layer.__dict__, "graphs": [], "difference": []}
    for tokens in (7, 400):
        x = torch.randn(1, tokens, layer.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            dynamo.reset()
            explained = dynamo.explain(layer)(x)
            found["graphs"].append([explained.graph_count, explained.graph_break_count])
            dynamo.reset()
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            found["difference"].append(error(compiled(x), layer(x)))
    dynamo.reset()
    clone = patched.clone()
    helpers.set_torch_compile_wrapper(model=clone, backend="aot_eager")
    found["latents"] = error(scene.sample(clone, steps=1), eager)
    return found


def fp8(scene, loras: Loras) -> dict:
    """FP8 compute, by the torch backend for any number of tokens: a LoRA changes it as it changes merged weights."""
    compute, kernels = load("nvfp4_video.host.compute.modes"), load("nvfp4_video.kernels.fp8")
    kernels.obstacle = lambda device: ""
    compute.obstacle = lambda mode, device: ""
    load("nvfp4_video.host.compute.matmul").least_rows = lambda *_: 1
    patcher = scene.ours("comfy_markers", compute="fp8")
    plain, patched = scene.sample(patcher), scene.sample(loras.on(patcher, 1.0))
    decoded = scene.stock("bf16_decoded")
    expected = scene.sample(decoded), scene.sample(loras.on(decoded, 1.0))
    return {
        "layers": sum(module.__dict__["nvfp4_mode"] == "fp8" for _, module in linears(patcher, scene)),
        # The part of the effect that FP8 itself misses without a LoRA, and of the effect with one.
        "plain": ((plain - expected[0]).norm() / (expected[1] - expected[0]).norm()).item(),
        "patched": missed(patched, *expected),
        "effect": missed(patched - plain, patched * 0, expected[1] - expected[0]),
    }


TOPICS = (errors, strengths, hooks, saving, partial, dynamic, refused, compiling, fp8)


def main(folder: Path, names: list[str]) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = load("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    scene = in_process.Scene(folder)
    facts["ltx"] = scene.ltx
    if scene.ltx is not None:
        load("nvfp4_video.samples.synthetic").write(
            scene.path("bf16"), "bf16", scene.state, scene.config, scene.packed
        )
        facts |= in_process.run_topics(TOPICS, names, scene, Loras(scene))
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
