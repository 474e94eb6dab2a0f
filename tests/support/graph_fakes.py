# SPDX-License-Identifier: Apache-2.0
"""A model with the host's shapes of call, and what stands in for CUDA on a CPU: graphs, events, free memory.

A fake graph reads and writes the plan's tensors as a captured block would, with the LoRA it was captured with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from comfy.patcher_extension import WrapperExecutor
from nvfp4_video.host.compute import block_graphs, graph_key, graph_plan
from nvfp4_video.host.compute.lora import Branch, branch_of

STEPS = torch.linspace(1, 0, 9)
CPU = torch.device("cpu")


@dataclasses.dataclass
class Compressed:
    data: torch.Tensor
    batch_size: int = 1
    num_frames: int = 2
    patches_per_frame: int = 3
    feature_dim: int = 4


class Layer(torch.nn.Linear):
    """Computes its LoRA beside the weight, and runs whatever attention the options ask for."""

    def forward(self, x, options):
        out = torch.nn.functional.linear(x, self.weight, self.bias)
        if (branch := self.__dict__.get("nvfp4_lora")) is not None:
            out = out + (x @ branch.down.t() * branch.down_scale[:, 0]) @ branch.up.t()
        override = options.get("optimized_attention_override")
        return out if override is None else override(out)


class Block(torch.nn.Module):
    """Changes its streams in place and counts how often it runs itself."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4))
        self.proj = Layer(4, 4)
        self.runs = 0

    def forward(self, x, context, timestep, pe, mask, transformer_options):
        self.runs += 1
        video, audio = x
        if transformer_options.get("run_vx", True):
            moved = context + timestep.data + pe[0] * pe[1]
            video.add_(self.proj(video, transformer_options) * self.table + moved)
        audio.mul_(0.5).add_(context.sum())
        return video, audio


class Model(torch.nn.Module):
    def __init__(self, device=CPU, blocks: int = 3):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(Block() for _ in range(blocks)).to(device)

    def step(self, x, transformer_options, context, timestep, pe):
        """The host's loop over the blocks, their replacements included."""
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.transformer_blocks):

            def original(given, block=block):
                names = ("context", "timestep", "pe", "mask", "transformer_options")
                return {"img": block(given["img"], **{name: given[name] for name in names})}

            given = {"img": tuple(x), "context": context, "timestep": timestep, "pe": pe, "mask": None}
            given["transformer_options"] = transformer_options
            replacement = replaced.get(("double_block", i))
            x = (replacement(given, {"original_block": original}) if replacement else original(given))["img"]
        return [tensor.clone() for tensor in x]

    def layers(self) -> list[Layer]:
        return [block.proj for block in self.transformer_blocks]


def branch(rank: int = 2) -> Branch:
    terms = [(1.0, torch.randn(4, rank), torch.randn(rank, 4))]
    found = branch_of(terms, torch.float32)
    found.terms = tuple(terms)
    return found


def show(model: Model, branches: list | None) -> None:
    """Give each layer its LoRA, or take it away."""
    for layer, one in zip(model.layers(), branches or [None] * len(model.layers()), strict=True):
        layer.__dict__.pop("nvfp4_lora", None)
        if one is not None:
            layer.__dict__["nvfp4_lora"] = one


class FakeGraph:
    """What a graph does: run the block on the plan's own tensors, with the options and LoRA of its capture."""

    def __init__(self, plan, original, options, layer):
        self.plan, self.original, self.options, self.layer = plan, original, options, layer
        self.branch, self.alive = layer.__dict__.get("nvfp4_lora"), True

    def replay(self):
        assert self.alive
        now = self.layer.__dict__.pop("nvfp4_lora", None)
        self.layer.__dict__ |= {"nvfp4_lora": self.branch} if self.branch else {}
        self.original({**self.plan.arguments, "transformer_options": self.options})
        self.layer.__dict__.pop("nvfp4_lora", None)
        self.layer.__dict__ |= {"nvfp4_lora": now} if now else {}

    def reset(self):
        self.alive = False


class Gpu:
    """What the fakes were told and saw: whether the GPU waits for the CPU, captures, memory, what was given back."""

    def __init__(self):
        self.waits, self.free, self.taken, self.fails = True, 30 << 30, 0, None
        self.total, self.gives_back = 80 << 30, True
        self.model = None
        self.captured: list[int] = []
        self.given_back: list[torch.device] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    pretend_host(monkeypatch)

    class Event:
        def record(self, stream=None):
            pass

        def query(self):
            return found.waits

    def capture(self, number, branches, weights, options, original):
        if found.fails is not None:
            raise found.fails
        found.captured.append(number)
        found.free -= found.taken
        graph = FakeGraph(self, original, dict(options), found.model.layers()[number])
        known = self.graphs.setdefault(number, {})
        known[branches] = graph_plan.Captured(graph, weights)
        return known[branches]

    monkeypatch.setattr(block_graphs, "_WAITS", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found.free, found.total))
    monkeypatch.setattr(graph_plan, "apart", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graph_plan, "give_back", found.given_back.append)
    monkeypatch.setattr(graph_plan, "gives_memory_back", lambda: found.gives_back)
    monkeypatch.setattr(graph_plan.Plan, "capture", capture)
    yield found
    for blocks in list(block_graphs._models.values()):
        blocks.drop()  # while nothing of CUDA is asked for it


def pretend_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above are the host's, and nothing stands in the way of graphs."""
    classes = {"LTXAVModel": Model, "BasicAVTransformerBlock": Block, "CompressedTimestep": Compressed}
    monkeypatch.setattr(graph_key, "host_class", classes.get)
    monkeypatch.setattr(block_graphs, "obstacle", lambda model, device: "")


def options(**more):
    return {"prefetch_dynamic_vbars": True, "sample_sigmas": STEPS, "sigmas": STEPS[:1], "wrappers": {}, **more}


def inputs(tokens: int = 6, device=CPU) -> dict:
    def draw(*shape):
        return torch.randn(shape, device=device)

    return {
        "x": (draw(1, tokens, 4), draw(1, 2, 4)),
        "context": draw(1, tokens, 4),
        "timestep": Compressed(draw(1, tokens, 4)),
        "pe": (draw(1, tokens, 4), 2.0),
    }


def run(model, given, wrapped=True, wrappers=(), before=(), **more):
    """One step, through the pack's wrapper and those ``before`` and after it, or without it, on copies of streams."""
    x = [tensor.clone() for tensor in given["x"]]
    rest = {name: value for name, value in given.items() if name != "x"}
    executor = WrapperExecutor.new_class_executor(
        model.step, model, [*before, block_graphs.with_graphs, *wrappers] if wrapped else [*before, *wrappers]
    )
    with torch.no_grad():
        return executor.execute(x, options(**more), **rest)


def step(gpu: Gpu, model: Model, tokens: int = 6, **more) -> None:
    """One step that must give what the blocks give."""
    gpu.model = model
    given = inputs(tokens)
    found, right = run(model, given, **more), run(model, given, wrapped=False, **more)
    assert all(map(torch.equal, found, right))


def patcher_of(model, device=CPU):
    return type("Patcher", (), {"model": type("Base", (), {"diffusion_model": model}), "load_device": device})


def counts(model) -> dict[str, int]:
    """How often blocks of a model were replayed, captured or ran themselves."""
    return dict(block_graphs.blocks_of(model).counts)
