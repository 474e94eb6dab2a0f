"""What neighbouring FP8 layers of a loaded model can do together: one pass over memory less each time.

* to_q, to_k and to_v of an attention take the same tensor: it is quantised once.
* GELU before the second Linear of LTX's feed-forward is computed while that Linear quantises its input.

The first changes no bit, the second leaves out the rounding between the two. Classes are set on the model's own
modules; nothing of the host is patched.
"""

from __future__ import annotations

import functools
import importlib

import torch

from ..kernels.fp8 import SharedRows

_PROJECTIONS = ("to_q", "to_k", "to_v")


def fuse(model: torch.nn.Module, linear: type) -> None:
    """Prepare the layers of class ``linear`` in FP8 mode; other models, classes and modes are left alone."""
    for module in model.modules():
        projections = [getattr(module, name, None) for name in _PROJECTIONS]
        if all(_in_fp8(layer, linear) for layer in projections):
            shared = SharedRows()
            for place, layer in enumerate(projections):
                layer.__dict__["_nvfp4_shared"] = (shared, place)
        elif (fused := _feed_forward(type(module))) is not None and _in_fp8(module.net[2], linear):
            module.__class__ = fused


def _in_fp8(layer: object, linear: type) -> bool:
    return isinstance(layer, linear) and layer.__dict__.get("nvfp4_mode") == "fp8"


@functools.cache
def _feed_forward(found: type) -> type | None:
    """LTX's feed-forward -> a class derived from it, any other class -> None."""
    try:
        host = importlib.import_module("comfy.ldm.lightricks.model")
    except ImportError:
        return None
    if found is not getattr(host, "FeedForward", None) or not hasattr(host, "GELU_approx"):
        return None

    class FusedFeedForward(found):
        def forward(self, x):
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(self.net[0]) is not host.GELU_approx:
                return super().forward(x)
            return self.net[2](self.net[0].proj(x), activation="gelu_tanh")

    return FusedFeedForward
