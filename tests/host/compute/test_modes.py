# SPDX-License-Identifier: Apache-2.0
"""Compute modes on the stubbed host: which one runs where and why, which layers differ, and what they give."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import pytest
import torch
from nvfp4_video.checkpoint.file.header import read_header
from nvfp4_video.host.compute import linear, matmul
from nvfp4_video.host.compute import modes as compute
from nvfp4_video.host.compute.modes import Compute
from nvfp4_video.host.load.model import load_model
from nvfp4_video.kernels import fp8, int8, int8_reference, reference
from nvfp4_video.samples import synthetic

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NVFP4 = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
FULL = torch.tensor(list(b'{"format": "nvfp4", "full_precision_matrix_mult": true}'), dtype=torch.uint8)


@pytest.fixture
def fp8_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 is allowed on the CPU, where the torch backend computes it in FP32."""
    monkeypatch.setattr(fp8, "obstacle", lambda device: "")


@pytest.fixture(params=compute.EIGHT_BITS)
def mode(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each mode in 8 bits, allowed on the CPU likewise."""
    monkeypatch.setattr({"fp8": fp8, "int8": int8}[request.param], "obstacle", lambda device: "")
    return request.param


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend to a GPU of this capability and torch build."""

    def pretend(capability: tuple[int, int], cuda: str = "13.0", host: bool = True) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(comfy.model_management, "supports_nvfp4_compute", lambda device=None: host)
        monkeypatch.setattr(fp8, "obstacle", lambda device: "" if capability >= (8, 9) else "FP8 needs 8.9")
        monkeypatch.setattr(int8, "obstacle", lambda device: "" if capability >= (7, 5) else "INT8 needs 7.5")

    return pretend


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scaled-down LTX-2.3 with every block but the first and last two packed."""
    found = tmp_path_factory.mktemp("model") / "model.safetensors"
    state, config = synthetic.small_ltx23()
    synthetic.write(found, "comfy_markers", state, config, synthetic.quantize_layers(state, config))
    return found


def build(compute_plan: Compute, marker=NVFP4, rows: int = 48, cols: int = 64, name: str = "ff.proj"):
    """A model of one Linear of this name, its record."""
    record = reference.quantize(torch.randn(rows, cols))
    operations = linear.weight_only_operations(torch.bfloat16, CPU, compute=compute_plan)
    layer = operations.Linear(cols, rows)
    parts = name.split(".")
    model: torch.nn.Module = layer
    for part in reversed(parts):
        model = torch.nn.ModuleDict({part: model})
    state = {"weight": matmul.wrap(record), "comfy_quant": marker, "bias": torch.randn(rows).bfloat16()}
    model.load_state_dict({f"{name}.{key}": value for key, value in state.items()})
    return layer, record


def by_fp8(layer, record, x):
    return reference.linear_fp8(x, record, layer.bias)


def by_int8(layer, record, x):
    return int8_reference.linear_int8(x, record, layer.bias)


def by_bf16(layer, record, x):
    weight = reference.dequantize(record, x.dtype)
    return torch.nn.functional.linear(x, weight, layer.bias)


BY = {"bf16": by_bf16, "fp8": by_fp8, "int8": by_int8}


@pytest.mark.parametrize("lead", [(300,), (2, 150), (256,)], ids=str)
def test_a_layer_in_8_bits_multiplies_rounded_operands(lead, mode):
    layer, record = build(Compute(mode))
    x = torch.randn(*lead, 64).bfloat16()
    assert torch.equal(layer(x), BY[mode](layer, record, x))
    assert not torch.equal(layer(x), by_bf16(layer, record, x))


def test_a_layer_that_has_run_computes_in_the_mode_it_is_given_next(fp8_runs):
    layer, record = build(Compute("fp8"))
    x = torch.randn(300, 64).bfloat16()
    for mode in ("fp8", "bf16", "int8", "fp8"):
        linear.choose_mode(layer, mode)
        assert torch.equal(layer(x), BY[mode](layer, record, x)), mode


def test_few_tokens_and_other_layers_stay_weight_only(fp8_runs):
    x = torch.randn(300, 64).bfloat16()
    layer, record = build(Compute("fp8"))
    assert torch.equal(layer(x[:126]), by_bf16(layer, record, x[:126]))
    layer, record = build(Compute("fp8", others={"ff.proj": "bf16"}))
    assert torch.equal(layer(x), by_bf16(layer, record, x))
    layer, record = build(Compute("fp8", others={"ff.other": "bf16"}))
    assert torch.equal(layer(x), by_fp8(layer, record, x))


def test_a_layer_whose_file_asks_for_full_precision_stays_weight_only(fp8_runs):
    layer, record = build(Compute("fp8"), marker=FULL)
    x = torch.randn(300, 64).bfloat16()
    assert torch.equal(layer(x), by_bf16(layer, record, x))


def test_a_weight_function_takes_a_layer_of_any_mode_to_the_host_which_is_weight_only(fp8_runs):
    layer, record = build(Compute("fp8"))
    layer.weight_function = [lambda weight: weight]
    x = torch.randn(300, 64).bfloat16()
    right = by_bf16(layer, record, x).float()
    assert (layer(x) - right).norm() < 0.01 * right.norm(), "FP8 would be at 0.03"
    assert layer._full_precision_mm


def test_fp4_layers_are_the_host_s_work_and_the_others_are_not(monkeypatch):
    layer, _ = build(Compute("fp4"))
    other, record = build(Compute("fp4", others={"ff.proj": "bf16"}))
    calls = []
    for one in (layer, other):
        monkeypatch.setattr(type(one).__bases__[0], "forward", lambda self, x: calls.append(self))
    x = torch.randn(300, 64).bfloat16()
    layer(x)
    assert calls == [layer]
    assert torch.equal(other(x), by_bf16(other, record, x))
    assert calls == [layer]
    assert other._full_precision_mm, "the host's forward would quantize its activations"


def test_the_format_is_left_on_only_where_a_layer_computes_in_fp4(gpu):
    gpu((12, 0))
    operations = linear.weight_only_operations(torch.bfloat16, CPU, compute=Compute("fp4"))
    assert "nvfp4" not in operations._disabled
    operations = linear.weight_only_operations(torch.bfloat16, CPU, compute=Compute("bf16", others={"a": "fp4"}))
    assert "nvfp4" not in operations._disabled
    assert "nvfp4" in linear.weight_only_operations(torch.bfloat16, CPU, compute=Compute("fp8"))._disabled


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rows", [3, 300])
def test_torch_compile_takes_layers_in_8_bits_in_one_graph(rows, mode):
    layer, record = build(Compute(mode))
    x = torch.randn(rows, 64).bfloat16()
    right = BY[mode if rows == 300 else "bf16"](layer, record, x)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), right)


@pytest.mark.parametrize(
    ("capability", "cuda", "host", "mode", "reasons"),
    [
        ((8, 6), "13.0", True, "bf16", ["no fp4: FP4 needs compute capability 10.0, NVIDIA X has 8.6", "no fp8: FP8"]),
        ((9, 0), "13.0", True, "fp8", ["no fp4: FP4 needs compute capability 10.0", "the fastest that runs on cuda"]),
        ((12, 1), "12.8", True, "fp8", ["no fp4: ComfyUI's FP4 kernels need a torch built for CUDA 13"]),
        ((12, 1), "13.0", False, "fp8", ["no fp4: this ComfyUI has no FP4 arithmetic"]),
        ((12, 1), "13.0", True, "fp4", ["the fastest that runs on cuda"]),
    ],
)
def test_auto_takes_the_fastest_and_says_why_not_another(capability, cuda, host, mode, reasons, gpu):
    gpu(capability, cuda, host)
    picked, reason = compute.pick_mode("auto", CUDA)
    assert picked == mode
    assert all(part in reason for part in reasons) and "int8" not in reason


def test_a_mode_asked_for_that_cannot_run_is_an_error_that_says_why(gpu):
    assert compute.pick_mode("bf16", CPU) == ("bf16", "asked for")
    assert compute.pick_mode("auto", CPU)[0] == "bf16"
    with pytest.raises(ValueError, match="compute fp8 cannot run: .*the model is on cpu; choose bf16 or auto"):
        compute.pick_mode("fp8", CPU)
    with pytest.raises(ValueError, match="compute fp4 cannot run: .*the model is on cpu"):
        compute.pick_mode("fp4", CPU)
    gpu((9, 0))
    with pytest.raises(ValueError, match="FP4 needs compute capability 10.0, NVIDIA X has 9.0"):
        compute.pick_mode("fp4", CUDA)
    with pytest.raises(ValueError, match="unknown compute mode 'int4'; expected bf16, int8, fp8, fp4 or auto"):
        compute.pick_mode("int4", CUDA)


def test_int8_says_where_it_was_not_run(gpu, monkeypatch):
    gpu((8, 6))
    assert compute.pick_mode("int8", CUDA) == ("int8", "asked for; not run on NVIDIA X by this pack, only on an H200")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    assert compute.pick_mode("int8", CUDA) == ("int8", "asked for")
    gpu((7, 0))
    with pytest.raises(ValueError, match="compute int8 cannot run: INT8 needs 7.5; choose bf16 or auto"):
        compute.pick_mode("int8", CUDA)


@pytest.mark.parametrize(
    ("part", "layer", "expected"),
    [
        ("to_out", "transformer_blocks.2.attn1.to_out.0", True),
        ("to_out", "transformer_blocks.2.attn1.to_outer", False),
        ("blocks.0", "transformer_blocks.0.ff.net.2", True),
        ("blocks.0", "blocks.0.ff", True),
        ("blocks.0", "transformer_blocks.01.ff", False),
        ("blocks.1", "transformer_blocks.11.ff", False),
        ("attn1", "transformer_blocks.2.audio_attn1.to_q", True),
        ("2.attn1", "transformer_blocks.2.audio_attn1.to_q", False),
        ("ff.net.0.proj", "transformer_blocks.2.ff.net.0.proj", True),
        ("blocks.2*to_q", "transformer_blocks.2.attn1.to_q", True),
        ("audio_*", "transformer_blocks.2.audio_attn1.to_q", True),
        ("a.b", "axb.c", False),
    ],
)
def test_a_part_matches_whole_components(part, layer, expected):
    assert compute.matches(part, layer) is expected


def test_overrides_are_read_and_faults_are_named(gpu):
    gpu((9, 0))
    text = " to_out = bf16,blocks.0=fp8;\nff=bf16, "
    assert compute.parse_overrides(text, CUDA) == {"to_out": "bf16", "blocks.0": "fp8", "ff": "bf16"}
    assert compute.parse_overrides("  ", CUDA) == {}
    for wrong in ("to_out", "=bf16", "to_out bf16"):
        with pytest.raises(ValueError, match="expected PART=MODE, such as to_out=bf16"):
            compute.parse_overrides(wrong, CUDA)
    with pytest.raises(ValueError, match="unknown mode 'fp16' for 'ff'; expected bf16, int8, fp8, fp4; did you mean"):
        compute.parse_overrides("ff=fp16", CUDA)
    with pytest.raises(ValueError, match="layer_compute: ff=fp4 cannot run: FP4 needs compute capability 10.0"):
        compute.parse_overrides("ff=fp4", CUDA)


def test_sensitive_layers_of_ltx_stay_weight_only_and_the_user_has_the_last_word(path: Path, fp8_runs):
    names = [
        f"transformer_blocks.{b}.{n}" for b in range(6) for n in ("attn1.to_q", "attn1.to_gate_logits", "ff.net.2")
    ]
    packed = [name for name in names if name.split(".")[1] not in "05"]
    plan = compute.plan_layers(("fp8", "asked for"), {}, read_header(path), packed, names)
    assert {layer for layer in packed if plan.of(layer) == "bf16"} == {
        layer for layer in packed if "gate" in layer or layer.split(".")[1] in "14"
    }
    overrides = {"gate_logits": "fp8", "blocks.1": "fp8", "2.ff": "bf16"}
    plan = compute.plan_layers(("fp8", "asked for"), overrides, read_header(path), packed, names)
    assert plan.of("transformer_blocks.1.attn1.to_q") == "fp8"
    assert plan.of("transformer_blocks.2.attn1.to_gate_logits") == "fp8"
    assert plan.of("transformer_blocks.2.ff.net.2") == "bf16"
    assert plan.of("transformer_blocks.4.attn1.to_q") == "bf16"
    with pytest.raises(ValueError, match="'to_oot' is in no name of the 12 NVFP4 layers; did you mean to_q"):
        compute.plan_layers(("fp8", "asked for"), {"to_oot": "bf16"}, read_header(path), packed, names)


def test_in_bf16_mode_nothing_is_special(path: Path):
    _, report = load_model(str(path))
    assert set(report.modes) == {"bf16"}
    assert "compute: bf16, weights decoded by" in str(report)


def test_the_report_counts_the_layers_of_each_mode(path: Path, fp8_runs):
    patcher, report = load_model(str(path), compute="fp8", layer_compute="to_k=bf16")
    modules = [m for m in patcher.model.diffusion_model.modules() if m.__dict__.get("nvfp4_mode")]
    assert sum(report.modes.values()) == len(modules)
    assert report.modes == {m: sum(x.nvfp4_mode == m for x in modules) for m in report.modes}
    line = str(report).splitlines()[3]
    assert line.startswith("compute: fp8: ")
    assert f"fp8 in {report.modes['fp8']:,} layers" in line
    assert patcher.model.diffusion_model.get_submodule("transformer_blocks.2.attn1.to_k").nvfp4_mode == "bf16"
    reload, arguments = patcher.cached_patcher_init
    again = reload(*arguments, disable_dynamic=True)
    assert again.model.diffusion_model.get_submodule("transformer_blocks.2.attn1.to_k").nvfp4_mode == "bf16"


def test_an_override_for_a_layer_that_is_not_there_stops_the_load(path: Path):
    with pytest.raises(ValueError, match="layer_compute: 'to_ouy' is in no name .*did you mean"):
        load_model(str(path), layer_compute="to_ouy=bf16")
