# SPDX-License-Identifier: Apache-2.0
"""Facts about models of many families that a real ComfyUI builds, as one line of JSON; run by test_families_host.py.

usage: <the host's python> families_in_process.py, in the folder of a ComfyUI checkout

Each model is built from the names and shapes of the host's own class, as a released file has them (few blocks, often
narrower), and checked by host/load/built.py. The tensors are one number each, stretched: nothing of size is made.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

MARK = "facts: "

_FLUX = dict(image_model="flux", axes_dim=[16, 56, 56], num_heads=2, mlp_ratio=4.0, theta=10000, out_channels=16)
_FLUX |= dict(qkv_bias=True, txt_ids_dims=[], in_channels=16, hidden_size=256, context_in_dim=64, patch_size=2)
_FLUX |= dict(vec_in_dim=32, depth=1, depth_single_blocks=1)
_FLUX_1 = _FLUX | dict(guidance_embed=True, yak_mlp=False, txt_norm=False)
_FLUX_2 = _FLUX_1 | dict(image_model="flux2", axes_dim=[32] * 4, mlp_ratio=3.0, theta=2000, in_channels=128)
_FLUX_2 |= dict(out_channels=128, global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False)
_FLUX_2 |= dict(default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3], patch_size=1, vec_in_dim=None)
_CHROMA = _FLUX | dict(image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=3072, n_layers=5)
_CHROMA |= dict(hidden_dim=5120, hidden_size=3072, num_heads=24, vec_in_dim=None, context_in_dim=4096)
_WAN = dict(image_model="wan2.1", dim=256, out_dim=16, num_heads=2, ffn_dim=512, num_layers=2, patch_size=(1, 2, 2))
_WAN |= dict(freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16)
_WAN |= dict(model_type="t2v")
_HUNYUAN = dict(image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768)
_HUNYUAN |= dict(axes_dim=[16, 56, 56], meanflow=False, context_in_dim=64, hidden_size=256, mlp_ratio=4.0, num_heads=2)
_HUNYUAN |= dict(depth=1, depth_single_blocks=1, theta=256, qkv_bias=True, byt5=False, guidance_embed=True)
_HUNYUAN |= dict(use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False)
_HUNYUAN_15 = _HUNYUAN | dict(vec_in_dim=None, guidance_embed=False, byt5=True, use_cond_type_embedding=True)
_HUNYUAN_15 |= dict(vision_in_dim=1152, meanflow_sum=True, in_channels=65, out_channels=32, patch_size=[1, 1, 1])
_LUMINA = dict(image_model="lumina2", patch_size=2, in_channels=16, dim=2304, cap_feat_dim=2304, n_layers=1)
_LUMINA |= dict(qk_norm=True, n_heads=24, n_kv_heads=8, axes_dims=[32] * 3, axes_lens=[300, 512, 512])
_LUMINA |= dict(rope_theta=10000.0, ffn_dim_multiplier=4.0)
_Z_IMAGE = _LUMINA | dict(dim=3840, cap_feat_dim=2560, n_layers=2, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48])
_Z_IMAGE |= dict(axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8 / 3, z_image_modulation=True)
_Z_IMAGE |= dict(time_scale=1000.0, pad_tokens_multiple=32)
_CONTEXT = dict(target="torch.nn.Linear", params=dict(in_features=64, out_features=128))
_SD3 = dict(in_channels=16, patch_size=2, out_channels=16, depth=2, input_size=None, adm_in_channels=64, num_patches=64)
_SD3 |= dict(context_embedder_config=_CONTEXT, pos_embed_max_size=8, qk_norm="rms", pos_embed_scaling_factor=None)
_SD3 |= dict(x_block_self_attn_layers=[0])
_COGVIDEO = dict(image_model="cogvideox", num_attention_heads=4, attention_head_dim=64, time_embed_dim=512)
_COGVIDEO |= dict(num_layers=1, in_channels=16, patch_size=2, text_embed_dim=64)
_COGVIDEO |= dict(use_learned_positional_embeddings=False, use_rotary_positional_embeddings=True)
_KANDINSKY = dict(image_model="kandinsky5", model_dim=1792, axes_dims=(16, 24, 24), time_dim=512, ff_dim=512)
_KANDINSKY |= dict(visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=1)

# Name -> what the host's model_detection says of such a file.
FAMILIES: dict[str, dict] = {
    "FLUX.1 dev": _FLUX_1,
    "FLUX.1 schnell": _FLUX_1 | dict(guidance_embed=False),
    "FLUX.2": _FLUX_2,
    "Chroma": _CHROMA,
    "Wan 2.1 and 2.2 t2v": _WAN,
    "Wan 2.1 i2v": _WAN | dict(model_type="i2v", in_dim=36),
    "Wan 2.1 first and last frame": _WAN | dict(model_type="i2v", in_dim=36, flf_pos_embed_token_number=514),
    "Wan 2.2 i2v": _WAN | dict(in_dim=36),
    "Wan 2.2 5B": _WAN | dict(in_dim=48, out_dim=48),
    "Wan VACE": _WAN | dict(model_type="vace", vace_in_dim=96, vace_layers=1),
    "Wan camera": _WAN | dict(model_type="camera", in_dim=32),
    "HunyuanVideo": _HUNYUAN,
    "HunyuanVideo i2v": _HUNYUAN | dict(in_channels=33),
    "HunyuanVideo 1.5": _HUNYUAN_15,
    "Qwen-Image": dict(image_model="qwen_image", in_channels=64, num_layers=1),
    "Lumina 2": _LUMINA,
    "Z-Image": _Z_IMAGE,
    "SD3": _SD3,
    "AuraFlow": dict(max_seq=64, cond_seq_dim=2048, n_double_layers=1, n_layers=2),
    "CogVideoX": _COGVIDEO,
    "Kandinsky 5": _KANDINSKY,
    "LTX-Video": dict(image_model="ltxv", num_layers=1, attention_head_dim=64, cross_attention_dim=2048),
}


def host_names(config: dict) -> dict | None:
    """Names and tensors of the host's own model of this config, or None if this host does not know the family."""
    torch, detection, ops = (importlib.import_module(name) for name in ("torch", "comfy.model_detection", "comfy.ops"))
    found = detection.model_config_from_unet_config(dict(config), {})
    if found is None:
        return None
    found.set_inference_dtype(torch.bfloat16, None)
    found.custom_operations = ops.disable_weight_init
    try:
        model = found.get_model({}, "", device=torch.device("meta")).diffusion_model
    except TypeError:  # an older class without one of the options
        return None
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in model.state_dict().items()}


def load(tensors: dict, name: str):
    """The host's loader with the pack's operations -> (the host's model, what the check says of it)."""
    torch = importlib.import_module("torch")
    built = importlib.import_module("nvfp4_video.host.load.built")
    modes = importlib.import_module("nvfp4_video.host.compute.modes")
    linear = importlib.import_module("nvfp4_video.host.compute.linear")
    empty = SimpleNamespace(path=Path(name), tensors={}, metadata={})
    compute = modes.plan_layers(("bf16", "asked for"), {}, empty, [], [])
    operations = linear.weight_only_operations(torch.bfloat16, torch.device("cpu"), "auto", name, compute)
    options = {"custom_operations": operations}
    patcher = importlib.import_module("comfy.sd").load_diffusion_model_state_dict(dict(tensors), model_options=options)
    if patcher is None:
        raise LookupError("the host does not recognise it")
    model, given = patcher.model, built.as_named(patcher.model, tensors)
    again = lambda: built.build_again(model)  # noqa: E731
    return model, built.check_model(model.diffusion_model, operations.Linear, given, name, again)


def family(name: str) -> dict:
    """A whole model of one family, and the same without its last norm or other parameter that is no Linear's."""
    tensors = host_names(FAMILIES[name])
    if tensors is None:
        return {"unknown": True}
    model, lacks = load(tensors, name)
    dit = model.diffusion_model
    linears = {key for key, module in dit.named_modules() if hasattr(module, "in_features")}
    single = [key for key, _ in dit.named_parameters() if key.rpartition(".")[0] not in linears]
    inner = [key for key in single if key.count(".") > 2 and key in tensors]
    found = {"class": type(model).__name__, "lacks": lacks, "parameters": len(tensors), "refused": None}
    for lost in reversed(inner[-2:]):
        try:
            load({key: value for key, value in tensors.items() if key != lost}, name)
            found["refused"] = False
        except LookupError:  # a name by which the host tells the family
            continue
        except ValueError as error:
            found["refused"] = lost.rpartition(".")[0] in str(error)
        break
    return found


def extra(use: bool) -> dict:
    """A FLUX whose class builds what no file has: a norm, which it uses or not, and a table of zeros."""
    torch = importlib.import_module("torch")
    flux = importlib.import_module("comfy.ldm.flux.model").Flux
    tensors, build, forward = host_names(_FLUX_1), flux.__init__, flux.forward

    def with_more(self, *args, operations=None, **kwargs):
        build(self, *args, operations=operations, **kwargs)
        self.norm_final = operations.LayerNorm(8, device=kwargs.get("device"), dtype=torch.bfloat16)
        self.table = torch.nn.Parameter(torch.zeros(2, 8))

    def run(self, x, *args, **kwargs):
        if use:
            self.norm_final(torch.zeros(1, 8, dtype=torch.bfloat16))
        return forward(self, x, *args, **kwargs)

    flux.__init__, flux.forward = with_more, run
    inputs = {"x": torch.zeros(1, 16, 4, 4), "t": torch.tensor([0.5]), "c_crossattn": torch.zeros(1, 8, 64)}
    inputs |= {"y": torch.zeros(1, 32), "guidance": torch.tensor([3.5])}
    try:
        model, lacks = load(tensors, "flux.safetensors")
        with torch.no_grad():
            return {"lacks": lacks, "finite": bool(model.apply_model(**inputs).isfinite().all())}
    except ValueError as error:
        return {"error": str(error)}
    finally:
        flux.__init__, flux.forward = build, forward


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    version = importlib.import_module("in_process").bring_up_host()
    facts: dict[str, object] = {"version": version}
    topics = {name: lambda name=name: family(name) for name in FAMILIES}
    topics |= {"not used": lambda: extra(False), "used": lambda: extra(True)}
    for name, topic in topics.items():
        try:
            facts[name] = topic()
        except Exception:
            facts[name] = {"failed": traceback.format_exc()[-3000:]}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
