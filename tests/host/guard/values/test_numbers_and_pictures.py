# SPDX-License-Identifier: Apache-2.0
"""Each line of the tables gives what its node gives, and nothing where an input is missing or unknown."""

from __future__ import annotations

import pytest
from nvfp4_video.host.guard.links import Link
from nvfp4_video.host.guard.prompt_graph import ROWS, PromptGraph
from nvfp4_video.host.guard.values.evaluate import Choice, Row
from nvfp4_video.host.guard.values.numbers import CHOICES
from nvfp4_video.host.guard.values.pictures import Film, Picture
from nvfp4_video.tests.support.guard_prompts import node


def outputs(entry: dict, **others: dict) -> tuple:
    """The first outputs of a node, up to the last one that is known."""
    graph = PromptGraph({"it": entry, **others})
    found = [graph.output(Link("it", slot)) for slot in range(9)]
    while found and found[-1] is None:
        found.pop()
    return tuple(found)


IMAGE = {"p": node("EmptyImage", width=720, height=1280, batch_size=3, color=0)}
UNSEEN = {"p": node("SomebodysPicture")}
P = ["p", 0]


def resized(kind: str, **options: object) -> dict:
    return node("ResizeImageMaskNode", input=P, resize_type=kind, scale_method="area",
                **{f"resize_type.{name}": value for name, value in options.items()})  # fmt: skip


def kj(**inputs: object) -> dict:
    return node("ImageResizeKJv2", **{"image": P, "width": 512, "height": 512, "upscale_method": "lanczos",
                                      "keep_proportion": "stretch", "divisible_by": 2} | inputs)  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (node("PrimitiveInt", value=5), (5,)),
        (node("PrimitiveBoolean", value=False), (False,)),
        (node("INTConstant", value=480), (480,)),
        (node("Float", Number="2.5"), (2.5,)),
        (node("Int", Number="7"), (7,)),
        (node("easy float", value=23.97602), (23.976,)),
        (node("easy mathInt", a=7, b=2, operation="divide"), (3,)),
        (node("easy mathFloat", a=7, b=3, operation="divide"), (2.333,)),
        (node("mxSlider", Xi=5, Xf=7.5, isfloatX=0), (5,)),
        (node("mxSlider", Xi=5, Xf=7.5, isfloatX=1), (7.5,)),
        (node("mxSlider2D", Xi=5, Xf=7.5, Yi=1, Yf=2.5, isfloatX=0, isfloatY=1), (5, 2.5)),
        (node("JWFloatToInteger", value=2.5, mode="ceiling"), (3,)),
        (node("LTXFloatToInt", a=24.6), (25,)),
        (node("CM_FloatToInt", a=24.6), (24,)),
        (node("ComfyNumberConvert", value="12"), (12.0, 12)),
        (node("ComfyNotNode", value=0), (True,)),
        (node("ComfyAndNode", **{"values.value0": True, "values.value1": 0}), (False,)),
        (node("ComfyAndNode", **{"values.value0": True, "values.value1": 2}), (True,)),
        (node("ComfyOrNode", **{"values.value0": False, "values.value1": True}), (True,)),
        (node("ComfyOrNode", **{"values.value0": False}), (False,)),
        (node("CustomCombo", choice="large", index=2), ("large", 2)),
        (node("StringConcatenate", string_a="1.0", string_b="0.0", delimiter=", "), ("1.0, 0.0",)),
        (node("StringCompare", string_a="Large", string_b="large", mode="Equal", case_sensitive=False), (True,)),
        (node("StringCompare", string_a="Large", string_b="large", mode="Equal", case_sensitive=True), (False,)),
        (node("StringCompare", string_a="Large", string_b="La", mode="Starts With", case_sensitive=True), (True,)),
        (node("ImpactCompare", cmp="a > b", a=3, b=2), (True,)),
        (node("ImpactIfNone"), (None, False)),
        (node("ResolutionMaster", width=720, height=1280, auto_detect=False), (720, 1280)),
        (node("ResolutionSelector", aspect_ratio="16:9 (Widescreen)", megapixels=1.0, multiple=32), (1376, 768)),
        (node("ComfyMathExpression", expression="a/2", **{"values.a": 721}), (360.5, 360, True)),
        (node("MathExpression|pysssss", expression="a*b\n+1", a=5, b=24), (121, 121.0)),
        (node("SimpleMath+", value="a*32", a=1.0), (32, 32.0)),
        (node("SimpleCalculatorKJ", expression="a * 24 + 1", **{"variables.a": 5}), (121.0, 121, True)),
        (node("easy simpleMath", value="(a*b)+1", a=15, b=24), (361, 361.0, True)),
    ],
    ids=lambda value: value["class_type"] if isinstance(value, dict) else "",
)
def test_a_number_is_what_its_node_makes(entry: dict, found: tuple):
    assert outputs(entry) == found


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        (node("EmptyImage", width=64, height=32, batch_size=1), (64, 32, 1)),
        (node("ImageScale", image=P, width=0, height=640), (360, 640, 3)),
        (node("ImageScale", image=P, width=0, height=0), (720, 1280, 3)),
        (node("ImageScaleBy", image=P, scale_by=0.5), (360, 640, 3)),
        (node("ImageScaleToTotalPixels", image=P, megapixels=0.25, resolution_steps=1), (384, 683, 3)),
        (node("ImageScaleToMaxDimension", image=P, largest_size=640), (360, 640, 3)),
        (node("ResizeAndPadImage", image=P, target_width=512, target_height=512), (512, 512, 3)),
        (node("ImageCrop", image=P, width=512, height=512, x=600, y=0), (120, 512, 3)),
        (node("ImageFromBatch", image=P, batch_index=-1, length=4), (720, 1280, 1)),
        (node("RepeatImageBatch", image=P, amount=5), (720, 1280, 15)),
        (node("ImageRotate", image=P, rotation="90 degrees"), (1280, 720, 3)),
        (node("ResizeImagesByLongerEdge", images=P, longer_edge=1535), (863, 1535, 3)),
        (node("ResizeImagesByShorterEdge", images=P, shorter_edge=544), (544, 967, 3)),
        (node("LTXVPreprocess", image=P, img_compression=18), (720, 1280, 3)),
        (node("CannyEdgePreprocessor", image=P, resolution=512), (512, 910, 3)),
        (node("ImagePadForOutpaintTargetSize", image=P, target_width=1024, target_height=640), (1024, 640, 3)),
        (resized("scale dimensions", width=704, height=0), (704, 1252, 3)),
        (resized("scale width", width=352), (352, 626, 3)),
        (resized("scale by multiplier", multiplier=0.5), (360, 640, 3)),
        (resized("scale longer dimension", longer_size=1536), (864, 1536, 3)),
        (resized("scale shorter dimension", shorter_size=544), (544, 967, 3)),
        (resized("scale total pixels", megapixels=0.5), (543, 965, 3)),
        (resized("scale to multiple", multiple=64), (704, 1280, 3)),
        (resized("match size", match=P), (720, 1280, 3)),
        (kj(), (512, 512, 3)),
        (kj(keep_proportion="resize", divisible_by=32), (288, 512, 3)),
        (kj(width=0, keep_proportion="crop"), (720, 512, 3)),
        (kj(keep_proportion="total_pixels", divisible_by=1), (384, 682, 3)),
    ],
    ids=lambda value: str(value["inputs"].get("resize_type", value["class_type"])) if isinstance(value, dict) else "",
)
def test_a_picture_is_as_large_as_its_node_makes_it(entry: dict, size: tuple):
    assert outputs(entry, **IMAGE)[0] == Picture(*size)


def test_sides_that_a_node_decides_are_known_whatever_the_picture_was():
    assert outputs(resized("scale dimensions", width=1280, height=720), **UNSEEN) == (Picture(1280, 720, None),)
    assert outputs(kj(), **UNSEEN)[:3] == (Picture(512, 512, None), 512, 512)
    assert outputs(node("GetImageSize", image=["q", 0]), q=resized("scale width", width=1280), **UNSEEN) == ()
    assert outputs(node("GetImageSize", image=P), **IMAGE) == (720, 1280, 3)


def test_texts_that_double_from_node_to_node_are_unknown_before_they_fill_the_memory():
    chain = {str(i): node("StringConcatenate", string_a=[str(i - 1), 0], string_b=[str(i - 1), 0], delimiter="")
             for i in range(1, 60)}  # fmt: skip
    assert outputs(node("StringLength", string=["59", 0]), **chain | {"0": node("PrimitiveString", value="ab")}) == ()
    assert outputs(chain["1"], **{"0": node("PrimitiveString", value="ab")}) == ("abab",)


@pytest.mark.parametrize("kind", ["pad", "pad_edge", "pillarbox_blur"])
def test_what_the_table_does_not_know_of_a_node_is_unknown(kind: str):
    assert outputs(kj(keep_proportion=kind), **IMAGE) == ()
    assert outputs(node("ResolutionSelector", aspect_ratio="5:4 (Odd)", megapixels=1.0, multiple=8)) == ()
    assert outputs(node("JWFloatToInteger", value=2.5, mode="banker")) == ()


def test_a_node_that_misses_an_input_or_has_an_unknown_one_gives_nothing():
    for kind in ROWS:
        if kind != "ImpactIfNone":  # which asks just that
            assert all(found is None or isinstance(found, tuple) for found in outputs(node(kind))), kind
    assert outputs(node("ComfyMathExpression", expression="a", **{"values.a": ["x", 0]}), x=node("Unheard")) == ()
    assert outputs(node("PrimitiveInt", value=["gone", 0])) == ()
    assert outputs(node("JWIntegerDiv", a=1, b=0)) == ()


def test_a_film_s_parts_are_its_pictures_and_its_rate():
    graph = PromptGraph(
        IMAGE | {"v": node("CreateVideo", images=P, fps=24), "c": node("GetVideoComponents", video=["v", 0])}
    )
    assert graph.output(Link("v", 0)) == Film(Picture(720, 1280, 3), 24.0)
    assert graph.output(Link("c", 2)) == 24.0


def test_every_line_names_where_its_formula_is_from():
    for row in (*ROWS.values(), *CHOICES.values()):
        assert isinstance(row, (Row, Choice))
        assert len(row.source) > 3


def switched(entry: dict) -> object:
    return outputs(entry, one=node("PrimitiveInt", value=1), two=node("PrimitiveInt", value=2))


ONE, TWO = ["one", 0], ["two", 0]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (node("ComfySwitchNode", switch=True, on_true=ONE, on_false=TWO), 1),
        (node("ComfySoftSwitchNode", switch=True, on_false=TWO), 2),
        (node("LazySwitchKJ", switch=["one", 0], on_true=ONE, on_false=TWO), 1),
        (node("easy ifElse", boolean=False, on_true=ONE, on_false=TWO), 2),
        (node("easy anythingIndexSwitch", index=1, value0=ONE, value1=TWO), 2),
        (node("ImpactSwitch", select=2, input1=ONE, input2=TWO), 2),
        (node("ImpactConditionalBranch", cond=True, tt_value=ONE, ff_value=TWO), 1),
        (node("Any Switch (rgthree)", any_02=TWO), 2),
        (node("easy cleanGpuUsed", anything=ONE), 1),
    ],
    ids=lambda value: value["class_type"] if isinstance(value, dict) else "",
)
def test_a_switch_with_a_constant_condition_is_what_it_chooses(entry: dict, found: int):
    assert switched(entry) == (found,)


def test_a_switch_with_an_unknown_condition_is_unknown():
    for value in (["gone", 0], None, "yes"):
        assert switched(node("ComfySwitchNode", switch=value, on_true=ONE, on_false=TWO)) == ()
    assert switched(node("easy anythingIndexSwitch", index=5, value0=ONE)) == ()


def test_what_is_set_under_a_name_is_got_under_it():
    prompt = {
        "w": node("PrimitiveInt", value=720),
        "s": node("SetNode", Constant="width", INT=["w", 0]),
        "g": node("GetNode", Constant="width"),
        "other": node("GetNode", Constant="height"),
        "v": node("EmptyLTXVLatentVideo", width=["g", 0], height=["other", 0]),
    }
    graph = PromptGraph(prompt)
    assert graph.value("v", "width") == 720 and graph.value("v", "height") is None
    assert graph.source("v", "width") == Link("w", 0)


def test_pipes_and_contexts_hand_on_what_they_were_given():
    prompt = {
        "m": node("UNETLoader"), "l": node("LoraLoaderModelOnly", model=["m", 0]), "w": node("PrimitiveInt", value=3),
        "pipe": node("ToBasicPipe", model=["m", 0]),
        "edit": node("EditBasicPipe", basic_pipe=["pipe", 0], model=["l", 0]),
        "out": node("FromBasicPipe_v2", basic_pipe=["edit", 0]),
        "empty": node("Context (rgthree)"), "first": node("Context (rgthree)", model=["m", 0], seed=["w", 0]),
        "second": node("Context (rgthree)", base_ctx=["first", 0], model=["l", 0]),
        "switch": node("Context Switch (rgthree)", ctx_01=["empty", 0], ctx_02=["second", 0], ctx_03=["first", 0]),
        "in": node("easy pipeIn", model=["m", 0]), "easy": node("easy pipeOut", pipe=["in", 0]),
        "s": node("KSampler", a=["out", 1], b=["switch", 1], c=["easy", 1], seed=["switch", 8]),
    }  # fmt: skip
    graph = PromptGraph(prompt)
    assert [graph.source("s", name).node for name in "abc"] == ["l", "l", "m"]
    assert graph.value("s", "seed") == 3
