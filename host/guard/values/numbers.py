# SPDX-License-Identifier: Apache-2.0
"""Nodes that put out numbers and texts, and nodes that hand on one of their inputs: a line a node.

``NUMBERS`` and ``CHOICES`` name the code that each line follows: a file of ComfyUI, or of the pack that has the node.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from string import ascii_lowercase
from typing import Any

from ..links import Link, as_link
from . import expressions
from .evaluate import Bundle, Choice, Given, Row, Unknown, as_number, stored_name
from .pictures import Picture

_PRIMITIVES, _LOGIC = "comfy_extras/nodes_primitive.py", "comfy_extras/nodes_logic.py"
_STRINGS = "comfy_extras/nodes_string.py"
_EASY, _KJ, _IMPACT = "ComfyUI-Easy-Use py/nodes/logic.py", "ComfyUI-KJNodes nodes/nodes.py", "ComfyUI-Impact-Pack"
_ESSENTIALS, _MX, _JW = "ComfyUI_essentials misc.py", "ComfyUI-mxToolkit mxtoolkit.py", "comfyui-various"
_COMFYMATH, _RGTHREE = "ComfyMath src/comfymath", "rgthree-comfy py"
_LITERALS = "ComfyLiterals nodes.py"
_MOST_NAMES = 32  # inputs of one kind that are looked at
_LONGEST_TEXT = 2000

_OPERATIONS = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "modulo": operator.mod,
}  # fmt: skip
_COMPARISONS = {
    "a = b": operator.eq, "a <> b": operator.ne, "a > b": operator.gt, "a < b": operator.lt, "a >= b": operator.ge,
    "a <= b": operator.le,
}  # fmt: skip
_TEXT_COMPARISONS = {"Equal": operator.eq, "Starts With": str.startswith, "Ends With": str.endswith}
_SIDES = ("on_true", "on_false")
_ROUNDINGS = {"round": round, "floor": math.floor, "ceiling": math.ceil}
# ResolutionSelector, comfy_extras/nodes_resolution.py: the choice begins with the ratio.
_RATIOS = ("1:1", "2:3", "3:2", "3:4", "4:3", "9:16", "16:9", "21:9")


def _same(name: str) -> Callable[[Given], Iterable[Any]]:
    """A node that puts out one of its values as it is."""
    return lambda given: (given.value(name),)


def _of(function: Callable[..., Any], *names: str) -> Callable[[Given], Iterable[Any]]:
    """A node that puts out a function of numbers."""
    return lambda given: (function(*map(given.number, names)),)


def _core_expression(given: Given) -> Iterable[Any]:
    names = {name: given.value(f"values.{name}") for name in ascii_lowercase if given.has(f"values.{name}")}
    names["values"] = list(names.values())
    result = expressions.evaluate(given.a(str, "expression"), names, expressions.CORE)
    return float(result), int(result), bool(result)


def _kj_expression(given: Given) -> Iterable[Any]:
    names = {}
    for name in "abcdefghijk":
        for key in (f"variables.{name}", name):
            if given.has(key):
                names[name] = given.value(key)
    result = expressions.evaluate(given.a(str, "expression"), names, expressions.KJ)
    return float(result), int(result), bool(result)


def _pysssss_expression(given: Given) -> Iterable[Any]:
    text = given.a(str, "expression").replace("\n", " ").replace("\r", "")
    names = {name: given.value(name) for name in "abc" if given.has(name)}
    result = expressions.evaluate(text, names, expressions.PYSSSSS)
    return int(result), float(result)


def _essentials_expression(given: Given) -> Iterable[Any]:
    names = {name: given.number(name) if given.has(name) else 0.0 for name in "abcd"}
    result = expressions.evaluate(given.a(str, "value"), names, expressions.ESSENTIALS)
    return round(result), result


def _easy_expression(given: Given) -> Iterable[Any]:
    names = {name: float(given.number(name)) if given.has(name) else 0.0 for name in "abc"} | {"d": 0.0}
    result = float(expressions.evaluate(given.a(str, "value"), names, expressions.EASY))
    return int(result), result, int(result) != 0


def _easy_int(given: Given) -> Iterable[Any]:
    a, b, name = given.integer("a"), given.integer("b"), given.value("operation")
    return ((a // b) if name == "divide" else _OPERATIONS[name](a, b),)


def _easy_float(given: Given) -> Iterable[Any]:
    return (round(_OPERATIONS[given.value("operation")](float(given.number("a")), float(given.number("b"))), 3),)


def _converted(given: Given) -> Iterable[Any]:
    value = given.value("value")
    number = float(value) if isinstance(value, bool) else as_number(value)
    if number is None:
        raise Unknown
    return float(number), int(number)


def _resolution(given: Given) -> Iterable[Any]:
    ratio, multiple = given.a(str, "aspect_ratio").partition(" ")[0], given.integer("multiple")
    if ratio not in _RATIOS:
        raise Unknown
    wide, high = map(int, ratio.split(":"))
    scale = math.sqrt(given.number("megapixels") * 1024 * 1024 / (wide * high))
    return round(wide * scale / multiple) * multiple, round(high * scale / multiple) * multiple


def _resolution_master(given: Given) -> Iterable[Any]:
    """What its widgets say, unless it goes by a picture."""
    if given.flag("auto_detect"):
        raise Unknown
    return given.integer("width"), given.integer("height")


def _slider(given: Given) -> Iterable[Any]:
    return (given.number("Xf" if given.number("isfloatX") > 0 else "Xi"),)


def _slider_2d(given: Given) -> Iterable[Any]:
    return tuple(given.number(f"{axis}{'f' if given.number(f'isfloat{axis}') > 0 else 'i'}") for axis in "XY")


def _compared(given: Given) -> Iterable[Any]:
    how = given.value("cmp")
    return (how == "tt",) if how in ("tt", "ff") else (_COMPARISONS[how](given.value("a"), given.value("b")),)


def _truths(of: Callable[[Iterable[bool]], bool]) -> Callable[[Given], Iterable[Any]]:
    """And, Or: of however many values."""

    def outputs(given: Given) -> Iterable[Any]:
        names = [name for name in given.node.inputs if name.startswith("values.")]
        if not 0 < len(names) <= _MOST_NAMES:
            raise Unknown
        return (of([given.flag(name) for name in names]),)

    return outputs


def _chosen_text(given: Given) -> Iterable[Any]:
    """Custom Combo: the text, and its place in the list, which the front end sends."""
    return given.a(str, "choice"), given.integer("index") if given.has("index") else 0


def _joined_text(given: Given) -> Iterable[Any]:
    text = given.a(str, "delimiter").join(given.a(str, name) for name in ("string_a", "string_b"))
    if len(text) > _LONGEST_TEXT:  # a chain of these doubles it with each node
        raise Unknown
    return (text,)


def _compared_text(given: Given) -> Iterable[Any]:
    a, b = (given.a(str, name) for name in ("string_a", "string_b"))
    if not given.flag("case_sensitive"):
        a, b = a.lower(), b.lower()
    return (_TEXT_COMPARISONS[given.value("mode")](a, b),)


def _size(given: Given) -> Iterable[Any]:
    return given.a(Picture, "image")


def _size_and_picture(given: Given) -> Iterable[Any]:
    picture = given.a(Picture, "image")
    return picture, *picture


NUMBERS = {
    "PrimitiveInt": Row(_same("value"), _PRIMITIVES),
    "PrimitiveFloat": Row(_same("value"), _PRIMITIVES),
    "PrimitiveString": Row(_same("value"), _PRIMITIVES),
    "PrimitiveStringMultiline": Row(_same("value"), _PRIMITIVES),
    "PrimitiveBoolean": Row(_same("value"), _PRIMITIVES),
    "PrimitiveNode": Row(_same("value"), "the front end, which puts the value in its place"),
    "ComfyMathExpression": Row(_core_expression, "comfy_extras/nodes_math.py"),
    "ComfyNumberConvert": Row(_converted, "comfy_extras/nodes_number_convert.py"),
    "ComfyNotNode": Row(lambda given: (not given.value("value"),), _LOGIC),
    "ComfyAndNode": Row(_truths(all), _LOGIC),
    "ComfyOrNode": Row(_truths(any), _LOGIC),
    "CustomCombo": Row(_chosen_text, _LOGIC),
    "StringConcatenate": Row(_joined_text, _STRINGS),
    "StringCompare": Row(_compared_text, _STRINGS),
    "ResolutionSelector": Row(_resolution, "comfy_extras/nodes_resolution.py"),
    "GetImageSize": Row(_size, "comfy_extras/nodes_images.py"),
    "LTXFloatToInt": Row(_of(round, "a"), "ComfyUI-LTXVideo utiltily_nodes.py"),
    "INTConstant": Row(_same("value"), _KJ),
    "FloatConstant": Row(_same("value"), _KJ),
    "StringConstant": Row(_same("string"), _KJ),
    "BOOLConstant": Row(_same("value"), _KJ),
    "SimpleCalculatorKJ": Row(_kj_expression, _KJ),
    "GetImageSizeAndCount": Row(_size_and_picture, "ComfyUI-KJNodes nodes/image_nodes.py"),
    "MathExpression|pysssss": Row(_pysssss_expression, "ComfyUI-Custom-Scripts py/math_expression.py"),
    "SimpleMath+": Row(_essentials_expression, _ESSENTIALS),
    "SimpleMathInt+": Row(_of(int, "value"), _ESSENTIALS),
    "SimpleMathFloat+": Row(_of(float, "value"), _ESSENTIALS),
    "easy int": Row(_same("value"), _EASY),
    "easy float": Row(lambda given: (round(given.number("value"), 3),), _EASY),
    "easy string": Row(_same("value"), _EASY),
    "easy boolean": Row(_same("value"), _EASY),
    "easy mathInt": Row(_easy_int, _EASY),
    "easy mathFloat": Row(_easy_float, _EASY),
    "easy simpleMath": Row(_easy_expression, "ComfyUI-Easy-Use py/libs/math.py"),
    "easy imageSize": Row(lambda given: given.a(Picture, "image")[:2], "ComfyUI-Easy-Use py/nodes/image.py"),
    "Int": Row(_of(int, "Number"), _LITERALS),
    "Float": Row(_of(float, "Number"), _LITERALS),
    "LTXICLoRALoaderModelOnly": Row(
        lambda given: (None, given.file("downscale", "lora_name")), "ComfyUI-LTXVideo iclora.py"
    ),
    "ResolutionMaster": Row(_resolution_master, "Comfyui-Resolution-Master aztoolkit.py"),
    "ImpactInt": Row(_same("value"), _IMPACT),
    "ImpactFloat": Row(_same("value"), _IMPACT),
    "ImpactBoolean": Row(_same("value"), _IMPACT),
    "ImpactCompare": Row(_compared, _IMPACT),
    "ImpactIfNone": Row(lambda given: (given.maybe("signal"), None if given.has("any_input") else False), _IMPACT),
    "ImpactExecutionOrderController": Row(lambda given: (given.maybe("signal"), given.maybe("value")), _IMPACT),
    "mxSlider": Row(_slider, _MX),
    "mxSlider2D": Row(_slider_2d, _MX),
    "JWInteger": Row(_same("value"), _JW),
    "JWFloat": Row(_same("value"), _JW),
    "JWIntegerToFloat": Row(_of(float, "value"), _JW),
    "JWFloatToInteger": Row(lambda given: (_ROUNDINGS[given.value("mode")](given.number("value")),), _JW),
    "JWIntegerAdd": Row(_of(operator.add, "a", "b"), _JW),
    "JWIntegerSub": Row(_of(operator.sub, "a", "b"), _JW),
    "JWIntegerMul": Row(_of(operator.mul, "a", "b"), _JW),
    "JWIntegerDiv": Row(_of(operator.truediv, "a", "b"), _JW),
    "JWIntegerMin": Row(_of(min, "a", "b"), _JW),
    "JWIntegerMax": Row(_of(max, "a", "b"), _JW),
    "CM_IntToFloat": Row(_of(float, "a"), _COMFYMATH),
    "CM_FloatToInt": Row(_of(int, "a"), _COMFYMATH),
    "CM_IntToNumber": Row(_of(int, "a"), _COMFYMATH),
    "CM_FloatToNumber": Row(_of(float, "a"), _COMFYMATH),
    "CM_NumberToInt": Row(_of(int, "a"), _COMFYMATH),
    "CM_NumberToFloat": Row(_of(float, "a"), _COMFYMATH),
    "Number to Int": Row(_of(int, "number"), "was-node-suite-comfyui WAS_Node_Suite.py"),
    "Number to Float": Row(_of(float, "number"), "was-node-suite-comfyui WAS_Node_Suite.py"),
}


def _only_link(given: Given) -> Link | None:
    for value in given.node.inputs.values():
        if (link := as_link(value)) is not None:
            return link
    return None


def _first_of_any(given: Given) -> str | None:
    names = (name for name in given.node.inputs if name.startswith("any_"))
    return next((name for _, name in zip(range(_MOST_NAMES), names, strict=False)), None)


def _all_sigmas(given: Given) -> str:
    """VisualizeSigmasKJ hands its sigmas on, cut where it is told to."""
    if (given.maybe("start_step") or 0) != 0 or (given.maybe("end_step") or -1) != -1:
        raise Unknown
    return "sigmas"


def _got(given: Given) -> Link | None:
    return given.stored(stored_name(given.node))


def _if(condition: str, true: str, false: str) -> Callable[[Given], str]:
    return lambda given: true if given.flag(condition) else false


def _pack(names: Iterable[str], base: str) -> Callable[[Given], Bundle]:
    """What a pipe or a context holds: the links it is given over those of the one it begins with."""

    def bundle(given: Given) -> Bundle:
        before = given.maybe(base) if given.has(base) else None
        links = dict(before.links) if isinstance(before, Bundle) else {}
        return Bundle(links | {name: link for name in names if (link := given.link(name)) is not None})

    return bundle


def _unpack(bundle: Bundle | None, names: Iterable[str]) -> list[Link | Bundle | None]:
    """A pipe's outputs: itself, where its name is empty, and what it holds."""
    if bundle is None:
        raise Unknown
    return [bundle.links.get(name) if name else bundle for name in names]


def _first_context(given: Given) -> Bundle:
    """Context Switch takes the first context that holds anything."""
    names = (name for name in given.node.inputs if name.startswith("ctx_"))
    for _, name in zip(range(_MOST_NAMES), names, strict=False):
        bundle = given.a(Bundle, name)
        if bundle.links:
            return bundle
    raise Unknown


_BASIC = ("model", "clip", "vae", "positive", "negative")
_CONTEXT = ("model", "clip", "vae", "positive", "negative", "latent", "images", "seed")
_EASY_PIPE = ("model", "pos", "neg", "latent", "vae", "clip", "image")
_basic_pipe, _context = _pack(_BASIC, "basic_pipe"), _pack(_CONTEXT, "base_ctx")
_easy_links = _pack(_EASY_PIPE, "pipe")


def _easy_pipe(given: Given) -> Bundle:
    """A picture without a latent is encoded and replaces the latent before."""
    bundle = _easy_links(given)
    if given.link("image") is None or given.link("latent") is not None:
        return bundle
    return Bundle({name: link for name, link in bundle.links.items() if name != "latent"})


def _soft(given: Given) -> str:
    """Where only one side is connected, it is taken whatever the switch says."""
    sides = [name for name in ("on_true", "on_false") if given.has(name)]
    return sides[0] if len(sides) == 1 else _if("switch", "on_true", "on_false")(given)


CHOICES = {
    "Reroute": Choice(_only_link, "the front end, which leaves it out"),
    "SetNode": Choice(_only_link, "the front end, which leaves it out"),
    "GetNode": Choice(_got, "the front end, which leaves it out"),
    "easy setNode": Choice(_only_link, "the front end, which leaves it out"),
    "easy getNode": Choice(_got, "the front end, which leaves it out"),
    "ReroutePrimitive|pysssss": Choice(lambda _: "value", "ComfyUI-Custom-Scripts py/reroute_primitive.py"),
    "ComfySwitchNode": Choice(_if("switch", "on_true", "on_false"), _LOGIC, _SIDES),
    "ComfySoftSwitchNode": Choice(_soft, _LOGIC, _SIDES),
    "LazySwitchKJ": Choice(_if("switch", "on_true", "on_false"), _KJ, _SIDES),
    "easy ifElse": Choice(_if("boolean", "on_true", "on_false"), _EASY, _SIDES),
    "easy anythingIndexSwitch": Choice(lambda given: f"value{given.integer('index')}", _EASY, ("value",)),
    "easy imageIndexSwitch": Choice(lambda given: f"image{given.integer('index')}", _EASY, ("image",)),
    "easy cleanGpuUsed": Choice(lambda _: "anything", "ComfyUI-Easy-Use py/nodes/logic.py"),
    "ImpactConditionalBranch": Choice(_if("cond", "tt_value", "ff_value"), _IMPACT, ("tt_value", "ff_value")),
    "ImpactSwitch": Choice(lambda given: f"input{given.integer('select')}", _IMPACT),
    "ToBasicPipe": Choice(lambda given: _unpack(_basic_pipe(given), [""]), f"{_IMPACT} modules/impact/pipe.py"),
    "EditBasicPipe": Choice(lambda given: _unpack(_basic_pipe(given), [""]), f"{_IMPACT} modules/impact/pipe.py"),
    "FromBasicPipe": Choice(
        lambda given: _unpack(given.a(Bundle, "basic_pipe"), _BASIC), f"{_IMPACT} modules/impact/pipe.py"
    ),
    "FromBasicPipe_v2": Choice(
        lambda given: _unpack(given.a(Bundle, "basic_pipe"), ["", *_BASIC]), f"{_IMPACT} modules/impact/pipe.py"
    ),
    "easy pipeIn": Choice(lambda given: _unpack(_easy_pipe(given), [""]), "ComfyUI-Easy-Use py/nodes/pipe.py"),
    "easy pipeOut": Choice(
        lambda given: _unpack(given.a(Bundle, "pipe"), ["", *_EASY_PIPE]), "ComfyUI-Easy-Use py/nodes/pipe.py"
    ),
    "Context (rgthree)": Choice(lambda given: _unpack(_context(given), ["", *_CONTEXT]), f"{_RGTHREE}/context.py"),
    "Context Switch (rgthree)": Choice(
        lambda given: _unpack(_first_context(given), ["", *_CONTEXT]), f"{_RGTHREE}/context_switch.py"
    ),
    "LayerUtility: AnyRerouter": Choice(lambda _: "any", "ComfyUI_LayerStyle py/any_rerouter.py"),
    "VisualizeSigmasKJ": Choice(_all_sigmas, _KJ),
    "Any Switch (rgthree)": Choice(_first_of_any, f"{_RGTHREE}/any_switch.py"),
}
