# SPDX-License-Identifier: Apache-2.0
"""Making graphs and taking them down: what stands in the way on which host, a capture that fails, memory afterwards."""

from __future__ import annotations

import ctypes
import gc
import sys
import types
import weakref

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from nvfp4_video.host import residency
from nvfp4_video.host.compute import block_graphs, graph_key, graph_plan
from nvfp4_video.host.load.report import LoadReport
from nvfp4_video.tests.support.graph_fakes import CPU, Block, Compressed, Model, inputs, patcher_of, run

GPU = torch.device("cuda", 0)
SWITCHES = {"disable_cuda_graphs": False, "disable_comfy_compiler": False, "assert_graph_breaks": False}


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The host's command line; the model is one of LTX's on an NVIDIA GPU, the host one with DynamicVRAM."""
    found = dict(SWITCHES)
    classes = {"LTXAVModel": Model, "BasicAVTransformerBlock": Block, "CompressedTimestep": Compressed}
    monkeypatch.setattr(graph_key, "host_class", classes.get)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(residency, "option", lambda name: found.get(name))
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", types.ModuleType("comfy.model_prefetch"))
    return found


def test_nothing_stands_in_the_way_on_a_host_as_it_should_be(switches):
    assert block_graphs.obstacle(Model(), GPU) == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("disable_comfy_compiler", True, "--disable-comfy-compiler, which switches CUDA graphs off too"),
        ("assert_graph_breaks", True, "--assert-graph-breaks"),
        ("disable_cuda_graphs", True, "--disable-cuda-graphs"),
        ("disable_cuda_graphs", None, "too old to have that switch"),
    ],
)
def test_a_switch_of_the_host_is_obeyed_and_named(name, value, words, switches):
    switches |= {"disable_comfy_compiler": None, "assert_graph_breaks": None, name: value}
    assert words in block_graphs.obstacle(Model(), GPU)
    assert words in block_graphs.use_graphs(patcher_of(Model(), GPU))


def test_disable_comfy_compiler_is_the_reason_given_where_it_set_the_other_switch(switches):
    switches |= {"disable_comfy_compiler": True, "disable_cuda_graphs": True}
    assert "--disable-comfy-compiler" in block_graphs.obstacle(Model(), GPU)


def test_a_host_without_block_prefetch_or_with_other_books_has_no_graphs_and_the_report_says_so(switches, monkeypatch):
    monkeypatch.setattr(residency, "_words", lambda module: frozenset({"weight_function", "bias_function"}))
    assert block_graphs.obstacle(Model(), GPU) == ""
    monkeypatch.setattr(residency, "_words", lambda module: frozenset({"weight_function"}))
    text = block_graphs.use_graphs(patcher_of(Model(), GPU))
    assert text == f"none, {residency.check()}" and "no bias_function" in text
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", None)
    assert "does not say in its options" in block_graphs.use_graphs(patcher_of(Model(), GPU))
    fields = {name: "" for name in LoadReport.__dataclass_fields__} | {"layers": {}, "modes": {}, "gigabytes": 1.0}
    assert f"CUDA graphs: {text}" in str(LoadReport(**fields | {"graphs": text}))
    assert "CUDA graphs" not in str(LoadReport(**fields))


def test_a_model_on_a_second_gpu_has_graphs_and_one_that_is_split_over_several_has_none(switches):
    assert block_graphs.obstacle(Model(), torch.device("cuda", 1)) == ""
    assert graph_key.strange({"multigpu_thread_device": torch.device("cuda", 0)}) == ["multigpu_thread_device"]


def test_nothing_is_said_of_graphs_for_other_models_and_devices(switches):
    for patcher in (patcher_of(torch.nn.Linear(1, 1), GPU), patcher_of(Model(), CPU)):
        assert block_graphs.use_graphs(patcher) == ""
        assert block_graphs.obstacle(patcher.model.diffusion_model, patcher.load_device)


def test_a_loaded_ltx_model_gets_the_wrapper_and_the_clean_up(switches):
    added = []
    patcher = patcher_of(Model(), GPU)()
    patcher.add_wrapper_with_key = patcher.add_callback_with_key = lambda *given: added.append(given)
    assert block_graphs.use_graphs(patcher).startswith("one a block")
    assert added == [
        (WrappersMP.DIFFUSION_MODEL, block_graphs.KEY, block_graphs.with_graphs),
        (CallbacksMP.ON_CLEANUP, block_graphs.KEY, block_graphs.end_of_sampling),
        (CallbacksMP.ON_LOAD, block_graphs.KEY, block_graphs.put_back),
        (CallbacksMP.ON_DETACH, block_graphs.KEY, block_graphs.drop_graphs),
    ]


def test_options_without_the_host_s_flag_are_left_alone(switches, monkeypatch):
    monkeypatch.setattr(block_graphs, "obstacle", lambda model, device: "")
    model = Model()
    options = {"sample_sigmas": torch.ones(9)}
    executor = WrapperExecutor.new_class_executor(lambda given: given, model, [block_graphs.with_graphs])
    assert executor.execute(options) is options and options.keys() == {"sample_sigmas"}


def test_inside_somebody_s_capture_blocks_run_themselves(switches, monkeypatch):
    blocks = block_graphs.Blocks(Model())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    video = types.SimpleNamespace(device=GPU)
    arguments = {"img": (video, video), "transformer_options": {}}

    def original(given):
        return given

    with torch.no_grad():
        assert blocks.run(0, arguments, {"original_block": original}) is arguments
    assert blocks.counts == {"eager": 1}


def test_with_gradients_blocks_run_themselves(switches, monkeypatch):
    monkeypatch.setattr(block_graphs, "obstacle", lambda model, device: "")
    model, given = Model(), inputs()
    run(model, given)
    blocks = block_graphs.blocks_of(model)
    with torch.enable_grad():
        assert blocks._describe(0, {"img": given["x"], "transformer_options": {}}, model.step) is None


class Stream:
    cuda_stream = 7

    def wait_stream(self, other):
        pass


class Graph:
    """Keeps what happened to it."""

    def __init__(self):
        self.log = []

    def capture_begin(self, **options):
        self.log.append(options["capture_error_mode"])

    def capture_end(self):
        self.log.append("end")

    def reset(self):
        self.log.append("reset")


@pytest.fixture
def plan(switches, monkeypatch) -> tuple[graph_plan.Plan, list[Graph]]:
    """A plan on the CPU, and the graphs that were made for it."""
    made: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(graph_plan, "_capture_stream", lambda device: Stream())
    monkeypatch.setattr(graph_plan, "_kept", [])
    given = inputs()
    arguments = {"img": given["x"], "context": given["context"], "transformer_options": {}}
    return graph_plan.Plan(arguments, [given["context"]]), made


@pytest.mark.parametrize("error", [RuntimeError("first"), comfy.model_management.InterruptProcessingException()])
def test_a_capture_that_fails_is_ended_and_the_first_error_is_the_one_told(error, plan, monkeypatch):
    plan, made = plan
    ended = []

    def end(self):
        ended.append(self)
        raise RuntimeError("the capture was invalid")

    def original(arguments):
        raise error

    monkeypatch.setattr(Graph, "capture_end", end)
    with pytest.raises(type(error)) as found:
        plan.capture(0, (), (), {}, original)
    assert found.value is error and ended == made and not plan.graphs[0]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("status", "alive"), [(1, False), (2, True), (0, True)])
def test_tensors_of_a_failed_capture_are_freed_inside_it_or_never(status, alive, chained, plan, monkeypatch):
    plan, _ = plan
    seen: list = []

    def is_capturing(stream, found):
        assert stream.value == Stream.cuda_stream
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int))[0] = status
        return 0

    def kernel():
        made = torch.zeros(3)
        seen.append(weakref.ref(made))
        raise RuntimeError("a kernel that cannot be loaded")

    def original(arguments):
        try:
            kernel()
        except RuntimeError as error:
            raise (RuntimeError(str(error)) if chained else error)  # noqa: B904

    monkeypatch.setattr(graph_plan, "_driver", lambda: types.SimpleNamespace(cuStreamIsCapturing=is_capturing))
    monkeypatch.setattr(Graph, "capture_end", lambda self: seen.append(seen[0]() is not None))
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        plan.capture(0, (), (), {}, original)
    assert seen[1:] == [alive]
    gc.collect()
    assert (seen[0]() is not None) == alive
    assert ("until ComfyUI ends" in block_graphs.obstacle(Model(), GPU)) == alive, "what is never freed is kept once"


def test_a_block_that_hands_on_new_tensors_has_them_copied_to_the_plan_s(plan):
    plan, _ = plan
    new = tuple(torch.randn_like(tensor) for tensor in plan.stream)
    plan.capture(0, (), (), {"run_vx": True}, lambda arguments: {"img": new} if arguments["transformer_options"] else 0)
    assert all(map(torch.equal, plan.stream, new))


def test_a_graph_of_weights_that_moved_is_destroyed_and_all_are_in_the_end(plan):
    plan, made = plan
    for weights in ((1,), (2,)):
        plan.capture(0, ("lora",), weights, {}, lambda arguments: arguments)
    plan.capture(0, (), (1,), {}, lambda arguments: arguments)
    assert [graph.log for graph in made] == [["thread_local", "end", "reset"]] + [["thread_local", "end"]] * 2
    plan.free()
    assert [graph.log[-1] for graph in made] == ["reset"] * 3
    assert not plan.graphs and not plan.inputs and not plan.stream and not plan.arguments


class Driver:
    def __init__(self, status=0):
        self.status, self.trimmed = status, []

    def cuDeviceGet(self, handle, ordinal):
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_int))[0] = ordinal + 40
        return 0

    def cuDeviceGraphMemTrim(self, handle):
        self.trimmed.append(handle.value)
        return self.status


def test_memory_goes_back_to_the_card_of_the_graphs_and_what_keeps_it_is_logged(monkeypatch, caplog):
    caplog.set_level("INFO")
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    driver = Driver()
    monkeypatch.setattr(graph_plan, "_driver", lambda: driver)
    graph_plan.give_back(GPU)
    assert emptied == [True] and driver.trimmed == [40] and caplog.text == ""
    monkeypatch.setattr(graph_plan, "_driver", lambda: Driver(201))
    graph_plan.give_back(GPU)
    assert "error 201 of cuDeviceGraphMemTrim" in caplog.text

    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(graph_plan, "_driver", missing)
    graph_plan.give_back(GPU)
    assert "cannot open shared object file" in caplog.text
