"""Block graphs on a model with the host's shapes of call: when a block is replayed, when not, and with which inputs.

On a CPU a fake graph stands in for CUDA's: it reads and writes the plan's tensors as a captured block would.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from nvfp4_video.host import graphs

STEPS = torch.linspace(1, 0, 9)
CPU = torch.device("cpu")


@dataclasses.dataclass
class Compressed:
    data: torch.Tensor
    batch_size: int = 1
    num_frames: int = 2
    patches_per_frame: int = 3
    feature_dim: int = 4


class Block(torch.nn.Module):
    """Changes its streams in place and counts how often it runs itself."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4))
        self.proj = torch.nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x, context, timestep, pe, mask, transformer_options):
        self.runs += 1
        video, audio = x
        if transformer_options.get("run_vx", True):
            video.add_(self.proj(video) * self.table + context + timestep.data + pe[0] * pe[1])
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

    def runs(self):
        return [block.runs for block in self.transformer_blocks]


class FakeGraph:
    """What a graph does: run the block on the plan's own tensors."""

    def __init__(self, plan, original):
        self.plan, self.original, self.alive = plan, original, True

    def replay(self):
        assert self.alive
        self.original(self.plan.arguments)

    def reset(self):
        self.alive = False


class Gpu:
    """What the fakes were told and saw: whether the GPU waits for the CPU, how many blocks were captured."""

    def __init__(self):
        self.waits, self.captured, self.free, self.taken = True, 0, 30 << 30, 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    classes = {"LTXAVModel": Model, "BasicAVTransformerBlock": Block, "CompressedTimestep": Compressed}
    monkeypatch.setattr(graphs, "_host_class", classes.get)
    monkeypatch.setattr(graphs, "_obstacle", lambda model, device: "")

    class Event:
        def record(self):
            pass

        def query(self):
            return found.waits

    def capture(self, plan, number, original, weights):
        found.captured += 1
        found.free -= found.taken
        plan.graphs[number] = FakeGraph(plan, original), weights
        return plan.graphs[number][0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found.free, 80 << 30))
    monkeypatch.setattr(graphs._Graphs, "_capture", capture)
    return found


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


def run(model, given, wrapped=True, **more):
    """One step, through the wrapper or without it, on copies of the streams."""
    x = [tensor.clone() for tensor in given["x"]]
    rest = {name: value for name, value in given.items() if name != "x"}
    wrappers = [graphs.with_graphs] if wrapped else []
    executor = WrapperExecutor.new_class_executor(model.step, model, wrappers)
    with torch.no_grad():
        return executor.execute(x, options(**more), **rest)


def assert_same(found, right):
    assert all(map(torch.equal, found, right))


def test_a_replayed_block_computes_what_the_block_does_on_every_step_s_own_inputs(gpu: Gpu):
    model = Model()
    for step in range(6):
        given = inputs()
        found, before = run(model, given), model.runs()
        assert_same(found, run(model, given, wrapped=False))
        assert before[0] - step == step + 1, "the fake replays through the block"
    assert gpu.captured == 3, "once a block: from the third step on"


def test_blocks_are_captured_only_after_the_gpu_was_seen_waiting(gpu: Gpu):
    model, gpu.waits = Model(), False
    for _ in range(4):
        run(model, inputs())
    assert gpu.captured == 0
    gpu.waits = True
    run(model, inputs())
    assert gpu.captured == 0
    run(model, inputs())
    assert gpu.captured == 3


def test_the_first_step_of_a_kind_decides_nothing_since_it_loads_and_compiles(gpu: Gpu):
    model = Model()
    run(model, inputs())
    run(model, inputs(tokens=9))
    run(model, inputs())
    assert gpu.captured == 0
    run(model, inputs())
    assert gpu.captured == 3


def test_inputs_of_two_kinds_have_graphs_of_their_own_and_a_third_has_none(gpu: Gpu):
    model = Model()
    for tokens in (6, 9, 12) * 4:
        given = inputs(tokens)
        assert_same(run(model, given), run(model, given, wrapped=False))
    assert gpu.captured == 6


def test_what_an_option_changes_is_another_kind(gpu: Gpu):
    model = Model()
    for flag in (True, False) * 4:
        given = inputs()
        assert_same(run(model, given, run_vx=flag), run(model, given, wrapped=False, run_vx=flag))
    assert gpu.captured == 6


def test_sampling_s_end_frees_the_graphs_and_the_next_begins_with_captured_blocks(gpu: Gpu):
    model = Model()
    for _ in range(3):
        run(model, inputs())
    plan = next(iter(graphs._models[model].plans.values()))
    patcher = type("Patcher", (), {"model": type("Base", (), {"diffusion_model": model})})
    graphs.drop_graphs(patcher)
    assert not any(graph.alive for graph, _ in plan.graphs.values()) and not graphs._models[model].plans
    given = inputs()
    assert_same(run(model, given), run(model, given, wrapped=False))
    assert gpu.captured == 6


def test_a_weight_that_moved_is_captured_anew_and_one_elsewhere_runs_its_block(gpu: Gpu):
    model = Model()
    for _ in range(3):
        run(model, inputs())
    block = model.transformer_blocks[1]
    block.proj.weight = torch.nn.Parameter(torch.randn(4, 4))
    given = inputs()
    assert_same(run(model, given), run(model, given, wrapped=False))
    assert gpu.captured == 4
    block.proj.__dict__["_v"], block.proj.__dict__["_prefetch"] = object(), {"resident": False}
    run(model, given)
    assert gpu.captured == 4
    block.proj._prefetch = {"resident": True}
    block.proj._v_weight, block.proj._v_bias = block.proj.weight, block.proj.bias
    assert graphs._weights(block, CPU) is not None


@pytest.mark.parametrize("change", ["forward", "hook", "function", "class"])
def test_a_block_that_somebody_changed_is_left_alone(change: str, gpu: Gpu):
    block = Model().transformer_blocks[0]
    assert graphs._weights(block, CPU) is not None
    if change == "forward":
        block.proj.forward = lambda x: x
    elif change == "hook":
        block.proj.register_forward_hook(lambda *_: None)
    elif change == "function":
        block.proj.weight_function = [lambda w: w]
    else:
        block.__class__ = type("Other", (Block,), {})
    assert graphs._weights(block, CPU) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimized_attention_override", print),
        ("patches", {"attn1_patch": [print]}),
        ("patches_replace", {"dit": {("double_block", 1): lambda given, extra: extra["original_block"](given)}}),
        ("something_new", 1),
    ],
)
def test_what_else_changes_blocks_keeps_them_from_being_captured_and_is_named_once(name, value, gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model = Model()
    for _ in range(4):
        run(model, inputs(), **{name: value})
    assert gpu.captured == 0
    assert caplog.text.count(f"something else in the workflow changes blocks: {name}") == 1


def test_capturing_stops_before_the_gpu_s_memory_runs_out(gpu: Gpu, caplog):
    caplog.set_level("INFO")
    model, gpu.free, gpu.taken = Model(blocks=6), 11 << 30, 2 << 30
    for _ in range(5):
        given = inputs()
        assert_same(run(model, given), run(model, given, wrapped=False))
    assert gpu.captured == 3, "11, 9 and 7 GiB were free, then 5, of which another 2 * 2 must not be missing"
    assert caplog.text.count("after 3 blocks only 5.4 GB of GPU memory are free") == 1


def test_few_steps_are_not_worth_a_capture(gpu: Gpu):
    model = Model()
    for _ in range(4):
        run(model, inputs(), sample_sigmas=STEPS[:4])
    assert gpu.captured == 0


def test_an_argument_of_unknown_kind_is_the_block_s_own(gpu: Gpu):
    model = Model()
    for _ in range(4):
        given = inputs()
        given["timestep"] = type("Other", (), {"data": torch.ones(1, 6, 4)})()
        run(model, given)
    assert gpu.captured == 0


def test_a_failed_capture_is_said_once_and_ends_all_others(monkeypatch, caplog):
    caplog.set_level("INFO")
    model = Model()
    found = graphs._Graphs(model)
    found.waits_for_cpu.add(("kind",))
    plan = type("Plan", (), {"stream": (torch.ones(1),), "pool": None, "arguments": {}, "graphs": {}})()

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, **_):
            raise RuntimeError("CUDA error: operation not permitted\nmore")

    found.capture_stream = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    assert found._capture(plan, 0, None, ()) is None
    assert "cannot be captured (CUDA error: operation not permitted)" in caplog.text
    assert not found.blocks and not found.waits_for_cpu


def test_other_models_and_devices_are_refused_with_the_reason():
    assert "audio and video transformer" in graphs._obstacle(torch.nn.Linear(1, 1), CPU)
    patcher = type("Patcher", (), {"model": type("Base", (), {"diffusion_model": Model()}), "load_device": CPU})
    assert graphs.use_graphs(patcher) == "none, they are made for LTX's audio and video transformer"


def test_a_loaded_ltx_model_gets_the_wrapper_and_the_clean_up(monkeypatch):
    monkeypatch.setattr(graphs, "_obstacle", lambda model, device: "")
    added = []

    class Patcher:
        model, load_device = type("Base", (), {"diffusion_model": Model()}), CPU

        def add_wrapper_with_key(self, *given):
            added.append(given)

        add_callback_with_key = add_wrapper_with_key

    assert graphs.use_graphs(Patcher()).startswith("one a block")
    assert added == [
        (WrappersMP.DIFFUSION_MODEL, graphs.KEY, graphs.with_graphs),
        (CallbacksMP.ON_CLEANUP, graphs.KEY, graphs.drop_graphs),
    ]


@pytest.mark.cuda
def test_cuda_s_own_graphs_compute_what_the_blocks_do(monkeypatch):
    device = torch.device("cuda", 0)
    classes = {"LTXAVModel": Model, "BasicAVTransformerBlock": Block, "CompressedTimestep": Compressed}
    monkeypatch.setattr(graphs, "_host_class", classes.get)
    monkeypatch.setattr(graphs, "_obstacle", lambda model, device: "")
    model = Model(device)
    known = graphs._models.setdefault(model, graphs._Graphs(model))
    for step in range(6):
        given = inputs(device=device)
        assert_same(run(model, given), run(model, given, wrapped=False))
        if step == 1:  # what a slow GPU would hide
            known.waits_for_cpu.update(known.passes)
    plans = list(known.plans.values())
    assert len(plans) == 1 and len(plans[0].graphs) == 3
    known.drop()
