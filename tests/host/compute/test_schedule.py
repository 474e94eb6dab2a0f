# SPDX-License-Identifier: Apache-2.0
"""Steps that compute more exactly than the model was loaded to: which they are, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from nvfp4_video.host.compute import graph_key
from nvfp4_video.host.compute.schedule import FIRST, FIRST_AND_LAST, LAST, RANGES, mode_at, parse_ranges, use_schedule
from nvfp4_video.kernels.errors import PackError

SIGMAS = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]


class Layers(torch.nn.Module):
    """Four Linears as the loader leaves them: fp8, fp4, weight-only, and one that is not NVFP4."""

    def __init__(self) -> None:
        super().__init__()
        for name, mode in (("a", "fp8"), ("b", "fp4"), ("c", "bf16"), ("d", None)):
            layer = torch.nn.Linear(2, 2)
            layer.__dict__ |= {"quant_format": mode and "nvfp4", "nvfp4_mode": mode}
            layer._full_precision_mm = mode != "fp4"
            self.add_module(name, layer)

    def modes(self) -> str:
        return " ".join(str(layer.__dict__["nvfp4_mode"]) for layer in self.children())


def sampled(patcher: ModelPatcher, sigmas: list[float], error: bool = False) -> list[tuple[str, str | None]]:
    """The layers' modes and the option for graphs in each call of the model, one a sigma but the last."""
    seen, model = [], patcher.model
    options = {"sample_sigmas": torch.tensor(sigmas)}

    def original(x, t, transformer_options):
        seen.append((model.diffusion_model.modes(), transformer_options.get(graph_key.SCHEDULED)))
        if error:
            raise RuntimeError("out of memory")
        return x

    for sigma in sigmas[:-1]:
        wrappers = patcher.get_all_wrappers(WrappersMP.APPLY_MODEL)
        executor = WrapperExecutor.new_class_executor(original, model, wrappers)
        executor.execute(torch.zeros(1), torch.tensor([sigma]), transformer_options=options)
        assert graph_key.SCHEDULED not in options
    return seen


@pytest.fixture
def patcher(stub_comfy) -> ModelPatcher:
    model = torch.nn.Module()
    model.diffusion_model = Layers()
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


AS_LOADED = ("fp8 fp4 bf16 None", None)
EXACT = ("bf16 bf16 bf16 None", "bf16")


@pytest.mark.parametrize(("steps", "exact"), [(FIRST, {0}), (LAST, {7}), (FIRST_AND_LAST, {0, 7})])
def test_the_chosen_steps_compute_in_bf16_and_the_others_as_loaded(patcher, steps, exact):
    report = use_schedule(patcher, steps)
    assert report == f"bf16 in the {steps} step; otherwise as loaded: fp8 in 1 layer, fp4 in 1 layer, bf16 in 1 layer"
    assert sampled(patcher, SIGMAS) == [EXACT if step in exact else AS_LOADED for step in range(8)]
    assert patcher.model.diffusion_model.modes() == AS_LOADED[0]
    assert not patcher.model.diffusion_model.b._full_precision_mm


def test_ranges_never_make_a_layer_coarser_and_the_first_that_fits_counts(patcher):
    use_schedule(patcher, RANGES, "0.98-1=fp8\n 0-.5=bf16; 0.4-0.8=fp4")
    fp8 = ("fp8 fp8 bf16 None", "fp8")
    fp4 = (AS_LOADED[0], "fp4")
    assert sampled(patcher, SIGMAS) == [*[fp8] * 4, AS_LOADED, AS_LOADED, fp4, EXACT]


def test_int8_counts_as_more_exact_than_fp8(patcher):
    use_schedule(patcher, RANGES, "0.98-1=int8, 0-0.98=fp8")
    assert [modes for modes, _ in sampled(patcher, [1.0, 0.9, 0.0])] == ["int8 int8 bf16 None", "fp8 fp8 bf16 None"]
    patcher.model.diffusion_model.a.__dict__["nvfp4_mode"] = "int8"
    assert [modes for modes, _ in sampled(patcher, [0.9, 0.0])] == ["int8 fp8 bf16 None"]


def test_of_two_schedules_the_more_exact_counts(patcher):
    use_schedule(patcher, FIRST)
    use_schedule(patcher, RANGES, "0.9-1=fp8")
    assert sampled(patcher, SIGMAS) == [EXACT, *[("fp8 fp8 bf16 None", "fp8")] * 5, AS_LOADED, AS_LOADED]


def test_a_step_that_fails_leaves_the_layers_as_they_were(patcher):
    use_schedule(patcher, FIRST)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampled(patcher, SIGMAS, error=True)
    assert patcher.model.diffusion_model.modes() == AS_LOADED[0]


def test_a_sampler_that_steps_between_two_sigmas_is_at_no_end():
    assert mode_at(FIRST_AND_LAST, (), 0.997, SIGMAS) == mode_at(FIRST_AND_LAST, (), 0.2, SIGMAS) == ""
    assert mode_at(FIRST_AND_LAST, (), 0.42187, SIGMAS) == mode_at(LAST, (), 0.7, [0.7, 0.0]) == "bf16"
    assert mode_at(FIRST_AND_LAST, (), 1.0, []) == "", "a call outside a sampling computes as loaded"


def test_graphs_of_one_mode_are_not_replayed_for_another():
    call = {"img": [torch.zeros(1)], "transformer_options": {}}
    keys = {
        graph_key.of_call(call | {"transformer_options": {graph_key.SCHEDULED: mode}}, []) for mode in ("bf16", "fp8")
    }
    assert len(keys | {graph_key.of_call(call, [])}) == 3
    assert not graph_key.strange({graph_key.SCHEDULED: "bf16"})


def test_a_model_that_has_nothing_to_gain_is_left_alone(patcher):
    for layer in patcher.model.diffusion_model.children():
        layer.__dict__["nvfp4_mode"] = layer.__dict__["nvfp4_mode"] and "bf16"
    assert "load the model with compute int8, fp8" in use_schedule(patcher, FIRST)
    patcher.model.diffusion_model = torch.nn.Linear(2, 2)
    assert "no NVFP4 layer of the NVFP4 Model Loader" in use_schedule(patcher, FIRST)
    assert not patcher.get_all_wrappers(WrappersMP.APPLY_MODEL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found none"),
        ("0.9=bf16", "found '0.9=bf16'; expected FROM-TO=MODE"),
        ("0.9-1=bf16, nan-1=fp8", "found 'nan-1=fp8'"),
        ("1-0.9=bf16", "found 1-0.9; expected the smaller sigma first"),
        ("0-1=fp16", "unknown mode 'fp16' for 0-1; expected bf16, int8, fp8, fp4"),
        ("0-1e400=fp8", "found '0-1e400=fp8'"),
    ],
)
def test_ranges_that_cannot_be_read_are_one_clear_error(text, words):
    with pytest.raises(PackError, match="^ranges: ") as error:
        parse_ranges(text)
    assert words in str(error.value)


def test_an_unknown_preset_is_refused(patcher):
    with pytest.raises(PackError, match="steps: found 'middle'; expected first and last, first, last, by sigma"):
        use_schedule(patcher, "middle")
