# SPDX-License-Identifier: Apache-2.0
"""Record the tensor names and shapes of LTX-2.x models by instantiating a real ComfyUI's classes on the meta device.

usage: COMFYUI_PATH=<checkout> python tests/record_keys.py

Writes into ``samples/data``: ``ltx23_small.json.gz`` and ``ltx20_small.json.gz`` (scaled-down models that
``samples/synthetic.py`` fills with seeded weights), ``ltxav_keys.json.gz`` (LTX-2.3 as released) and
``ltx23_small_vae.json.gz`` (its VAEs with fewer channels, ``keys`` by VAE). Each file is ``{"config": {...}, "keys":
{name: shape}}``. gzip's time stamp is 0: the same host gives the same bytes.
LTX-2.0 is recorded because hosts without gated attention (0.15 and older) cannot build LTX-2.3; 0.15 itself builds
neither scaled down, since its connectors have the released size whatever the config says.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "samples" / "data"
CONFIG = DATA / "ltx23_config.json.gz"

# 4 video heads of 32 and 4 audio heads of 16: no tensor of the audio branch can pass for one of the video branch, and
# `to_gate_logits` has 4 rows, a number that every layout but the linear ones has to pad. The connectors must give the
# dimensions that the cross attentions take.
SMALL = {
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
    "connector_num_layers": 2,
    "connector_num_attention_heads": 4,
    "connector_attention_head_dim": 32,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 16,
    "caption_channels": 16,
}

# What LTX-2.0 lacks against 2.3. It projects captions after the connectors, which therefore both have their width.
LTX20 = {
    "apply_gated_attention": False,
    "connector_apply_gated_attention": False,
    "cross_attention_adaln": False,
    "caption_proj_before_connector": False,
    "caption_channels": 64,
    "connector_attention_head_dim": 16,
}

_KERNELS = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]}


def small_vaes(released: dict) -> dict:
    """LTX-2.3's config -> the sections of narrow VAEs; strides and rates stay, so lengths and sizes are the true ones.
    """
    found = copy.deepcopy({name: released[name] for name in ("vae", "audio_vae", "vocoder")})
    found["vae"] |= {"encoder_base_channels": 16, "decoder_base_channels": 8}
    found["audio_vae"]["model"]["params"]["ddconfig"]["ch"] = 16
    found["vocoder"]["vocoder"] |= {"upsample_initial_channel": 128} | _KERNELS
    found["vocoder"]["bwe"] |= {"upsample_initial_channel": 64} | _KERNELS
    return found


def vae_keys_of(config: dict) -> dict[str, dict[str, list[int]]]:
    """Config of both VAEs -> {"video_vae": {name: shape}, "audio_vae": ...}, named as in files of their own."""
    import comfy.ldm.lightricks.vae.audio_vae
    import comfy.ldm.lightricks.vae.causal_video_autoencoder as video

    sight = video.VideoVAE(version=2, config=config["vae"]).state_dict()
    sound = comfy.ldm.lightricks.vae.audio_vae.AudioVAE({"config": json.dumps(config)}).state_dict()
    named = {re.sub(r"^autoencoder\.", "audio_vae.", name): tensor for name, tensor in sound.items()}
    return {
        part: {name: list(tensor.shape) for name, tensor in state.items()}
        for part, state in (("video_vae", sight), ("audio_vae", named))
    }


def keys_of(config: dict) -> dict[str, list[int]]:
    """Transformer config -> {tensor name: shape} of the host's LTXAVModel."""
    import comfy.ldm.lightricks.av_model
    import comfy.ops
    import torch

    model = comfy.ldm.lightricks.av_model.LTXAVModel(
        **config, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init
    )
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def write_json(path: Path, content: dict) -> None:
    """Compact JSON, gzip level 9, no time stamp and no file name in the gzip header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 9, mtime=0))
    sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")


def main() -> int:
    """Record everything; returns the exit status."""
    host = os.environ.get("COMFYUI_PATH")
    if not host:
        sys.stderr.write("COMFYUI_PATH is not set; it must name a ComfyUI checkout\n")
        return 2
    sys.path.insert(0, host)
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    recorded = json.loads(gzip.decompress(CONFIG.read_bytes()))
    released = recorded["transformer"]
    small = released | SMALL
    older = small | LTX20
    for name, config in (
        ("ltx23_small", small),
        ("ltx20_small", older),
        ("ltxav_keys", released),
    ):
        write_json(DATA / f"{name}.json.gz", {"config": config, "keys": keys_of(config)})
    narrow = small_vaes(recorded)
    write_json(DATA / "ltx23_small_vae.json.gz", {"config": narrow, "keys": vae_keys_of(narrow)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
