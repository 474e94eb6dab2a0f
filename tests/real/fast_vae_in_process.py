# SPDX-License-Identifier: Apache-2.0
"""Facts about the fast decode of small VAEs in a real ComfyUI process on the CPU; run by test_fast_vae.py.

usage: <the host's python> fast_vae_in_process.py, in the folder of a ComfyUI checkout

FP32, so that a difference is one of computation and not of rounding; the kernels are their definitions in plain torch.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

MARK = "facts: "
FRAMES, HEIGHT, WIDTH = 5, 2, 3
GROUPS = {"norm_layer": "group_norm", "decoder_base_channels": 32, "encoder_base_channels": 32}
CHUNKS = (1, 3000, 1 << 30)


class Scene:
    """The host's VAE of a config, small, with seeded weights; and the pack's modules."""

    def __init__(self):
        self.torch = importlib.import_module("torch")
        self.host = importlib.import_module("comfy.ldm.lightricks.vae.causal_video_autoencoder")
        self.ours, self.known, self.trial = (
            importlib.import_module(f"nvfp4_video.host.decode.{name}") for name in ("decoder", "known", "trial")
        )
        recorded = importlib.import_module("nvfp4_video.samples.recorded").recorded
        small = {"decoder_base_channels": 8, "encoder_base_channels": 8}
        self.config = dict(recorded("ltx23_config")["vae"]) | small
        self.in_chunks = hasattr(self.host, "get_max_chunk_size")

    def others(self) -> dict[str, dict]:
        """Configs of other LTX VAEs: residual upsampling, timesteps, causal time, mirrored edges."""
        found = {}
        for version in (1, 2):
            config = self.host.VideoVAE.get_default_config(None, version)
            for blocks in ("decoder_blocks", "encoder_blocks"):
                config[blocks] = [[name, self.quiet(value)] for name, value in config[blocks]]
            found[f"version {version}"] = config | {"decoder_base_channels": 8, "encoder_base_channels": 8}
        later = found["version 2"]
        found["causal"] = later | {"causal_decoder": True}
        found["mirrored"] = later | {"timestep_conditioning": False, "spatial_padding_mode": "reflect"}
        return found

    @staticmethod
    def quiet(value):
        if not isinstance(value, dict):
            return value
        return value | {"inject_noise": False} | ({"num_layers": 1} if "num_layers" in value else {})

    def model(self, config: dict):
        generator = self.torch.Generator().manual_seed(0)
        model = self.host.VideoVAE(config=config).eval()
        for tensor in [*model.parameters(), *model.per_channel_statistics.buffers()]:
            spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            tensor.data = self.torch.randn(tensor.shape, generator=generator) * spread
        return model

    def install(self, model, chunk: int | None = None):
        decoding = self.ours.Decoding(self.ours.kernels_for(self.torch.device("cpu")), chunk)
        self.ours.install(model.decoder, decoding)
        return decoding

    def latent(self, frames: int = FRAMES, clips: int = 2):
        generator = self.torch.Generator().manual_seed(frames)
        return self.torch.randn((clips, 128, frames, HEIGHT, WIDTH), generator=generator)

    def decoded(self, model, latent):
        self.torch.manual_seed(0)  # a VAE with timesteps adds noise to the latent
        with self.torch.inference_mode():
            return model.decode(latent)

    def error(self, found, right) -> float:
        """Largest difference, of the largest number."""
        return ((found - right).abs().max() / right.abs().max()).item() if found.shape == right.shape else float("inf")

    def vae(self, fast: bool):
        """The host's object for the small VAE of LTX-2.3, by the class of our loader, and its pixels' worth."""
        loader = importlib.import_module("nvfp4_video.host.load.vae")
        state = self.model(self.config).state_dict()
        kind = loader.ResidentVAE if fast else importlib.import_module("comfy.sd").VAE
        metadata = {"config": json.dumps({"vae": self.config})}
        vae = kind(sd=state, metadata=metadata, dtype=self.torch.float32)
        if fast:
            decoding = self.install(vae.first_stage_model, 20_000)
            vae.process_output = self.ours.Finished(decoding, vae.process_output)
        return vae


def equal(scene: Scene) -> dict:
    """Error of the fast decode against the host's, by config, frames and size of the chunks."""
    found = {}
    for name, config in {"2.3": scene.config, **scene.others()}.items():
        for frames in (1, FRAMES) if name == "2.3" else (FRAMES,):
            latent = scene.latent(frames, 1 if config["timestep_conditioning"] else 2)  # the host takes one with it
            right = scene.decoded(scene.model(config), latent)
            for chunk in CHUNKS if name == "2.3" else CHUNKS[1:2]:
                model = scene.model(config)
                decoding = scene.install(model, chunk)
                found[f"{name}, {frames} frames, {chunk}"] = scene.error(scene.decoded(model, latent), right)
                if decoding.stood_down:
                    found[name] = decoding.stood_down
    return found


def reasons(scene: Scene) -> dict:
    """Why a VAE, a device or a dtype is not for the fast decode."""
    device, torch = scene.torch.device("cuda", 0), scene.torch
    noisy = scene.others()["version 2"]
    noisy["decoder_blocks"] = [["res_x", {"num_layers": 1, "inject_noise": True}]]
    configs = {"noise": noisy, "groups": scene.config | GROUPS}
    configs["version 0"] = scene.host.VideoVAE.get_default_config(None, 0) | {"decoder_base_channels": 8}
    found = {name: scene.known.unknown(scene.model(config).decoder) for name, config in configs.items()}
    found["cpu"] = scene.trial.obstacle(scene.model(scene.config), torch.device("cpu"), torch.bfloat16)
    found["class"] = scene.trial.obstacle(torch.nn.Identity(), device, torch.bfloat16)
    found["tried"] = scene.trial.tried(scene.model(scene.config))
    return found


def noticed(scene: Scene) -> dict:
    """What the trial says of hosts whose classes compute something else."""
    found = {}
    for name, change in {
        "DepthToSpaceUpsample": lambda made: made * 1.01 if made is not None else None,
        "ResnetBlock3D": lambda made: made + 0.01,
    }.items():
        kind = getattr(scene.host, name)
        forward = kind.forward

        def other(self, *args, forward=forward, change=change, **kwargs):
            return change(forward(self, *args, **kwargs))

        kind.forward = other
        scene.trial._trial.cache_clear()
        found[name] = scene.trial.tried(scene.model(scene.config))
        kind.forward = forward
    scene.trial._trial.cache_clear()
    return found


def doubling(scene: Scene) -> type:
    """A module of somebody else in the place of one of the host's."""

    class Doubled(scene.torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            found = self.__dict__["_modules"].get(name)
            return getattr(self.__dict__["_modules"]["inner"], name) if found is None else found

        def forward(self, x):
            return self.inner(x) * 2

    return Doubled


def in_other_hands(scene: Scene) -> dict:
    """Whether decodes equal the host's bit for bit once somebody else has a hand in a module."""
    latent, found, doubled = scene.latent(), {}, doubling(scene)
    for name in ("hook", "forward", "class", "patch"):
        made = []
        for fast in (False, True):
            model = scene.model(scene.config)
            decoding = scene.install(model, 3000) if fast else None
            conv = model.decoder.up_blocks[2].res_blocks[0].conv1.conv
            if name == "hook":
                conv.register_forward_hook(lambda module, args, made: made * 2)
            elif name == "forward":
                conv.forward = lambda x, forward=conv.forward: forward(x) * 2
            elif name == "class":
                model.decoder.up_blocks[2].res_blocks[0].conv1.conv = doubled(conv)
            else:  # what ComfyUI does for a patch of a weight that stays where it is
                conv.weight_function = [lambda weight: weight * 2]
            made.append(scene.decoded(model, latent))
        found[name] = {"error": scene.error(made[1], made[0]), "stood_down": decoding.stood_down}
    return found


def whole(scene: Scene) -> dict:
    """The host's VAE around the decoder: pixels, tiles, the model asked directly."""
    torch, latent = scene.torch, scene.latent(3)
    stock, ours = scene.vae(False), scene.vae(True)
    with torch.inference_mode():
        right, found = stock.decode(latent.clone()), ours.decode(latent.clone())
        tiles = {"tile_x": 2, "tile_y": 2, "overlap": 1, "tile_t": 2, "overlap_t": 1}
        tiled = [vae.decode_tiled(latent.clone(), **tiles) for vae in (stock, ours)]
        decoding = ours.first_stage_model.decoder.__dict__["_nvfp4_decoding"]
        buffer = torch.empty(ours.first_stage_model.decode_output_shape(latent.shape))
        ours.first_stage_model.decode(latent.clone(), output_buffer=buffer)
        processed = [vae.process_output(buffer.clone()) for vae in (stock, ours)]
    return {
        "error": scene.error(found, right), "shape": list(found.shape), "std": right.std().item(),
        "tiled": scene.error(tiled[1], tiled[0]), "left": [decoding.finishing, decoding.finished is None],
        "below_zero": buffer.min().item() < 0, "processed": bool(torch.equal(*processed)),
        "stood_down": decoding.stood_down, "saved": all(t.is_contiguous() for t in ours.get_sd().values()),
    }  # fmt: skip


TOPICS = (equal, reasons, noticed, in_other_hands, whole)


def main() -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    facts: dict[str, object] = {"version": importlib.import_module("in_process").bring_up_host()}
    importlib.import_module("logging").getLogger().setLevel("ERROR")
    importlib.import_module("torch").set_num_threads(1)
    scene = Scene()
    facts["in_chunks"] = scene.in_chunks
    for topic in TOPICS if scene.in_chunks else ():
        try:
            facts[topic.__name__] = topic(scene)
        except Exception:
            facts[topic.__name__] = {"error": importlib.import_module("traceback").format_exc()}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
