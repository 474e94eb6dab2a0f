# SPDX-License-Identifier: Apache-2.0
"""Facts about the pack inside a real ComfyUI process on the CPU, as one line of JSON; run by test_in_process.py.

usage: <the host's python> in_process.py <empty folder>, in the folder of a ComfyUI checkout

Each function of ``TOPICS`` gets a ``Scene`` and returns what it found; one that fails leaves {"failed": traceback}, so
that the others still report. ComfyUI is brought up as its main.py does it, without the server.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

MARK = "facts: "
LORA = "change.safetensors"


class Scene:
    """The small model's files in ``folder``, and the modules the topics share."""

    def __init__(self, folder: Path):
        synthetic = importlib.import_module("nvfp4_video.samples.synthetic")
        self.folder = folder
        self.ltx = importlib.import_module("nvfp4_video.tests.real.harness").small_model(Path.cwd())
        if self.ltx is None:
            return
        self.state, self.config = getattr(synthetic, f"small_{self.ltx}")()
        self.packed = synthetic.quantize_layers(self.state, self.config)
        self.decoded = synthetic.decoded_state(self.state, self.packed)
        for kind in ("comfy_markers", "modelopt", "bf16_decoded"):
            synthetic.write(self.path(kind), kind, self.state, self.config, self.packed)
        self.lora_layers = synthetic.write_lora(folder / LORA, self.state, self.config)

    def path(self, kind: str) -> str:
        return str(self.folder / f"{kind}.safetensors")

    def ours(self, kind: str, **options):
        """Our loader's patcher."""
        return importlib.import_module("nvfp4_video.host.load.model").load_model(self.path(kind), **options)[0]

    def stock(self, kind: str):
        """The host's own loader's patcher."""
        return comfy("sd").load_diffusion_model(self.path(kind))

    def with_lora(self, patcher):
        lora = comfy("utils").load_torch_file(str(self.folder / LORA))
        return comfy("sd").load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]

    def sample(self, patcher, steps: int = 2, hooks=None):
        """Joint audio and video latents of the first distilled steps, flat in one FP32 tensor.

        ``hooks``: a group of weight hooks for the positive conditioning.
        """
        torch = importlib.import_module("torch")
        nested = comfy("nested_tensor").NestedTensor
        graphs = importlib.import_module("nvfp4_video.tests.real.graphs")
        generator = torch.Generator().manual_seed(1)
        shapes = ((1, 128, 2, 2, 2), (1, 8, 9, 16))
        noise = nested([torch.randn(shape, generator=generator) for shape in shapes])
        text = torch.randn(1, 32, graphs.context_width(self.config), generator=generator)
        conditioning = [[text, {"frame_rate": 25.0}]]
        positive = conditioning
        if hooks is not None:
            positive = comfy("hooks").set_hooks_for_conditioning(conditioning, hooks)
        result = comfy("sample").sample_custom(
            patcher,
            noise,
            1.0,
            comfy("samplers").sampler_object("euler"),
            torch.tensor([float(sigma) for sigma in graphs.SIGMAS.split(",")][: steps + 1]),
            positive,
            conditioning,
            nested([torch.zeros(shape) for shape in shapes]),
            disable_pbar=True,
            seed=1,
        )
        return torch.cat([stream.float().flatten() for stream in result.unbind()])


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def is_quantized(weight) -> bool:
    return hasattr(weight, "_qdata")


def plain(weight):
    """A weight as BF16, dequantised if need be."""
    return (weight.dequantize() if is_quantized(weight) else weight).bfloat16()


def memory(scene: Scene) -> dict:
    """Bytes of the loaded model that lie in the mapped file, and bytes that are copies."""
    path = scene.path("comfy_markers")
    patcher = scene.ours("comfy_markers")
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(path)]
    mapped = [(int(start, 16), int(end, 16)) for start, end in ranges]

    def in_file(tensor) -> bool:
        return any(start <= tensor.data_ptr() < end for start, end in mapped)

    found = {"packed": [0, 0], "scales": [0, 0], "other": [0, 0]}
    for module in patcher.model.diffusion_model.modules():
        for name, value in module._parameters.items():
            if value is None:
                continue
            parts = [("other", value)]
            if name == "weight" and is_quantized(value):
                parts = [("packed", value._qdata), ("scales", value._params.block_scale)]
            for part, tensor in parts:
                found[part][in_file(tensor)] += tensor.nbytes
    totals = {part: {"copied": copied, "mapped": in_map} for part, (copied, in_map) in found.items()}
    return totals | {"file": Path(path).stat().st_size, "model_size": patcher.model_size()}


def equality(scene: Scene) -> dict:
    """Latents of our loader against the host's on the decoded weights, and calls of the host's forward for NVFP4."""
    torch = importlib.import_module("torch")
    reference = scene.sample(scene.stock("bf16_decoded"))
    found = {kind: torch.equal(scene.sample(scene.ours(kind)), reference) for kind in ("comfy_markers", "modelopt")}
    patcher, calls = scene.ours("comfy_markers"), []
    host_linear = type(patcher.model.diffusion_model.get_submodule(next(iter(scene.packed)))).__bases__[0]
    forward = host_linear.forward

    def recorded(self, *args, **kwargs):
        calls.append(getattr(self, "quant_format", None))
        return forward(self, *args, **kwargs)

    host_linear.forward = recorded
    again = scene.sample(patcher)
    host_linear.forward = forward
    found |= {"calls_of_host_s_forward": {"plain": calls.count(None), "nvfp4": calls.count("nvfp4")}}
    return found | {"finite": bool(reference.isfinite().all()), "again": torch.equal(again, reference)}


def compiling(scene: Scene) -> dict:
    """Graph breaks of our own code, and latents of the host's torch.compile path."""
    torch = importlib.import_module("torch")
    dynamo = importlib.import_module("torch._dynamo")
    helpers = importlib.import_module("comfy_api.torch_helpers")
    patcher = scene.ours("comfy_markers")
    eager = scene.sample(patcher, steps=1)
    dit = patcher.model.diffusion_model
    block, seen = dit.transformer_blocks[2], []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    scene.sample(patcher, steps=1)
    hook.remove()
    args, kwargs = seen[0]
    layer = block.attn1.to_q
    x = torch.randn(1, 7, layer.in_features, dtype=torch.bfloat16)
    found = {}
    with torch.no_grad():
        for name, module, given, named in (("linear", layer, (x,), {}), ("block", block, args, kwargs)):
            dynamo.reset()
            explained = dynamo.explain(module)(*given, **named)
            found[name] = {"graphs": explained.graph_count, "breaks": breaks_of(explained)}
        dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found["linear"]["equal"] = torch.equal(compiled(x), layer(x))
    dynamo.reset()
    clone = patcher.clone()
    helpers.set_torch_compile_wrapper(model=clone, backend="aot_eager")
    difference = (scene.sample(clone, steps=1) - eager).abs().max().item()
    again = torch.equal(scene.sample(patcher, steps=1), eager)
    return found | {"difference": difference, "largest": eager.abs().max().item(), "eager_again": again}


def breaks_of(explained) -> list[dict]:
    """Reason of every graph break, and the frames of it that lie in the pack."""
    pack = str(Path(__file__).resolve().parents[2])
    found = []
    for one in explained.break_reasons:
        frames = [f"{frame.filename}:{frame.lineno}" for frame in one.user_stack]
        own = [frame for frame in frames if frame.startswith(pack) and "/tests/" not in frame]
        found.append({"reason": one.reason[:300], "own": own, "last": frames[-1:]})
    return found


def reloading(scene: Scene) -> dict:
    """What the host does with ``cached_patcher_init``: clones that own their weights."""
    torch = importlib.import_module("torch")
    signature = importlib.import_module("inspect").signature
    patcher = scene.ours("modelopt")
    reference = scene.sample(patcher)
    factory, arguments = patcher.cached_patcher_init
    clones = {"factory": factory(*arguments, disable_dynamic=True)}
    parameters = signature(patcher.clone).parameters
    if "disable_dynamic" in parameters:
        clones["disable_dynamic"] = patcher.clone(disable_dynamic=True)
    if "force_deepcopy" in parameters:
        clones["force_deepcopy"] = patcher.clone(force_deepcopy=True)
    if hasattr(patcher, "deepclone_multigpu"):
        clones["deepclone_multigpu"] = patcher.deepclone_multigpu()
    return {
        name: {
            "equal": torch.equal(scene.sample(clone), reference),
            "own_weights": clone.model is not patcher.model,
            "packed": sum(is_quantized(getattr(m, "weight", None)) for m in clone.model.diffusion_model.modules()),
        }
        for name, clone in clones.items()
    } | {"layers": len(scene.packed)}


def saving(scene: Scene) -> dict:
    """A model saved by the host, read back by our loader and by the host's."""
    torch = importlib.import_module("torch")
    safetensors = importlib.import_module("safetensors")
    patcher = scene.ours("modelopt")
    path = scene.path("saved")
    comfy("sd").save_checkpoint(path, patcher, metadata={})
    with safetensors.safe_open(path, "pt") as file:
        header = sorted(file.metadata() or {})
    refusal = ""
    try:
        scene.ours("saved")
    except ValueError as error:
        refusal = str(error)
    state = comfy("utils").load_torch_file(path)
    metadata = {"config": json.dumps({"transformer": scene.config})}
    stock = comfy("sd").load_diffusion_model_state_dict(state, metadata=metadata)
    readers = {"ours": scene.ours("saved", config_from=scene.path("comfy_markers")), "stock": stock}
    reference = scene.sample(patcher)
    # Older hosts do not build all of the file's modules; what they build must be right.
    built = patcher.model.diffusion_model.state_dict()
    decoded = {key: value for key, value in scene.decoded.items() if key in built}
    found = {"header": header, "refusal": refusal}
    for name, reader in readers.items():
        dit = reader.model.diffusion_model
        weights = [torch.equal(plain(dit.get_parameter(key)), value) for key, value in decoded.items()]
        packed = sum(is_quantized(dit.get_submodule(layer).weight) for layer in scene.packed)
        # The weights are the same, but at other addresses of a mapped file, by which a CPU's matmul may choose its way.
        equal = bool((scene.sample(reader) - reference).abs().max() <= 1e-6 * reference.abs().max())
        found[name] = {"weights": all(weights), "packed": packed, "latents": equal}
    return found | {"layers": len(scene.packed)}


def low_vram(scene: Scene) -> dict:
    """Layers left offloaded by a small memory budget, without and with a LoRA: against the ideal and the host's own."""
    torch = importlib.import_module("torch")
    change = comfy("utils").load_torch_file(str(scene.folder / LORA))
    found = {"layers": len(scene.packed)}
    for name, prepare in (("plain", lambda patcher: patcher), ("lora", scene.with_lora)):
        patchers = [prepare(scene.ours("comfy_markers")), prepare(scene.stock("comfy_markers"))]
        for patcher in patchers:
            patcher.patch_model(load_weights=False)
            patcher.load(patcher.load_device, lowvram_model_memory=1)
        errors, equal, waiting = [], 0, 0
        for layer in scene.packed:
            own, other = (patcher.model.diffusion_model.get_submodule(layer) for patcher in patchers)
            waiting += bool(own.weight_function)
            ideal = scene.decoded[f"{layer}.weight"].float()
            if name == "lora" and layer in scene.lora_layers:
                up, down = (change[f"diffusion_model.{layer}.lora_{part}.weight"].float() for part in "BA")
                ideal = ideal + up @ down
            x = torch.randn(3, own.in_features)
            output, wanted = own(x), torch.nn.functional.linear(x, ideal, scene.state[f"{layer}.bias"].float())
            errors.append(((output - wanted).norm() / wanted.norm()).item())
            equal += torch.equal(output, other(x))
        model = patchers[0].model
        found[name] = {"low_vram": model.model_lowvram, "waiting": waiting, "equal_stock": equal, "error": max(errors)}
        for patcher in patchers:
            patcher.detach()
    return found


def flux(scene: Scene) -> dict:
    """A tiny FLUX made with the host's own class, all its big Linears in NVFP4: detected dimensions, and its output."""
    torch = importlib.import_module("torch")
    save_file = importlib.import_module("safetensors.torch").save_file
    reference = importlib.import_module("nvfp4_video.kernels.reference")
    dimensions = {"in_channels": 16, "hidden_size": 128, "context_in_dim": 64, "vec_in_dim": 32}
    options = {"out_channels": 16, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1}
    rope = {"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "txt_ids_dims": []}
    rope |= {"qkv_bias": True, "guidance_embed": True}
    model = importlib.import_module("comfy.ldm.flux.model").Flux(
        **dimensions, **options, **rope, dtype=torch.bfloat16, operations=comfy("ops").disable_weight_init
    )
    generator = torch.Generator().manual_seed(2)
    marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    files: dict[str, dict] = {"flux_nvfp4": {}, "flux_decoded": {}}
    packed = []
    for key, tensor in model.state_dict().items():
        # The published files call the norms' gains `scale`; newer hosts call them `weight`.
        key = key.replace("_norm.weight", "_norm.scale")
        layer = key.removesuffix(".weight")
        value = (torch.randn(tensor.shape, generator=generator) * 0.5 / tensor.shape[-1] ** 0.5).bfloat16()
        if layer == key or value.ndim != 2 or layer.startswith(("final_layer", "time_in", "guidance_in")):
            value = torch.ones_like(value) if key.endswith("norm.scale") else value
            files["flux_nvfp4"][key] = files["flux_decoded"][key] = value
            continue
        record = reference.quantize(value, torch.tensor(2.0**-11))
        packed.append(layer)
        parts = {"weight": record.packed, "weight_scale": record.block_scale, "weight_scale_2": record.global_scale}
        files["flux_nvfp4"] |= {f"{layer}.{part}": part_value for part, part_value in parts.items()}
        files["flux_nvfp4"][f"{layer}.comfy_quant"] = marker.clone()
        files["flux_decoded"][key] = reference.dequantize(record)
    for name, tensors in files.items():
        save_file(tensors, scene.path(name))
    inputs = {
        "x": torch.randn(1, 16, 4, 4, generator=generator),
        "t": torch.tensor([0.5]),
        "c_crossattn": torch.randn(1, 8, 64, generator=generator),
        "y": torch.randn(1, 32, generator=generator),
        "guidance": torch.tensor([3.5]),
    }
    outputs, patchers = [], [scene.ours("flux_nvfp4"), scene.stock("flux_decoded")]
    for patcher in patchers:
        comfy("model_management").load_models_gpu([patcher])
        with torch.no_grad():
            outputs.append(patcher.model.apply_model(**inputs))
    config = patchers[0].model.model_config.unet_config
    dit = patchers[0].model.diffusion_model
    return {
        "class": type(patchers[0].model).__name__,
        "expected": dimensions,
        "detected": {name: config[name] for name in dimensions},
        "first_layers": all(is_quantized(m.weight) for m in (dit.img_in, dit.txt_in, dit.vector_in.in_layer)),
        "packed": sum(is_quantized(getattr(module, "weight", None)) for module in dit.modules()),
        "layers": len(packed),
        "finite": bool(outputs[0].isfinite().all()),
        "std": outputs[0].std().item(),
        "equal": torch.equal(*outputs),
    }


TOPICS = (memory, equality, compiling, reloading, saving, low_vram, flux)
FOR_ANY_HOST = (flux,)


def bring_up_host() -> str:
    """Import ComfyUI from the working directory as its main.py does it, on the CPU; returns its version."""
    # The host's own choice of attention on a CPU asks psutil for memory, which breaks torch.compile's graphs.
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention"]
    sys.path[0] = str(Path.cwd())
    importlib.import_module("comfy.options").enable_args_parsing()
    for name in ("utils.extra_config", "nodes"):
        importlib.import_module(name)
    package = types.ModuleType("nvfp4_video")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["nvfp4_video"] = package
    return importlib.import_module("comfyui_version").__version__


def run_topics(topics: Iterable[Callable[..., object]], names: Collection[str], *given: object) -> dict[str, object]:
    """What each topic, or each of ``names``, finds; of one that fails {"failed": traceback}."""
    facts: dict[str, object] = {}
    for topic in topics:
        if names and topic.__name__ not in names:
            continue
        try:
            facts[topic.__name__] = topic(*given)
        except Exception:
            facts[topic.__name__] = {"failed": traceback.format_exc()}
        comfy("model_management").unload_all_models()
    return facts


def main(folder: Path, names: list[str]) -> None:
    version = bring_up_host()
    scene = Scene(folder)
    topics = [topic for topic in TOPICS if scene.ltx is not None or topic in FOR_ANY_HOST]
    facts = {"version": version, "ltx": scene.ltx} | run_topics(topics, names, scene)
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
