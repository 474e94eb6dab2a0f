# SPDX-License-Identifier: Apache-2.0
"""Arithmetic in a node's text comes to what the node's own evaluator makes of it, and nothing else is evaluated."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_video.host.guard.values import expressions
from nvfp4_video.host.guard.values.evaluate import Unknown
from nvfp4_video.host.guard.values.expressions import CORE, EASY, ESSENTIALS, KJ, PYSSSSS, evaluate

NAMES = {"a": 720, "b": 24.0, "c": 5}


@pytest.mark.parametrize(
    ("text", "dialect", "result"),
    [
        ("a/2", CORE, 360.0),
        ("a // 32 * 32", CORE, 704),
        ("(ceil((c * b - 1) / 8) * 8) + 1", CORE, 121),
        ("a * b + 1 if a > 700 else 9", CORE, 17281.0),
        ("min(a, 512, 900) % 100", CORE, 12),
        ("sum(values)", CORE, 749.0),
        ("round(2.5) + round(3.5)", CORE, 6),
        ("not a < b", CORE, True),
        ("a and 0", CORE, 0),
        ("1 < c < 6", CORE, True),
        ("2 ** 10", CORE, 1024),
        ("6 & 3 | 8", CORE, 10),
        ("1+ 8*(round(c*b)/8)", KJ, 121.0),
        ("floor(pi)", KJ, 3),
        ("a and b", KJ, True),
        ("round(a / (c*32)) * (c*32)", PYSSSSS, 640),
        ("iif(a > 700, 1, 2)", PYSSSSS, 1),
        ("a > b", PYSSSSS, 1),
        ("a*32", ESSENTIALS, 23040),
        ("(a>c)*c+(a<=c)*a", EASY, 5),
    ],
)
def test_an_expression_is_what_the_node_makes_of_it(text: str, dialect: expressions.Dialect, result: object):
    found = evaluate(text, {**NAMES, "values": list(NAMES.values())}, dialect)
    assert found == result and type(found) is type(result)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')", "a.real", "'a' * 3", "[1, 2]", "[x for x in values]", "values", "values[0]",
        "lambda: 1", "open(a)", "d", "a if", "", "max(a, key=b)", "a is b", "f'{a}'", "a := 3", "10 ** 100",
        "9 ** 9 ** 9",
        "1j", "a" + "+a" * 600, "(" * 90 + "a" + ")" * 90 + "+" + "-" * 60 + "a", "-1 ** 0.5 ** a", "print(a)", "...",
    ],
)  # fmt: skip
def test_whatever_else_is_written_is_unknown(text: str):
    with pytest.raises((Unknown, ArithmeticError, TypeError, ValueError)):
        evaluate(text, {**NAMES, "values": [1, 2]}, CORE)


@pytest.mark.parametrize(("text", "dialect"), [("a & 3", KJ), ("a if b else c", PYSSSSS), ("abs(a)", ESSENTIALS),
                                               ("~a", KJ), ("pi", CORE), ("a or b", ESSENTIALS)])  # fmt: skip
def test_what_another_pack_s_expressions_can_do_is_unknown(text: str, dialect: expressions.Dialect):
    with pytest.raises(Unknown):
        evaluate(text, NAMES, dialect)


@given(st.text(alphabet="ab10.+-*/%()<>=!& ,mxinroud", max_size=40))
def test_no_text_raises_anything_else_or_takes_long(text: str):
    start = time.process_time()
    try:
        assert isinstance(evaluate(text, NAMES, CORE), (bool, int, float))
    except (Unknown, ArithmeticError, TypeError, ValueError):
        pass
    assert time.process_time() - start < 5, "a bound that a slow machine keeps too"
