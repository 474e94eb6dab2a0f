# SPDX-License-Identifier: Apache-2.0
"""Facts about the text encoder loader in a real ComfyUI process on the CPU, as one line of JSON; run by
test_text_encoder_host.py.

usage: <the host's python> text_encoder_child.py <empty folder>, in the folder of a ComfyUI checkout

The text encoder is that of small_gemma.py. The global scales are powers of two, so a BF16 file holds the dequantised
weights exactly and the host's own loader on that file is the reference.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

MARK = "facts: "
EMBEDDING = "model.embed_tokens.weight"


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def pack(name: str):
    return importlib.import_module(f"nvfp4_video.{name}")


def gemma():
    """The module with the dimensions."""
    return pack("tests.real.small_gemma")


class Scene:
    """The files in ``folder``: text encoders of the same weights in several dialects, and projections."""

    def __init__(self, folder: Path):
        self.g = g = gemma()
        self.folder, self.torch = folder, importlib.import_module("torch")
        self.save_file = importlib.import_module("safetensors.torch").save_file
        self.generator = self.torch.Generator().manual_seed(0)
        self.packed, self.plain = {}, {}
        self.tokenizer = self.torch.frombuffer(bytearray(g.tokenizer_bytes()), dtype=self.torch.uint8)
        self._make_weights()
        self.vision = self._vision()
        self.projections = ["single", *["dual"] * hasattr(comfy("text_encoders.lt"), "DualLinearProjection")]
        metadata = {"quantization_config": json.dumps({"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"})}
        self.write("comfy", self.stored("comfy"))
        self.write("modelopt", self.stored("modelopt"), metadata)
        self.write("bf16", self.plain | self.decoded() | self.vision)
        projections = {"video_aggregate_embed": g.VIDEO, "audio_aggregate_embed": g.AUDIO}
        self.dual, columns = {}, g.HIDDEN * (g.BLOCKS + 1)
        for name, width in projections.items():
            key = f"text_embedding_projection.{name}"
            self.dual |= {f"{key}.weight": self.random(width, columns), f"{key}.bias": self.random(width)}
        other = {"model.diffusion_model.patchify_proj.weight": self.random(16, 16)}
        self.write("dual", self.dual | other)
        self.write("single", {"text_embedding_projection.aggregate_embed.weight": self.random(g.VIDEO, columns)})

    def _make_weights(self) -> None:
        g = self.g
        reference = pack("kernels.reference")
        inner, kv = g.HEADS * g.HEAD_DIM, g.KV_HEADS * g.HEAD_DIM
        shapes = {"self_attn.q_proj": (inner, g.HIDDEN), "self_attn.k_proj": (kv, g.HIDDEN)}
        shapes |= {"self_attn.v_proj": (kv, g.HIDDEN), "self_attn.o_proj": (g.HIDDEN, inner)}
        shapes |= {
            "mlp.gate_proj": (g.INTERMEDIATE, g.HIDDEN),
            "mlp.up_proj": (g.INTERMEDIATE, g.HIDDEN),
        }
        shapes |= {"mlp.down_proj": (g.HIDDEN, g.INTERMEDIATE)}
        norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
        self.plain = {EMBEDDING: self.random(g.VOCABULARY, g.HIDDEN), "spiece_model": self.tokenizer}
        self.plain["model.norm.weight"] = self.random(g.HIDDEN)
        for block in range(g.BLOCKS):
            layer = f"model.layers.{block}."
            for name in (*norms, "post_feedforward_layernorm"):
                self.plain[f"{layer}{name}.weight"] = self.random(g.HIDDEN)
            for name in ("q_norm", "k_norm"):
                self.plain[f"{layer}self_attn.{name}.weight"] = self.random(g.HEAD_DIM)
            for name, shape in shapes.items():
                weight = self.random(*shape)
                if block in (0, g.BLOCKS - 1):
                    self.plain[f"{layer}{name}.weight"] = weight
                else:
                    self.packed[layer + name] = reference.quantize(weight, self.torch.tensor(2.0**-10))

    def _vision(self) -> dict:
        """The tower that looks at images, and its projector."""
        llama = comfy("text_encoders.llama")
        model = llama.Gemma3_12B({}, self.torch.bfloat16, "meta", comfy("ops").manual_cast)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("model.")}
        return {name: self.random(*shape) for name, shape in shapes.items()}

    def random(self, *shape: int):
        numbers = self.torch.randn(shape, generator=self.generator)
        return (numbers * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)).bfloat16()

    def stored(self, dialect: str) -> dict:
        """Every tensor of the file in the comfy or the ModelOpt dialect."""
        formats = pack("kernels.format")
        state = self.plain | self.vision
        for layer, record in self.packed.items():
            packed, scale = record.packed, record.block_scale
            if dialect == "modelopt":
                packed = formats.swap_nibbles(packed)
                scale = formats.unswizzle(scale, record.shape[0], record.shape[1] // 16)
            else:
                marker = bytearray(b'{"format": "nvfp4"}')
                state[f"{layer}.comfy_quant"] = self.torch.frombuffer(marker, dtype=self.torch.uint8).clone()
            parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": record.global_scale}
            state |= {f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()}
        return state

    def decoded(self) -> dict:
        dequantize = pack("kernels.reference").dequantize
        return {f"{layer}.weight": dequantize(r) for layer, r in self.packed.items()}

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.safetensors")

    def write(self, name: str, tensors: dict, metadata: dict | None = None) -> None:
        self.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.path(name), metadata)

    def ours(self, name: str, projection: str = "", **options):
        other = self.path(projection or self.projections[-1])
        return pack("host.load.text_encoder").load_text_encoder(self.path(name), other, **options)

    def stock(self, name: str, projection: str = ""):
        sd = comfy("sd")
        other = self.path(projection or self.projections[-1])
        return sd.load_clip([self.path(name), other], clip_type=sd.CLIPType.LTXV)

    def encode(self, clip):
        """The conditioning of the prompt."""
        with self.torch.no_grad():
            return clip.encode_from_tokens_scheduled(clip.tokenize(self.g.PROMPT))[0][0]

    def tokens(self, clip, count: int = 40) -> list[int]:
        """What the host's own token loop makes of the prompt, the likeliest token each time."""
        with self.torch.inference_mode():
            prompt = clip.tokenize(self.g.PROMPT, skip_template=False, min_length=1)
            return clip.generate(prompt, do_sample=False, max_length=count, seed=0)

    def forget(self, *clips) -> None:
        comfy("model_management").unload_all_models()


def conditioning(scene: Scene) -> dict:
    """What ours encodes against the host on the decoded weights, for both kinds of projection."""
    torch, found = scene.torch, {}
    for projection in scene.projections:
        width = scene.g.VIDEO + scene.g.AUDIO if projection == "dual" else scene.g.VIDEO
        wanted = scene.encode(scene.stock("bf16", projection))
        for name in ("comfy", "modelopt"):
            clip, report = scene.ours(name, projection)
            value = scene.encode(clip)
            found[f"{name} {projection}"] = {
                "equal": torch.equal(value, wanted),
                "width": value.shape[-1] == width,
                "varied": value.std().item() > 1e-3 and bool(value.isfinite().all()),
                "report": str(report),
            }
    return found


def generation(scene: Scene) -> dict:
    """Token loops: ours, the host's on the decoded weights, and the decode path made for graphs, run without them."""
    wanted = scene.tokens(scene.stock("bf16"))
    found: dict = {"count": len(wanted), "kinds": len(set(wanted))}
    for name in ("comfy", "modelopt"):
        found[name] = scene.tokens(scene.ours(name)[0]) == wanted
    clip = scene.ours("comfy")[0]
    linear = type(clip.cond_stage_model.gemma3_12b.transformer.model.layers[3].mlp.up_proj)
    host_s = next(base for base in linear.__mro__ if base.__module__ == "comfy.ops")
    calls, forward = [], host_s.forward

    def recorded(self, *args, **kwargs):
        calls.append(getattr(self, "quant_format", None))
        return forward(self, *args, **kwargs)

    host_s.forward = recorded
    found["again"] = scene.tokens(clip) == wanted
    host_s.forward = forward
    found["calls_of_host_s_forward"] = {"plain": calls.count(None), "nvfp4": calls.count("nvfp4")}
    found["without_graphs"] = scene.tokens(scene.ours("comfy", graphs=False)[0]) == wanted
    return found


def windowed(scene: Scene) -> dict:
    """The decode path that graphs replay, forced on a CPU: tokens, logits and cache beyond the sliding window.

    Where the host has a compiler, its branch of the token loop is taken: buffers, and a recorded scope a token.
    """
    text_decode = pack("host.compute.token_graphs")
    if text_decode._classes() is None:
        return {"unsupported": scene.ours("comfy")[1].decode}
    cache = text_decode._classes()[0]
    torch, seen = scene.torch, []
    host = scene.stock("bf16")
    clip, report = scene.ours("comfy")
    model = clip.cond_stage_model.gemma3_12b.transformer.model
    cpu = torch.device("cpu")
    eager = model.init_kv_cache(1, 99, cpu, torch.float32)
    states = {"host": logits_of(scene, host, seen)}
    with pack("tests.real.compiled_loop").forced(text_decode, model) as loop:
        states["ours"] = logits_of(scene, clip, seen)
        caches = model.init_kv_cache(1, 99, cpu, torch.float32)
        batch = model.init_kv_cache(2, 99, cpu, torch.float32)
    a, b = states["host"], states["ours"]
    prompt = len(clip.tokenize(scene.g.PROMPT, skip_template=False, min_length=1)["gemma3_12b"][0])
    return {
        "report": report.decode,
        "disagreement": text_decode.disagreement(),
        "tokens": seen[0] == seen[1],
        "beyond_window": prompt > scene.g.WINDOW,
        "largest": a.abs().max().item(),
        "difference": (a - b).abs().max().item(),
        "kinds": sorted({type(c) is cache for c in caches}),
        "shared": len({id(c.slots) for c in caches}),
        "host_caches": [not isinstance(c[0], cache) for c in (batch, eager)],
        "units": len(clip.cond_stage_model.get_dynamic_vram__units()[0]),
        "compiler": loop.compiler,
        "scopes": [loop.scopes.count("begin"), loop.scopes.count("end"), len(seen[1]) - 1],
        "rotations": [list(rotation.shape) for _, rotation in loop.buffers],
    }


def fused(scene: Scene) -> dict:
    """Blocks in few launches."""
    return pack("tests.real.fused_tokens").fused(scene, logits_of)


def logits_of(scene: Scene, clip, seen: list):
    """Logits of every step of the token loop; its tokens are appended to ``seen``."""
    transformer, kept = clip.cond_stage_model.gemma3_12b.transformer, []
    sample = transformer.sample_token

    def recorded(logits, *args, **kwargs):
        kept.append(logits.float().clone())
        return sample(logits, *args, **kwargs)

    transformer.sample_token = recorded
    seen.append(scene.tokens(clip))
    del transformer.sample_token
    return scene.torch.cat(kept)


def text_only(scene: Scene) -> dict:
    """A file without the tower that looks at images."""
    tensors = scene.stored("comfy")
    scene.write("text_only", {name: tensor for name, tensor in tensors.items() if name not in scene.vision})
    clip, report = scene.ours("text_only")
    return {
        "equal": scene.torch.equal(scene.encode(clip), scene.encode(scene.stock("bf16"))),
        "warnings": list(report.warnings),
    }


def clones(scene: Scene) -> dict:
    """What the host makes from ``cached_patcher_init`` when a clone needs weights of its own, and the host's LoRA."""
    torch = scene.torch
    clip = scene.ours("modelopt")[0]
    before = scene.encode(clip)
    factory, arguments = clip.patcher.cached_patcher_init
    other = clip.clone()
    other.patcher = factory(*arguments, disable_dynamic=True)
    other.cond_stage_model = other.patcher.model
    found = {"own": other.patcher.model is not clip.patcher.model, "equal": torch.equal(scene.encode(other), before)}
    names = ("model.layers.3.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    patches = {}
    for name in names:
        key = f"gemma3_12b.transformer.{name}.weight"
        shape = clip.patcher.model.get_submodule(key.removesuffix(".weight")).weight.shape
        patches[key] = ("diff", (scene.random(*shape).float(),))
    patched = clip.clone()
    found["patched"] = sorted(patched.add_patches(patches, 1.0)) == sorted(patches)
    found["changed"] = not torch.equal(scene.encode(patched), before)
    found["restored"] = torch.equal(scene.encode(clip), before)
    return found


def lora(scene: Scene) -> dict:
    """A LoRA on packed and plain layers of ours, against the host's own text encoder of the decoded weights."""
    torch, clips = scene.torch, {"ours": scene.ours("comfy")[0], "stock": scene.stock("bf16")}
    adapter = importlib.import_module("comfy.weight_adapter").LoRAAdapter
    names = (*list(scene.packed)[:6], "model.layers.0.self_attn.q_proj")
    patches = {}
    for name in names:
        key = f"gemma3_12b.transformer.{name}.weight"
        rows, cols = clips["ours"].patcher.model.get_submodule(key.removesuffix(".weight")).weight.shape
        weights = (scene.random(rows, 4), scene.random(4, cols), 8.0, None, None, None)
        patches[key] = adapter(set(), weights)
    before, patched, taken = {}, {}, {}
    for kind, clip in clips.items():
        before[kind], clone = scene.encode(clip), clip.clone()
        taken[kind] = sorted(clone.add_patches(patches, 0.7)) == sorted(patches)
        patched[kind] = scene.encode(clone)
        if kind == "ours":
            owns = [module.__dict__ for module in clone.patcher.model.modules()]
            branches = sum("nvfp4_lora" in own for own in owns)
    changed = patched["stock"] - before["stock"]
    return {
        "taken": all(taken.values()),
        "branches": branches,
        "packed": len(names) - 1,
        "missed": ((patched["ours"] - patched["stock"]).norm() / changed.norm()).item(),
        "restored": torch.equal(scene.encode(clips["ours"]), before["ours"]),
    }


def embedding(scene: Scene) -> dict:
    """Quantised token embeddings: the conditioning is that of their weights, whether they stay packed or not."""
    torch, reference = scene.torch, pack("kernels.reference")
    record = reference.quantize(scene.plain[EMBEDDING], torch.tensor(2.0**-10))
    parts = {"weight": record.packed, "weight_scale": record.block_scale, "weight_scale_2": record.global_scale}
    marker = {"nvfp4": b'{"format": "nvfp4"}', "fp8": b'{"format": "float8_e4m3fn"}'}
    scale = torch.tensor(2.0**-8)
    fp8 = (scene.plain[EMBEDDING].float() / scale).to(torch.float8_e4m3fn)
    stored = {"nvfp4": parts, "fp8": {"weight": fp8, "weight_scale": scale}}
    decoded = {
        "nvfp4": reference.dequantize(record),
        "fp8": (fp8.float() * scale).bfloat16(),
    }
    found = {}
    for name, tensors in stored.items():
        layer = EMBEDDING.removesuffix(".weight")
        extra = {f"{layer}.{part}": tensor.clone() for part, tensor in tensors.items()}
        extra[f"{layer}.comfy_quant"] = torch.tensor(list(marker[name]), dtype=torch.uint8)
        scene.write("embedding", scene.stored("comfy") | extra)
        whole = scene.plain | scene.decoded() | scene.vision
        scene.write("embedding_bf16", whole | {EMBEDDING: decoded[name]})
        clip, report = scene.ours("embedding")
        weight = clip.cond_stage_model.gemma3_12b.transformer.model.embed_tokens.weight
        found[name] = {
            "equal": torch.equal(scene.encode(clip), scene.encode(scene.stock("embedding_bf16"))),
            "packed": hasattr(weight, "_qdata"),
            "warnings": list(report.warnings),
        }
    return found


def enhancer(scene: Scene) -> dict:
    """The host's prompt enhancer on our CLIP against the host's own."""
    try:
        nodes = importlib.import_module("comfy_extras.nodes_textgen")
    except ImportError:
        return {"unsupported": "no prompt enhancer"}
    node = getattr(nodes, "TextGenerateLTX2Prompt", None)
    if node is None:
        return {"unsupported": "no prompt enhancer"}
    texts = []
    for clip in (scene.stock("bf16"), scene.ours("comfy")[0]):
        sampling = {"sampling_mode": "on", "temperature": 2.0, "top_k": 64, "top_p": 0.95, "seed": 5}
        with scene.torch.inference_mode():
            texts.append(node.execute(clip, "a dog sits", 12, sampling).args[0])
    return {"equal": texts[0] == texts[1], "text": texts[1]}


TOPICS = (conditioning, generation, windowed, fused, text_only, clones, lora, embedding, enhancer)


def main(folder: Path, names: list[str]) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    version = importlib.import_module("in_process").bring_up_host()
    importlib.import_module("torch").set_num_threads(1)
    facts: dict[str, object] = {"version": version, "unbuildable": ""}
    gemma().shrink()
    scene = Scene(folder)
    try:
        scene.encode(scene.stock("bf16"))
    except RuntimeError as error:
        facts["unbuildable"] = str(error)
        names = ["none"]
    try:
        scene.tokens(scene.stock("bf16"), 1)
        facts["generates"] = ""
    except (AttributeError, ValueError) as error:  # no such method, or one that never worked with LTX's text encoder
        facts["generates"] = f"{type(error).__name__}: {error}"
    for topic in TOPICS:
        if names and topic.__name__ not in names:
            continue
        try:
            facts[topic.__name__] = topic(scene)
        except Exception:
            facts[topic.__name__] = {"error": traceback.format_exc()}
        scene.forget()
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
