# SPDX-License-Identifier: Apache-2.0
"""What neighbouring layers of a loaded LTX model in FP8 or INT8 mode can do together: one pass over memory less each.

* to_q, to_k and to_v of an attention take the same tensor: it is quantised once.
* GELU before the second Linear of the feed-forward is computed while that Linear quantises its input.
* The norm and rotation of q and k are one pass, the gates of heads come with the next Linear's rows
  (fused_attention.py); gated addition, norm, modulation and rows for the next Linears are one (fused_block.py).

Rows that another kernel makes are FP8's alone. The first changes no bit, the others leave out roundings between. Models
without a layer in FP8 or INT8 mode are the host's bit for bit as long as their attention is the host's; where another
was chosen, they have the last of the three without rows. Only LTX's own classes are prepared, whose source is one of
those that this pack was written after, and whoever replaced a ``forward`` or hooked a layer gets what he would without:
each call looks. Classes are set on the model's own modules; nothing of the host is patched.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType

import torch

from ...kernels.format import FP8Rows
from ...kernels.fp8 import SharedRows
from .. import residency
from .fused_attention import EXACT, attention_class, is_apart
from .fused_block import block_class
from .matmul import rows_for
from .modes import EIGHT_BITS

_PROJECTIONS = ("to_q", "to_k", "to_v")
# ``fingerprint`` of what the classes here stand for, in ComfyUI 0.33 and in 0.38; of feed-forwards in older ones too.
_FEED_FORWARDS = frozenset(("b540a05160192a2c", "05ec2b32a4fddd79"))
_ATTENTIONS = frozenset(("a50b55954c4f2bc3", "c434d556e55fe4c8"))
_BLOCKS = frozenset(("68f99ad48eef5f89",))


def fuse(model: torch.nn.Module, linear: type) -> str:
    """Prepare the layers of class ``linear`` -> what to expect, for the load report; "" if nobody would.

    Other models and classes and those with layers in FP4 mode are left alone, and modules that were prepared for
    another mode are as before.
    """
    release(model)
    modes = {module.__dict__.get("nvfp4_mode") for module in model.modules() if isinstance(module, linear)}
    exact = modes.isdisjoint(EIGHT_BITS)
    if exact and ("bf16" not in modes or "fp4" in modes):
        return ""
    host, av = _host("model"), _host("av_model")
    attention, block = getattr(host, "CrossAttention", None), getattr(av, "BasicAVTransformerBlock", None)
    known = attention, block, getattr(host, "FeedForward", None)
    if not any(type(module) in known for module in model.modules()):
        return ""
    reason, activated = _stands_down(host, av), ""
    for module in model.modules():
        if type(module) is attention:
            layers = [getattr(module, name, None) for name in _PROJECTIONS]
            if len(kinds := {_in_8_bits(layer, linear) for layer in layers}) == 1 and all(kinds):
                shared, owns = SharedRows(), tuple(layer.__dict__ for layer in layers)
                for place, own in enumerate(owns):
                    own["_nvfp4_shared"], own["_nvfp4_sharers"] = (shared, place), owns
            if not reason:
                _become(module, attention_class(attention, host), exact)
        elif type(module) is block and not reason:
            _become(module, block_class(block, av), exact)
        elif (fused := _feed_forward(type(module))) is not None and _in_8_bits(module.net[2], linear):
            _become(module, fused, exact)
            activated = ", and the feed-forward's activation"
    if exact:
        return "" if reason else "norms, modulations and rotations, where attention is not ComfyUI's own"
    if reason:
        return f"rows of q, k and v{activated}; no more, {reason}"
    return "norms, modulations, gates and rotations, each with its neighbours"


def _become(module: torch.nn.Module, own: type, exact: bool) -> None:
    module.__class__ = own
    module.__dict__[EXACT] = exact


def release(model: torch.nn.Module) -> None:
    """Give all modules that ``fuse`` prepared the host's classes back."""
    for module in model.modules():
        own = module.__dict__
        for name in ("_nvfp4_shared", "_nvfp4_sharers"):
            own.pop(name, None)
        if own.pop(EXACT, None) is not None:
            module.__class__ = type(module).__dict__.get("host_class", type(module))


def _stands_down(host: ModuleType | None, av: ModuleType | None) -> str:
    """Why the host's attention and blocks are left as they are, or an empty string."""
    try:
        attention = fingerprint(host.CrossAttention.forward, host.apply_rotary_emb, host.apply_rotary_emb_qk)
        block = fingerprint(
            av.BasicAVTransformerBlock.forward, av.BasicAVTransformerBlock.get_ada_values,
            av.BasicAVTransformerBlock._apply_text_cross_attention, av.apply_cross_attention_adaln,
            av.CompressedTimestep,
        )  # fmt: skip
    except (AttributeError, OSError, TypeError, SyntaxError) as error:
        return f"this ComfyUI's transformer cannot be read: {error}"
    if attention not in _ATTENTIONS or block not in _BLOCKS:
        return "this ComfyUI's attention or block is not one that this pack knows"
    return str(residency.check())


def fingerprint(*parts: Callable | type) -> str:
    """Functions and classes -> 16 digits of their source without comments, docstrings and layout."""
    digest = hashlib.sha256()
    for part in parts:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


def _in_8_bits(layer: object, linear: type) -> str:
    """Which of EIGHT_BITS a layer computes in, or an empty string."""
    mode = layer.__dict__.get("nvfp4_mode") if isinstance(layer, linear) else ""
    return mode if mode in EIGHT_BITS else ""


def _host(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"comfy.ldm.lightricks.{name}")
    except ImportError:
        return None


@functools.cache
def _feed_forward(found: type) -> type | None:
    """LTX's feed-forward, if its source is as known -> a class derived from it, any other class -> None."""
    host = _host("model")
    if found is not getattr(host, "FeedForward", None) or not hasattr(host, "GELU_approx"):
        return None
    gelu, activate = host.GELU_approx, host.GELU_approx.forward
    try:
        if fingerprint(found.forward, activate) not in _FEED_FORWARDS:
            return None
    except (OSError, TypeError, SyntaxError):
        return None

    class FusedFeedForward(found):
        host_class, host_forward = found, found.forward

        def accepts(self, rows: int, device: torch.device) -> bool:
            """Whether so many rows may come in FP8."""
            free = not (residency.taken_over(self.__dict__) or is_apart(self)) and gelu.forward is activate
            return free and _as_built(self.net, gelu) and rows_for(self.net[0].proj, rows, device)

        def forward(self, x):
            if type(x) is not FP8Rows:
                if is_apart(self) or gelu.forward is not activate or not _as_built(self.net, gelu):
                    return super().forward(x)
            return self.net[2](self.net[0].proj(x), activation="gelu_tanh")

    return FusedFeedForward


def _as_built(net: torch.nn.Module, gelu: type) -> bool:
    """Whether these are still the GELU, Dropout and Linear of the pack that the host built, in nobody else's hands."""
    layers = tuple(net)
    return (
        len(layers) == 3
        and type(layers[0]) is gelu
        and type(layers[1]) is torch.nn.Dropout
        and "nvfp4_mode" in layers[2].__dict__
        and not any(residency.taken_over(module.__dict__) for module in (net, *layers))
    )
