# SPDX-License-Identifier: Apache-2.0
"""Facts about what is kept from step to step inside a real ComfyUI process on the CPU, as JSON.

usage: <the host's python> positions_in_process.py <empty folder>, in the folder of a ComfyUI checkout; run by
test_positions_host.py

The transformer of our loader is called beside the host's own of the decoded weights, in the same order of calls. Of
each call: whether the bits are the same, and how often it asked for what a GPU would be waited for.
"""

from __future__ import annotations

import collections
import importlib
import json
import sys
import traceback
from pathlib import Path

MARK = "facts: "
# A tensor made of Python's numbers, two tensors compared, numbers and truth read from a tensor.
WAITS = ("tensor", "equal", "item", "tolist", "__bool__", "__float__", "__int__")
SMALL, LARGE = ((1, 128, 2, 2, 2), (1, 8, 9, 16)), ((1, 128, 3, 2, 4), (1, 8, 17, 16))


def load(name: str):
    return importlib.import_module(f"nvfp4_video.{name}")


class Calls:
    """Both transformers, and arguments for them by name."""

    def __init__(self, scene):
        self.torch = importlib.import_module("torch")
        management = importlib.import_module("comfy.model_management")
        self.patchers = {"ours": scene.ours("comfy_markers"), "host": scene.stock("bf16_decoded")}
        for patcher in self.patchers.values():
            management.load_models_gpu([patcher])
        self.width = load("checkpoint.identify.signatures").context_width(scene.config)
        self.dtype = self.patchers["ours"].model.get_dtype_inference()
        self.positions = load("host.compute.positions")

    def model(self, whose: str = "ours"):
        return self.patchers[whose].model.diffusion_model

    def given(
        self, shapes=SMALL, mask: str = "", keyframe: float | None = None, audio: int = 0, batch: int = 1
    ) -> dict:
        """The host's arguments; ``mask``: of the first frame ("frame") or of a token of it ("token")."""
        torch, generator = self.torch, self.torch.Generator().manual_seed(1)

        def drawn(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        video, sound = shapes
        x, sigma = [drawn(*video), drawn(*sound)], torch.tensor([0.7])
        found = {"x": x, "timestep": (sigma, sigma), "context": drawn(1, 32, self.width)}
        found |= {"attention_mask": None, "frame_rate": 25.0, "transformer_options": {}}
        tokens = video[3] * video[4]
        if mask:
            noise = torch.ones(1, 1, *video[2:])
            noise[:, :, 0] = 0.0 if mask == "frame" else noise[:, :, 0]
            noise[:, :, 0, 0, 0] = 0.0
            steps = (0.7 * noise).flatten(2).transpose(1, 2)
            found |= {"denoise_mask": noise.to(self.dtype), "timestep": (steps, found["timestep"][1])}
        if keyframe is not None:  # the last frame's tokens lie elsewhere
            coords = torch.full((1, 3, tokens, 2), keyframe)
            noise = torch.ones(1, 1, *video[2:], dtype=self.dtype)
            steps = (0.7 * noise.float()).flatten(2).transpose(1, 2)
            found |= {"keyframe_idxs": coords, "denoise_mask": noise, "timestep": (steps, found["timestep"][1])}
        if audio:
            found["ref_audio"] = {"tokens": drawn(batch, audio, 128)}
        return found

    def run(self, whose: str, **given):
        """A call -> what the model returns, flat, and how often it asked for each of WAITS outside of the blocks."""
        torch, counts, model = self.torch, collections.Counter(), self.model(whose)
        modes, blocks, given = (
            importlib.import_module("torch.overrides"),
            model._process_transformer_blocks,
            self.given(**given),
        )

        class Watch(modes.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                counts[function.__name__] += 1
                return function(*args, **(kwargs or {}))

        def unseen(*args, **kwargs):
            before = dict(counts)
            out = blocks(*args, **kwargs)
            counts.clear()
            counts.update(before)
            return out

        model._process_transformer_blocks = unseen
        try:
            with torch.inference_mode(), Watch():
                out = model(**given)
        finally:
            del model._process_transformer_blocks
        return torch.cat([one.float().flatten() for one in out]), {name: counts[name] for name in WAITS if counts[name]}

    def compare(self, change=None, **given) -> dict:
        """One call of each transformer, after ``change(model)`` of either."""
        for whose in self.patchers if change else ():
            change(self.model(whose))
        (ours, waits), (right, host_waits) = (self.run(whose, **given) for whose in ("ours", "host"))
        same = bool(self.torch.equal(ours, right)) and bool(ours.isfinite().all())
        return {"equal": same, "waits": waits, "host's": host_waits}


def hooked(model) -> None:
    """Somebody's hook of the layer behind the tokens."""
    model.patchify_proj.register_forward_hook(lambda layer, given, out: out * 1.5)


def shorter(model) -> None:
    """Another node's number, from which tables follow."""
    model.positional_embedding_max_pos = [10, 2048, 2048]


def facts_of(scene) -> dict:
    calls = Calls(scene)
    orders = {
        "first": {}, "again": {}, "large": {"shapes": LARGE}, "large again": {"shapes": LARGE}, "small": {},
        "mask of a frame": {"mask": "frame"}, "mask of a token": {"mask": "token"}, "keyframe": {"keyframe": 3.0},
        "keyframe elsewhere": {"keyframe": 9.0}, "audio": {"audio": 4}, "plain": {}, "shorter": {"change": shorter},
        "hooked": {"change": hooked}, "last": {},
    }  # fmt: skip
    found = {name: calls.compare(**given) for name, given in orders.items()}
    return {"known": vars(calls.model())[calls.positions._KNOWN] is not None, "calls": found}


def main(folder: Path) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    in_process = importlib.import_module("in_process")
    facts: dict[str, object] = {"version": in_process.bring_up_host()}
    scene = in_process.Scene(folder)
    facts["ltx"] = scene.ltx
    if scene.ltx is not None:
        try:
            facts["positions"] = facts_of(scene)
        except Exception:
            facts["positions"] = {"failed": traceback.format_exc()}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
