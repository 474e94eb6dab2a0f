# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that a node has as text, evaluated by walking its syntax tree: nothing is compiled or called by name.

Every node's dialect is a table of functions, names and operators, as its own code has them. What the host's evaluator
refuses (attributes, strings, comprehensions) is refused here; texts and numbers are bounded.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .evaluate import Unknown

_LONGEST, _DEEPEST, _MOST_NODES = 1000, 40, 400
_MOST_BITS, _LARGEST_EXPONENT = 256, 64
_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_BITS = {ast.BitXor: operator.xor, ast.BitAnd: operator.and_, ast.BitOr: operator.or_}
_SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Invert: operator.invert}
_ORDERS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


class Dialect(NamedTuple):
    """What a node's expressions may use.

    ``bits``: & | ^ ~. ``conditions``: `x if y else z`. ``numbers``: comparisons come to 1 or 0. ``joined``: what `and`
    (True) or `or` makes of its values; Python's own meaning without it.
    """

    functions: Mapping[str, Callable[..., Any]]
    names: Mapping[str, Any]
    bits: bool = False
    conditions: bool = False
    numbers: bool = False
    joined: Callable[[bool, list[Any]], Any] | None = None


def _sum(*values: Any) -> Any:
    return sum(values[0]) if len(values) == 1 and isinstance(values[0], list) else sum(values)


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > _LARGEST_EXPONENT:
        raise Unknown
    result = _bounded(base) ** exponent
    if isinstance(result, complex):
        raise Unknown
    return _bounded(result)


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise Unknown
    return value


def _as_truth(all_: bool, values: list[Any]) -> bool:
    return all(values) if all_ else any(values)


def _of_two_as_number(all_: bool, values: list[Any]) -> int:
    return int(_as_truth(all_, values[:2]))  # the rest is not looked at


def _never(all_: bool, values: list[Any]) -> Any:
    raise Unknown


_COMMON = {"min": min, "max": max, "round": round}
_SCHOOL = {
    **_COMMON, "abs": abs, "sqrt": math.sqrt, "sin": math.sin, "cos": math.cos, "tan": math.tan, "log": math.log,
    "log10": math.log10, "floor": math.floor, "ceil": math.ceil, "pow": _power,
}  # fmt: skip
# ComfyMathExpression: comfy_extras/nodes_math.py, its MATH_FUNCTIONS over simpleeval.
CORE = Dialect({**_SCHOOL, "sum": _sum, "log2": math.log2, "int": int, "float": float}, {}, bits=True, conditions=True)
# SimpleCalculatorKJ: ComfyUI-KJNodes, nodes/nodes.py.
KJ = Dialect({**_SCHOOL, "exp": math.exp}, {"pi": math.pi, "euler": math.e}, joined=_as_truth)
# MathExpression|pysssss: ComfyUI-Custom-Scripts, py/math_expression.py, without its functions of chance.
PYSSSSS = Dialect(
    {
        **_COMMON, "ceil": math.ceil, "floor": math.floor, "sqrt": math.sqrt, "int": int,
        "iif": lambda a, b, c=None: b if a else c,
    },
    {},
    bits=True,
    numbers=True,
    joined=_of_two_as_number,
)  # fmt: skip
# SimpleMath+: ComfyUI_essentials, misc.py.
ESSENTIALS = Dialect({**_COMMON, "sum": sum}, {}, numbers=True, joined=_never)
# easy simpleMath: ComfyUI-Easy-Use, py/libs/math.py.
EASY = Dialect({**_SCHOOL, "exp": math.exp}, {"pi": math.pi, "e": math.e})


def evaluate(text: str, names: Mapping[str, Any], dialect: Dialect) -> Any:
    """The number that an expression comes to; Unknown, or an ArithmeticError, TypeError or ValueError, without one."""
    result = _value(_parsed(text), {**dialect.names, **names}, dialect, 0)
    if not isinstance(result, (bool, int, float)):
        raise Unknown
    return result


@lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise Unknown
    try:
        with warnings.catch_warnings():  # Python's advice on other people's expressions ("4 is 4") is for nobody here
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise Unknown from None
    for count, _ in enumerate(ast.walk(tree)):
        if count > _MOST_NODES:
            raise Unknown
    return tree


def _value(node: ast.expr, names: Mapping[str, Any], dialect: Dialect, depth: int) -> Any:
    if depth > _DEEPEST:
        raise Unknown

    def inner(part: ast.expr) -> Any:
        return _value(part, names, dialect, depth + 1)

    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if names.get(name) is not None:
            return names[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _calculated(type(op), inner(left), inner(right), dialect)
        case ast.UnaryOp(op=op, operand=operand) if dialect.bits or not isinstance(op, ast.Invert):
            return _SIGNS[type(op)](inner(operand))
        case ast.BoolOp(op=op, values=parts):
            if dialect.joined is not None:
                return dialect.joined(isinstance(op, ast.And), list(map(inner, parts)))
            return _joined(isinstance(op, ast.And), parts, inner)
        case ast.Compare(left=left, ops=orders, comparators=rights):
            truth = _compared(inner(left), orders, rights, inner)
            return int(truth) if dialect.numbers else truth
        case ast.IfExp(test=test, body=body, orelse=other) if dialect.conditions:
            return inner(body) if inner(test) else inner(other)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in dialect.functions:
            return dialect.functions[name](*map(inner, arguments))
    raise Unknown


def _calculated(op: type, left: Any, right: Any, dialect: Dialect) -> Any:
    if op is ast.Pow:
        return _power(left, right)
    function = _ARITHMETIC.get(op) or (_BITS.get(op) if dialect.bits else None)
    if function is None:
        raise Unknown
    return _bounded(function(left, right))


def _joined(all_: bool, parts: list[ast.expr], inner: Callable[[ast.expr], Any]) -> Any:
    value: Any = None
    for part in parts:
        value = inner(part)
        if bool(value) != all_:
            break
    return value


def _compared(left: Any, orders: list[ast.cmpop], rights: list[ast.expr], inner: Callable[[ast.expr], Any]) -> bool:
    for order, right in zip(orders, rights, strict=True):
        if type(order) not in _ORDERS:
            raise Unknown
        value = inner(right)
        if not _ORDERS[type(order)](left, value):
            return False
        left = value
    return True
