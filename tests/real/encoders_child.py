# SPDX-License-Identifier: Apache-2.0
"""Facts about text encoders of several families in a real ComfyUI process on the CPU, as one line of JSON; run by
test_encoders_host.py.

usage: <the host's python> encoders_child.py <empty folder> [<topic>...], in the folder of a ComfyUI checkout

The global scales and the smoothing are powers of two, so a BF16 file holds the dequantised weights exactly and the
host's own loader on that file is the reference.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import traceback
from pathlib import Path

MARK = "facts: "
_CLIP_END = 49407
_PACKED = re.compile(r"(layers|block)\.[1-9]\d*\..*weight$")


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def pack(name: str):
    return importlib.import_module(f"nvfp4_video.{name}")


class Scene:
    """Writes files into ``folder`` and loads them, ours and the host's."""

    def __init__(self, folder: Path):
        self.small, self.folder = pack("tests.real.small_encoders"), folder
        self.torch = importlib.import_module("torch")
        self.save_file = importlib.import_module("safetensors.torch").save_file
        self.generator = self.torch.Generator().manual_seed(0)

    def random(self, name: str, shape: tuple[int, ...]):
        numbers = self.torch.randn(shape, generator=self.generator)
        norm = "norm" in name and len(shape) == 1
        return (numbers * 0.1 + norm if len(shape) == 1 else numbers * shape[-1] ** -0.5).bfloat16()

    def bytes(self, content: bytes):
        return self.torch.frombuffer(bytearray(content), dtype=self.torch.uint8).clone()

    def write(self, name: str, tensors: dict, metadata: dict | None = None) -> str:
        path = self.folder / f"{name}.safetensors"
        self.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return str(path)

    def files(self, family, awq: bool = False) -> tuple[dict, dict]:
        """-> (tensors with all but the first block in NVFP4, the same dequantised). ``awq``: by ModelOpt, smoothed."""
        torch, reference, formats = self.torch, pack("kernels.reference"), pack("kernels.format")
        packed, plain = {}, {}
        for name, shape in self.small.shapes(family).items():
            weight = self.random(name, shape)
            layer = name.removesuffix(".weight")
            if not _PACKED.search(name) or len(shape) < 2 or "attention_bias" in name or "router" in name:
                packed[name] = plain[name] = weight
                continue
            banks = weight if len(shape) == 3 else weight[None]
            records = [reference.quantize(matrix, torch.tensor(2.0**-10)) for matrix in banks]
            decoded = torch.stack([reference.dequantize(record) for record in records])
            codes = torch.stack([record.packed for record in records])
            scales = torch.stack([record.block_scale for record in records])
            factors = torch.stack([record.global_scale for record in records])
            if len(shape) == 2:
                codes, scales, factors, decoded = codes[0], scales[0], factors[0], decoded[0]
            marker = {"format": "nvfp4"} | ({"num_experts": shape[0]} if len(shape) == 3 else {})
            if awq:
                codes, scales = formats.swap_nibbles(codes), formats.unswizzle(scales, shape[0], shape[1] // 16)
                smoothing = torch.randint(-2, 3, shape[1:], generator=self.generator).float().exp2().bfloat16()
                packed[f"{layer}.pre_quant_scale"], decoded = smoothing, decoded * smoothing
            else:
                packed[f"{layer}.comfy_quant"] = self.bytes(json.dumps(marker).encode())
            packed |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scales, f"{layer}.weight_scale_2": factors}
            plain[name] = decoded
        if family.tokenizer:
            spiece = family.tokenizer == "spiece_model"
            content = pack("tests.real.small_gemma").tokenizer_bytes() if spiece else self.small.tokenizer_json()
            packed[family.tokenizer] = plain[family.tokenizer] = self.bytes(content)
        return packed, plain

    def ours(self, path: str, kind: str, second: str | None = None, **options):
        return pack("host.load.text_encoder").load_text_encoder(path, second, kind=kind, **options)

    def stock(self, paths: list[str], kind: str):
        sd = comfy("sd")
        return sd.load_clip(paths, clip_type=sd.CLIPType[kind.upper()])

    def states(self, clip, inner: str) -> list:
        """What the encoder gives: its usual output and its last layer's."""
        encoder, cpu = getattr(clip.patcher.model, inner), self.torch.device("cpu")
        pairs, found = [[(token, 1.0) for token in self.small.TOKENS]], []
        with self.torch.inference_mode():
            if inner == "gpt_oss":
                encoder.set_clip_options({"execution_device": cpu})
                encoder.txt_offset = 2
                return [encoder.encode_token_weights(pairs)[0].float()]
            padding = [_CLIP_END] * (77 - len(self.small.TOKENS)) if inner == "clip_l" else []
            for layer in ({}, {"layer": None}):
                encoder.reset_clip_options()
                encoder.set_clip_options({"execution_device": cpu} | layer)
                found.append(encoder([self.small.TOKENS + padding])[0].float())
        return found

    def tokens(self, clip) -> list[int]:
        pairs = {"tokens": [[(token, 1.0) for token in self.small.TOKENS]]}
        with self.torch.inference_mode():
            return clip.generate(pairs, do_sample=False, max_length=12, seed=0)

    def compare(self, ours, host, inner: str) -> dict:
        tensor = comfy("quant_ops").QuantizedTensor
        decode, calls = tensor.dequantize, []
        tensor.dequantize = lambda self: calls.append(1) or decode(self)
        found = self.states(ours, inner)
        tensor.dequantize = decode
        pairs = list(zip(found, self.states(host, inner), strict=True))
        return {
            "decoded_by_host": len(calls),
            "equal": all(self.torch.equal(a, b) for a, b in pairs),
            "difference": max(((a - b).norm() / b.norm()).item() for a, b in pairs),
            "varied": all(b.std().item() > 1e-3 and bool(b.isfinite().all()) for _, b in pairs),
        }


def family(scene: Scene, name: str) -> dict:
    """One family: hidden states and, where it writes, tokens, ours against the host on the decoded weights."""
    one = scene.small.FAMILIES[name]
    scene.generator.manual_seed(0)  # what is written depends on no other family
    packed, plain = scene.files(one)
    clip, report = scene.ours(scene.write("packed", packed), one.type)
    host = scene.stock([scene.write("plain", plain)], one.type)
    found = scene.compare(clip, host, one.inner) | {"report": str(report), "warnings": list(report.warnings)}
    found["packed"] = report.layers.get("nvfp4", 0)
    found["own"] = sum(part.__dict__.get("nvfp4_mode") == "bf16" for part in clip.patcher.model.modules())
    if one.writes:
        found["tokens"], found["host_tokens"] = scene.tokens(clip), scene.tokens(host)
    return found


def awq(scene: Scene) -> dict:
    """Qwen3 as ModelOpt writes NVFP4_AWQ: every packed layer has a scale that its input is multiplied by."""
    one = scene.small.FAMILIES["QWEN3_4B"]
    packed, plain = scene.files(one, awq=True)
    config = {"producer": {"name": "modelopt"}, "quant_algo": "NVFP4_AWQ"}
    path = scene.write("awq", packed, {"quantization_config": json.dumps(config)})
    clip, report = scene.ours(path, one.type)
    host = scene.stock([scene.write("awq_plain", plain)], one.type)
    return scene.compare(clip, host, one.inner) | {"report": str(report)}


def shards(scene: Scene) -> dict:
    """A text encoder in two files, named by either."""
    one = scene.small.FAMILIES["QWEN3_4B"]
    packed, _ = scene.files(one)
    names = list(packed)
    paths = []
    for number, part in ((1, names[::2]), (2, names[1::2])):
        paths.append(scene.write(f"q-{number:05}-of-00002", {name: packed[name] for name in part}))
    whole = scene.ours(scene.write("whole", packed), one.type)[0]
    return {Path(path).stem: scene.compare(scene.ours(path, one.type)[0], whole, one.inner) for path in paths}


def pair(scene: Scene) -> dict:
    """FLUX: T5 in NVFP4, and a CLIP-L in FP16, whose bits BF16 would not hold."""
    one = scene.small.FAMILIES["T5_XXL"]
    packed, plain = scene.files(one)
    clip_l = {name: scene.random(name, shape).float() for name, shape in scene.small.clip_shapes().items()}
    clip_l = {name: (tensor + tensor * 2.0**-10).half() for name, tensor in clip_l.items()}
    second = scene.write("clip_l", clip_l)
    clip, report = scene.ours(scene.write("t5", packed), "flux", second)
    host = scene.stock([scene.write("t5_plain", plain), second], "flux")
    found = {inner: scene.compare(clip, host, inner) for inner in ("t5xxl", "clip_l")}
    return found | {"report": str(report), "warnings": list(report.warnings)}


def refused(scene: Scene) -> dict:
    """What is said of files that are not what was asked for, and of a family that was not tried."""
    one, error = scene.small.FAMILIES["QWEN3_4B"], pack("checkpoint.file.header").CheckpointError
    packed, _ = scene.files(one)
    cut = {name: tensor for name, tensor in packed.items() if name != "model.layers.1.input_layernorm.weight"}
    half = {name: tensor for name, tensor in packed.items() if "layers.2." not in name}
    wide = packed | {"model.layers.0.mlp.up_proj.weight": scene.random("", (64, 2560))}
    found = {}
    files = {"norm": cut, "block": half, "other": {"patchify_proj.weight": scene.random("", (8, 8))}, "size": wide}
    for name, tensors in files.items():
        try:
            found[name] = str(scene.ours(scene.write(name, tensors), one.type)[1])
        except error as problem:
            found[name] = f"refused: {problem}"
    text_encoder = pack("host.load.text_encoder")
    kept, text_encoder.TRIED = text_encoder.TRIED, ()
    found["untried"] = list(scene.ours(scene.write("untried", packed), one.type)[1].warnings)
    text_encoder.TRIED = kept
    extra = packed | {"model.layers.9.mlp.up_proj.weight": scene.random("", (8, 16))}
    found["extra"] = list(scene.ours(scene.write("extra", extra), one.type)[1].warnings)
    return found


def main(folder: Path, names: list[str]) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    version = importlib.import_module("in_process").bring_up_host()
    importlib.import_module("torch").set_num_threads(1)
    scene = Scene(folder)
    scene.small.shrink()
    topics = {name: lambda name=name: family(scene, name) for name in scene.small.FAMILIES}
    topics |= {topic.__name__: lambda topic=topic: topic(scene) for topic in (awq, shards, pair, refused)}
    facts: dict[str, object] = {"version": version}
    for name, topic in topics.items():
        if names and name not in names:
            continue
        try:
            facts[name] = topic()
        except Exception:
            facts[name] = {"error": traceback.format_exc()}
        comfy("model_management").unload_all_models()
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
