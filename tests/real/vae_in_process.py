# SPDX-License-Identifier: Apache-2.0
"""Facts about VAEs in a real ComfyUI process on the CPU, as one line of JSON; run by test_vae.py.

usage: <the host's python> vae_in_process.py <empty folder>, in the folder of a ComfyUI checkout

The checkpoint has every tensor of LTX-2.3's VAEs in its true shape, 726 million numbers in the video VAE alone, random
but scaled so that a decode stays finite, and a small diffusion model. Each function of ``TOPICS`` gets a ``Scene``.
"""

from __future__ import annotations

import gc
import gzip
import importlib
import json
import math
import sys
import time
import traceback
from pathlib import Path

MARK = "facts: "
DATA = Path(__file__).resolve().parents[2] / "samples" / "data"
LATENT, SOUND = (1, 128, 2, 4, 4), (1, 8, 4, 16)
FULL, VIDEO, AUDIO = "full.safetensors", "video.safetensors", "audio.safetensors"


def pack(name: str):
    return importlib.import_module(f"nvfp4_video.{name}")


class Scene:
    """The checkpoint's tensors and file, and the modules the topics share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.torch = importlib.import_module("torch")
        self.config = json.loads(gzip.decompress((DATA / "ltx23_config.json.gz").read_bytes()))
        self.keys = json.loads(gzip.decompress((DATA / "ltx_vae_keys.json.gz").read_bytes()))
        self.generator = self.torch.Generator().manual_seed(0)
        self.metadata = {"config": json.dumps(self.config)}
        self.video = {name: self.weight(name, shape) for name, shape in self.keys["video_vae"].items()}
        self.audio = {name: self.weight(name, shape) for name, shape in self.keys["audio_vae"].items()}
        self.latent = self.torch.randn(LATENT, generator=self.generator)
        self.sound = self.torch.randn(SOUND, generator=self.generator)
        self.write(FULL, {f"vae.{name}": tensor for name, tensor in self.video.items()} | self.audio | self.small_dit())
        importlib.import_module("folder_paths").add_model_folder_path("vae", str(folder))
        importlib.import_module("folder_paths").add_model_folder_path("checkpoints", str(folder))

    def weight(self, name: str, shape: list[int]):
        """Seeded numbers of a size that neither dies out nor overflows over the depth of a decoder."""
        torch = self.torch
        if name.endswith("std-of-means") or (len(shape) == 1 and "norm" in name and name.endswith("weight")):
            return torch.ones(shape, dtype=torch.bfloat16)
        gain = 0.8 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
        return (torch.randn(shape, generator=self.generator) * gain).to(torch.bfloat16)

    def small_dit(self) -> dict:
        synthetic = pack("samples.synthetic")
        state, config = synthetic.small_ltx23()
        path = self.folder / "dit.safetensors"
        synthetic.write(path, "comfy_markers", state, config, synthetic.quantize_layers(state, config))
        tensors = importlib.import_module("safetensors.torch").load_file(path)
        path.unlink()
        return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, tensors: dict, metadata: dict | None = None) -> str:
        metadata = self.metadata if metadata is None else metadata
        importlib.import_module("safetensors.torch").save_file(tensors, self.path(name), metadata)
        return self.path(name)

    def ours(self, name: str, **options):
        return pack("host.load.vae").load_vae(self.path(name), **options)

    def refusal(self, name: str, **options) -> str | None:
        """What our loader says against a file, None if it loads it."""
        try:
            self.ours(name, **options)
        except ValueError as error:
            return str(error)
        return None

    def stock(self, name: str):
        """The host's own node for a VAE file."""
        return importlib.import_module("nodes").VAELoader().load_vae(name)[0]

    def decode(self, vae, latent=None):
        """Pixels of the scene's latent; nothing of the VAE stays loaded."""
        with self.torch.no_grad():
            pixels = vae.decode(self.latent if latent is None else latent).clone()
        comfy("model_management").unload_all_models()
        return pixels

    def equal(self, a, b) -> bool:
        return a.shape == b.shape and bool(self.torch.equal(a, b))


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def video(scene: Scene) -> dict:
    """Split and embedded against the host's loader on the split file; what quantised files decode to."""
    parts = pack("checkpoint.write.split").split(
        scene.path(FULL), {"video_vae": VIDEO, "audio_vae": AUDIO}, base=scene.folder
    )
    try:
        stock = scene.stock(VIDEO)
    except RuntimeError:
        return {"refused": scene.refusal(VIDEO)}
    reference = scene.decode(stock)
    del stock
    found = {
        "shape": list(reference.shape),
        "finite": bool(reference.isfinite().all()),
        "std": reference.float().std().item(),
        "parts": [(part.component, part.tensors, part.nbytes) for part in parts],
        "reports": {},
        "equal": {},
    }
    for name in (VIDEO, FULL):
        vae, report = scene.ours(name)
        found["reports"][name] = str(report)
        found["equal"][name] = scene.equal(scene.decode(vae), reference)
        del vae
        gc.collect()
    return found


def restored(scene: Scene) -> dict:
    """NVFP4 and FP8 files of the whole VAE against the host's VAE on weights dequantised by plain torch."""
    if (refused := scene.refusal(VIDEO)) is not None:
        return {"refused": refused}
    found = {}
    for name, damage in (("fp8", _fp8), ("nvfp4", _nvfp4)):
        stored, plain = {}, {}
        for key, tensor in scene.video.items():
            parts, value = damage(scene, key, tensor) if _is_kernel(key, tensor) else ({key: tensor}, tensor)
            stored |= parts
            plain[key] = value
        path = f"{name}.safetensors"
        scene.write(path, {f"vae.{key}": tensor for key, tensor in stored.items()} | scene.small_dit())
        del stored
        started = time.perf_counter()
        vae, report = scene.ours(path, dialect="comfy" if name == "nvfp4" else "auto")
        seconds = time.perf_counter() - started
        ours = scene.decode(vae)
        del vae
        vae = comfy("sd").VAE(sd=dict(plain), metadata=scene.metadata)
        changed = not scene.equal(plain[DAMAGED_SAMPLE], scene.video[DAMAGED_SAMPLE])
        del plain
        gc.collect()
        equal = scene.equal(ours, scene.decode(vae))
        del vae
        gc.collect()
        Path(scene.path(path)).unlink()
        found[name] = {"equal": equal, "changed": changed, "report": str(report), "restored": dict(report.restored)}
        found[name] |= {"finite": bool(ours.isfinite().all()), "seconds": round(seconds, 1)}
    return found


DAMAGED_SAMPLE = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"


def _is_kernel(key: str, tensor) -> bool:
    """A weight that a converter quantises: kernels of the decoder's middle, which the decode reaches."""
    return key.startswith("decoder.up_blocks.") and key.endswith("conv.weight") and tensor.ndim == 5


def _fp8(scene: Scene, key: str, tensor) -> tuple[dict, object]:
    torch = scene.torch
    scale = tensor.float().abs().amax() / 448
    packed = (tensor.float() / scale).to(torch.float8_e4m3fn)
    return {key: packed, key.replace(".weight", ".weight_scale"): scale}, (packed.float() * scale).to(torch.bfloat16)


def _nvfp4(scene: Scene, key: str, tensor) -> tuple[dict, object]:
    """The kernels of the first up block flattened to matrices, as a converter that takes all for Linears does it."""
    if not key.startswith("decoder.up_blocks.0."):
        return {key: tensor}, tensor
    reference = pack("kernels.reference")
    matrix = tensor.reshape(len(tensor), -1)
    record = reference.quantize(matrix, reference.amax_global_scale(matrix))
    layer = key.removesuffix(".weight")
    parts = {"weight": record.packed, "weight_scale": record.block_scale, "weight_scale_2": record.global_scale}
    decoded = reference.dequantize(record, scene.torch.bfloat16)
    return {f"{layer}.{part}": value for part, value in parts.items()}, decoded.reshape(tensor.shape)


def audio(scene: Scene) -> dict:
    """The audio VAE, split and embedded, against the host's own loader for it on the full checkpoint."""
    node = importlib.import_module("comfy_extras.nodes_lt_audio").LTXVAudioVAELoader
    decode = importlib.import_module("comfy_extras.nodes_lt_audio").LTXVAudioVAEDecode

    def wave(vae):
        with scene.torch.no_grad():
            return decode.execute({"samples": scene.sound.clone()}, vae)[0]["waveform"]

    if not hasattr(comfy("ldm.lightricks.vae.audio_vae"), "VocoderWithBWE"):
        return {"refused": scene.refusal(FULL, kind="audio")}
    (stock,) = node.execute(FULL).args
    reference = wave(stock)
    found = {"shape": list(reference.shape), "finite": bool(reference.isfinite().all()), "equal": {}, "reports": {}}
    found["silent"] = bool(reference.abs().max() == 0)
    for name, options in ((FULL, {"kind": "audio"}), (AUDIO, {})):
        vae, report = scene.ours(name, **options)
        found["reports"][name] = str(report)
        found["equal"][name] = scene.equal(wave(vae), reference)
    found["encoded"] = {flag: _encoded(scene, flag) for flag in ("bf16_vae", "fp16_vae")}
    patcher = getattr(vae, "patcher", None)
    if hasattr(patcher, "cached_patcher_init"):
        factory, arguments = patcher.cached_patcher_init
        again = factory(*arguments).model
        pairs = zip(again.parameters(), patcher.model.parameters(), strict=True)
        equal = all(scene.equal(a.cpu(), b.cpu()) for a, b in pairs)
        found["factory"] = equal and again is not patcher.model
    return found


def _encoded(scene: Scene, flag: str) -> str:
    """What becomes of a sound that our audio VAE encodes in a host that was started with this flag."""
    nodes, args = importlib.import_module("comfy_extras.nodes_lt_audio"), comfy("cli_args").args
    sound = {"waveform": scene.torch.zeros(1, 2, 16000), "sample_rate": 16000}
    setattr(args, flag, True)
    try:
        vae, _ = scene.ours(FULL, kind="audio")
        with scene.torch.no_grad():
            made = nodes.LTXVAudioVAEEncode.execute(sound, vae)[0]
        return str(list((made["samples"] if isinstance(made, dict) else made).shape[:2]))
    except RuntimeError as error:
        return str(error)
    finally:
        setattr(args, flag, False)


def preview(scene: Scene) -> dict:
    """The preview decoder that was let pass: pixels whole, and what a tiled decode gives."""
    tae = {name: scene.weight(name, shape) for name, shape in scene.keys["taehv_ltx2"].items()}
    scene.write("tae.safetensors", tae, {})
    vae, report = scene.ours("tae.safetensors", allow_preview=True)
    latent = scene.torch.randn((1, 128, 3, 6, 6), generator=scene.generator)
    whole = scene.decode(vae, latent)
    tiled = {"ours": vae.decode_tiled(latent.clone(), tile_x=4, tile_y=4, overlap=1, tile_t=2, overlap_t=1)}
    try:
        stock = comfy("sd").VAE(sd=dict(tae), metadata={})
        tiled["stock"] = stock.decode_tiled(latent.clone(), tile_x=4, tile_y=4, overlap=1, tile_t=2, overlap_t=1)
    except RuntimeError:
        tiled["stock"] = whole[:, :0]
    return {
        "report": str(report),
        "warnings": list(report.warnings),
        "whole": list(whole.shape),
        "tiled": {name: list(pixels.shape) for name, pixels in tiled.items()},
        "equal": scene.equal(tiled["ours"], whole),
    }


def residency(scene: Scene) -> dict:
    """Which patcher the VAE gets on a host whose own choice is another."""
    patching = comfy("model_patcher")
    own = patching.ModelPatcher

    class Dynamic(own):
        pass

    before, patching.CoreModelPatcher = patching.CoreModelPatcher, Dynamic
    try:
        path = scene.write("tae.safetensors", {n: scene.weight(n, s) for n, s in scene.keys["taehv_ltx2"].items()}, {})
        stock = comfy("sd").VAE(sd=comfy("utils").load_torch_file(path), metadata={})
        vae, _ = scene.ours("tae.safetensors", allow_preview=True)
    finally:
        patching.CoreModelPatcher = before
    return {
        "stock": type(stock.patcher).__name__,
        "ours": type(vae.patcher).__name__,
        "full_load": [stock.disable_offload, vae.disable_offload],
    }


def refusals(scene: Scene) -> dict:
    """Files that must not decode LTX latents -> what the user is told."""
    torch = scene.torch
    small = {name: tensor for name, tensor in scene.video.items() if tensor.numel() < 10_000_000}
    keep = (DAMAGED_SAMPLE, "encoder.down_blocks.7.conv.conv.weight", "encoder.down_blocks.1.conv.conv.bias")
    small |= {name: scene.video[name] for name in keep}
    tae = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in scene.keys["taehv_ltx2"].items()}
    no_statistics = {name: tensor for name, tensor in small.items() if "per_channel" not in name}
    flux = {"decoder.conv_in.weight": torch.zeros(512, 16, 3, 3), "encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}
    files = {
        "tae": (tae, {}),
        "flux": (flux, {}),
        "no config": (small, {"format": "pt"}),
        "no statistics": (no_statistics, scene.metadata),
        "weights missing": (small, scene.metadata),
        "wrong config": (small, {"config": json.dumps({"vae": {"decoder_blocks": [["res_x", {"num_layers": 1}]]}})}),
        "no vae": (scene.small_dit(), scene.metadata),
    }
    found = {}
    for name, (tensors, metadata) in files.items():
        path = scene.write("refused.safetensors", tensors, metadata)
        found[name] = scene.refusal("refused.safetensors") or ""
        Path(path).unlink()
        gc.collect()
    return found


def lender(scene: Scene) -> dict:
    """A file without `config` that takes it from a sibling: its weights and the report."""
    if not hasattr(comfy("ldm.lightricks.vae.audio_vae"), "VocoderWithBWE"):
        return {"refused": scene.refusal(AUDIO)}
    scene.write("bare.safetensors", scene.audio, {"format": "pt"})
    vae, report = scene.ours("bare.safetensors", config_from=scene.path(AUDIO))
    model = getattr(vae, "first_stage_model", vae)
    return {"report": str(report), "parameters": sum(p.numel() for p in model.parameters())}


TOPICS = (video, restored, audio, preview, residency, refusals, lender)


def main(folder: Path, names: list[str]) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = importlib.import_module("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    logging = importlib.import_module("logging")
    logging.getLogger().setLevel(logging.WARNING)
    scene = Scene(folder)
    for topic in TOPICS:
        if names and topic.__name__ not in names:
            continue
        started = time.perf_counter()
        try:
            facts[topic.__name__] = topic(scene)
        except Exception:
            facts[topic.__name__] = {"error": traceback.format_exc()}
        comfy("model_management").unload_all_models()
        gc.collect()
        facts[f"{topic.__name__}_seconds"] = round(time.perf_counter() - started, 1)
    resource = importlib.import_module("resource")
    facts["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
