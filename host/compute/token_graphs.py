# SPDX-License-Identifier: Apache-2.0
"""Gemma 3's token loop in a shape that the host can replay as CUDA graphs, one a block.

Each token costs a block some forty kernels, most of which take the CPU longer to launch than the GPU to run. The host
can replay a block as a graph where the keys and values lie at fixed addresses (its ``FixedKV``), and does so for
decoders it has such a cache for; Gemma 3 is none of them, on hosts with the Comfy Compiler neither: its heads have 256
numbers, and most of its layers a window. ``DecodeCache`` adds both: one slot a token from the prompt's first on, and a
bias that hides the slots no token has, or that lie outside a layer's window.

Only the decode of one token is ours, its attention here and the rest of a block in token_block.py; prompt, sampling,
residency checks and capture are the host's. The classes are set on the loaded model's own modules; nothing of the host
is patched. Where the host cannot capture (no DynamicVRAM, CPU, graphs disabled, an older ComfyUI) its own cache and
attention are used; so they are where a small Gemma decoded both ways shows that the host's token loop is not the one
known here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import types
import weakref
from types import ModuleType
from typing import Any

import comfy.model_management
import torch

from .. import residency
from . import token_block

logger = logging.getLogger(__name__)

EAGER = "block by block"


class Slots:
    """Which slots of a cache count, on the device, shared by all layers of one window.

    ``position`` (1,) int64: where the next token goes; ``bias`` (capacity,) FP32: 0 or minus infinity. ``rotations``
    are kept here for as long as the cache is.
    """

    def __init__(self, capacity: int, window: int | None, device: torch.device, rotations: Any = None):
        self.window, self.end, self.rotations = window, 0, rotations
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.bias = torch.full((capacity,), float("-inf"), device=device)

    def take(self, index: int, count: int) -> None:
        """Tokens ``index`` to ``index + count`` are next; the layers after the first ask again and change nothing."""
        end = index + count
        if end == self.end:
            return
        first, before = (max(0, e - self.window) if self.window else 0 for e in (end, self.end))
        self.position.fill_(index)
        self.bias[index:end] = 0
        if first > before:
            self.bias[before:first] = float("-inf")
        self.end = end


@functools.cache
def _classes() -> tuple[type, type, type] | None:
    """(cache, attention, model) over the host's own, or None where it has no such machinery."""
    try:
        llama = importlib.import_module("comfy.text_encoders.llama")
        prefetch = importlib.import_module("comfy.model_prefetch")
    except ImportError:
        return None
    if not all(hasattr(llama, name) for name in ("FixedKV", "Attention", "Llama2_", "apply_rope")):
        return None
    if not {"core", "enable_graph"} <= inspect.signature(prefetch.prefetch_queue_pop).parameters.keys():
        return None
    if not hasattr(llama.Llama2_, "init_kv_cache") or not hasattr(llama.Llama2_, "get_dynamic_vram__units"):
        return None
    return _derive(llama, prefetch)


def _derive(llama: ModuleType, prefetch: ModuleType) -> tuple[type, type, type]:
    class DecodeCache(llama.FixedKV):
        """Keys and values (1, capacity, heads, head_dim) of one layer; ``slots`` is shared by layers of one window."""

        def __init__(self, key: torch.Tensor, value: torch.Tensor, slots: Slots):
            super().__init__(key, value, 0, slots.position, torch.zeros(1, dtype=torch.int32, device=key.device))
            self.slots = slots

        def prepare(self, num_tokens: int) -> None:
            self.slots.take(self.index, num_tokens)

    class DecodeAttention(llama.Attention):
        def forward(self, hidden_states, freqs_cis=None, past_key_value=None, **others):
            cache = past_key_value
            if not isinstance(cache, DecodeCache) or hidden_states.shape[1] != 1 or cache.index == 0:
                return super().forward(hidden_states, freqs_cis=freqs_cis, past_key_value=cache, **others)
            heads, width = (1, 1, -1, self.head_dim), self.head_dim
            query = self.q_norm(self.q_proj(hidden_states).view(heads).transpose(1, 2))
            key = self.k_norm(self.k_proj(hidden_states).view(heads).transpose(1, 2))
            query, key = llama.apply_rope(query, key, freqs_cis=freqs_cis)
            cache.key.index_copy_(1, cache.position, key.transpose(1, 2))
            cache.value.index_copy_(1, cache.position, self.v_proj(hidden_states).view(heads))
            # Query heads that share a key head lie side by side: they are the rows of one product.
            query = query.reshape(self.num_kv_heads, self.num_heads // self.num_kv_heads, width)
            scores = _scores(query, cache.key[0].permute(1, 2, 0))
            weights = torch.add(cache.slots.bias, scores, alpha=width**-0.5).softmax(-1).to(query.dtype)
            output = torch.bmm(weights, cache.value[0].transpose(0, 1))
            return self.o_proj(output.view(1, 1, self.inner_size)), cache

    class DecodeModel(llama.Llama2_):
        def init_kv_cache(self, batch, capacity, device, dtype):
            if batch != 1 or _obstacle(device) or not residency.has_allocation(self.layers[0]):
                return super().init_kv_cache(batch, capacity, device, dtype)
            if any(residency.is_captured(layer) for layer in self.layers):
                prefetch.cleanup_prefetch_queues()  # graphs of an earlier generation hold its cache
            return self.fixed_caches(capacity, device, dtype)

        def fixed_caches(self, capacity, device, dtype):
            """One DecodeCache a layer; made before the loop, so that nothing of it is new in a recorded step."""
            _products_in_fp32(device, dtype)
            rotations = self.table_of_rotations(-(-capacity // 8) * 8, device)
            slots: dict[int | None, Slots] = {}
            shape = (1, -(-capacity // 8) * 8, self.config.num_key_value_heads, self.config.head_dim)
            caches = []
            for layer in self.layers:
                window = layer.sliding_attention or None
                if window not in slots:
                    slots[window] = Slots(shape[1], window, device, rotations)
                # Zeros, because a hidden slot counts with the weight 0, and 0 times NaN is NaN.
                key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                caches.append(DecodeCache(key, value, slots[window]))
            return caches

        def table_of_rotations(self, capacity, device):
            """The host's rotations of all tokens, as one tensor: a token's own are some thirty launches. Or None."""
            self.__dict__["_nvfp4_rotations"] = None
            table = self.compute_freqs_cis(torch.arange(capacity, device=device)[None], device)
            if not isinstance(table, torch.Tensor):
                return None
            self.__dict__["_nvfp4_rotations"] = weakref.ref(table)
            return table

        def compute_freqs_cis(self, position_ids, device):
            kept = self.__dict__.get("_nvfp4_rotations")
            table = None if kept is None else kept()
            one = position_ids.shape == (1, 1) and position_ids.dtype == torch.int64
            if table is not None and one and position_ids.device == table.device:
                return table.index_select(-4, position_ids[0])
            # The compiler's decode buffers hold one tensor; Gemma 3 rotates by two matrices, of which a block takes
            # its own by index. Older hosts have buffers for a list, and nothing that makes a matrix of one.
            rotations = super().compute_freqs_cis(position_ids, device)
            matrix = getattr(llama, "rope_matrix", None)
            if matrix is None or not isinstance(rotations, list):
                return rotations
            return torch.stack([matrix(rotation) for rotation in rotations])

    return DecodeCache, DecodeAttention, DecodeModel


@functools.cache
def _products_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can give the FP32 sums of a product of ``dtype``."""
    try:
        torch.bmm(*(torch.zeros(1, 8, 8, dtype=dtype, device=device) for _ in range(2)), out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(H, G, D) x (H, D, C) -> (H, G, C) FP32, not rounded on the way: a softmax magnifies what is lost here."""
    if query.dtype != torch.float32 and _products_in_fp32(query.device, query.dtype):
        return torch.bmm(query, key, out_dtype=torch.float32)
    return torch.bmm(query.float(), key.float())


def _obstacle(device: torch.device) -> str:
    """Why the host will not capture graphs on ``device``, or an empty string."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"graphs need an NVIDIA GPU, the model is on {device.type}"
    if residency.option("disable_cuda_graphs"):
        return "ComfyUI runs with --disable-cuda-graphs or --disable-comfy-compiler"
    if comfy.model_management.NUM_STREAMS == 0:
        return "ComfyUI runs without async offload"
    if not residency.compiler_is_on(device):
        return "ComfyUI's compiler is off"
    return ""


@functools.cache
def disagreement() -> str:
    """How this host's token loop differs from the one known here, or an empty string.

    A Gemma 3 of two layers, one of them with a window, decodes on the CPU with the host's cache and with ours, through
    the host's decode buffers where it has such. Whatever a newer host may have changed shows here, when a model is
    loaded, and not in the middle of a text.
    """
    try:
        wanted, found = (_decode_small(model, ours) for model, ours in _small_models())
    except Exception as error:  # of any kind: what a newer host does with ours is not known
        logger.debug("the small Gemma cannot be decoded", exc_info=True)
        return f"{type(error).__name__}: {error}"
    difference = ((found - wanted).norm() / wanted.norm()).item()
    return "" if difference < 1e-4 else f"a small model's output differs by {difference:.1g}"


def _small_models() -> list[tuple[Any, bool]]:
    """The host's model and ours, with the same weights and buffers as generation would use them."""
    llama = importlib.import_module("comfy.text_encoders.llama")
    _, attention, decode = _classes()
    # torch's own layers: under DynamicVRAM the host's have no weights before a file is loaded into them.
    plain = types.SimpleNamespace(Linear=torch.nn.Linear, Embedding=torch.nn.Embedding)
    generator, models = torch.Generator(), []
    for kind in (llama.Llama2_, decode):
        config = llama.Gemma3_12B_Config(
            vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        config.head_dim, config.sliding_attention = 16, [3, False]
        with torch.inference_mode(False), torch.no_grad():
            model = kind(config, device="cpu", dtype=torch.float32, ops=plain)
            generator.manual_seed(0)
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        if kind is decode:
            residency.ask_for_graphs(model)
            for layer in model.layers:
                layer.self_attn.__class__ = attention
        models.append((model, kind is decode))
    return models


@torch.no_grad()
def _decode_small(model: Any, ours: bool, prompt: int = 4, count: int = 4) -> torch.Tensor:
    """(count, 32): what the last layer gives for ``count`` tokens after a prompt, one at a time."""
    device, dtype = torch.device("cpu"), torch.float32
    inputs = torch.randn(1, prompt + count, 32, generator=torch.Generator().manual_seed(1))
    make = model.fixed_caches if ours else functools.partial(model.init_kv_cache, 1)
    caches, extra, outputs = make(prompt + count, device, dtype), {}, []
    if ours and hasattr(model, "init_decode_buffers"):
        extra["decode_buffers"] = model.init_decode_buffers(1, device, dtype)
    for step in inputs.split([prompt, *[1] * count], dim=1):
        output, _, caches = model.forward(None, embeds=step.clone(), past_key_values=caches, **extra)
        outputs.append(output[0, -1].clone())
    return torch.stack(outputs[1:])


def use_graphs(clip: Any, backend: str = "auto") -> str:
    """Prepare a loaded LTX text encoder so that the host captures its token loop -> what to expect, for the report."""
    classes = _classes()
    model = clip.cond_stage_model.gemma3_12b.transformer.model
    if classes is None or not hasattr(model, "get_dynamic_vram__units"):
        return f"{EAGER}, this ComfyUI cannot capture graphs of it"
    cache, attention, decode = classes
    apart = ""
    if type(model) is decode.__bases__[0] and model.config.transformer_type == "gemma3":
        if reason := disagreement():
            return f"{EAGER}, this ComfyUI's token loop is not the one known here ({reason})"
        for layer in model.layers:
            if type(layer.self_attn) is attention.__bases__[0]:
                layer.self_attn.__class__ = attention
        model.__class__ = decode
        apart = _fuse(model, (cache, attention), backend, clip.patcher.load_device)
        residency.ask_for_prefetch(model)
        residency.ask_for_graphs(model)
    if not hasattr(clip.cond_stage_model, "get_dynamic_vram__units"):
        # The host asks the whole text encoder for its blocks; LTX's class does not pass the question on.
        clip.cond_stage_model.get_dynamic_vram__units = types.MethodType(_units, clip.cond_stage_model)
    if reason := _obstacle(clip.patcher.load_device):
        return f"{EAGER}, {reason}"
    if not getattr(clip.patcher, "is_dynamic", bool)():
        return f"{EAGER}, graphs need DynamicVRAM"
    return f"a CUDA graph a block, where the block stays on the GPU{apart}"


def _fuse(model: Any, classes: tuple[type, type], backend: str, device: torch.device) -> str:
    """Give the blocks fewer launches a token -> what to add to the report: why not, or an empty string."""
    llama = importlib.import_module("comfy.text_encoders.llama")
    if reason := token_block.obstacle(llama, model.config, backend, device):
        return f"; its passes are ComfyUI's own, {reason}"
    for layer in model.layers:
        if type(layer) is llama.TransformerBlockGemma2:
            layer.__class__ = token_block.block_class(llama, *classes, backend)
    return ""


def _units(encoder: torch.nn.Module) -> tuple[list, list]:
    return encoder.gemma3_12b.transformer.model.get_dynamic_vram__units()
