# SPDX-License-Identifier: Apache-2.0
"""Text of others on its way out: shown as it stands, obeyed by nothing, no longer than anybody reads."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from nvfp4_video.measure.escape import LONGEST_CELL, html, line, markdown, report, visible
from nvfp4_video.tests.support.hostile import ESCAPE, SCRIPT, SHOWN


class Reader(HTMLParser):
    """What a browser makes of HTML: elements, and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, _: object) -> None:
        self.elements.append(tag)

    def handle_comment(self, _: str) -> None:
        self.elements.append("comment")

    def handle_decl(self, _: str) -> None:
        self.elements.append("declaration")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESCAPE, SHOWN),
        ("plain, \u00e4\u4e2d\u3042 \U0001f600 and `code`", "plain, \u00e4\u4e2d\u3042 \U0001f600 and `code`"),
        ("\u3000of a Japanese\u00a0name", "\u3000of a Japanese\u00a0name"),
        ("a\u200bb\u00adc\ufeffd\u2028e\x00f\x7fg\tk\rl", r"a\u200bb\xadc\ufeffd\u2028e\x00f\x7fg\tk\rl"),
        ("half \ud800 and \udcff", r"half \ud800 and \udcff"),
        (r"\x1b as text stays", r"\x1b as text stays"),
    ],
)
def test_what_has_no_shape_of_its_own_is_made_visible_and_all_else_stays(text, shown):
    assert visible(text) == line(text) == shown == visible(visible(text))
    shown.encode()


def test_only_the_lines_that_a_report_means_are_lines():
    assert visible("a\nb") == "a\nb"
    assert line("a\nb") == r"a\nb"
    assert report(["layer x\nerror: all is lost", "second"]) == "layer x\\nerror: all is lost\nsecond"


def test_of_a_long_text_beginning_and_end_stay():
    text = line(f"file.safetensors, layer {'9' * 50_000}: found; remedy", 300)
    assert text.startswith("file.safetensors, layer 999") and text.endswith("999: found; remedy")
    assert "[... 49,7" in text and len(text) < 350
    assert line("x" * 300, 300) == "x" * 300


def test_a_text_of_many_lines_has_an_end():
    assert len(visible("line\n" * 1_000_000)) < 210_000
    assert len(visible("\x1b" * 10_000_000)) < 10_000


@pytest.mark.parametrize(
    "text", [SCRIPT, ESCAPE, "<!-- a --><!doctype x>&lt;&amp;b&#60;", "\"'`=<svg/onload=x>", "[[a|b]]"]
)
def test_html_of_a_text_reads_alike_as_html_and_as_text_and_has_no_element(text):
    read = Reader(f'<p title="{html(text)}">{html(text)}</p>')
    assert read.elements == ["p"] and read.text == html(text)
    named = {"<": r"\x3c", "&": r"\x26", '"': r"\x22", "[[": r"[\x5b"}
    assert re.sub(r'\[\[|[<&"]', lambda found: named[found[0]], visible(text)) == html(text)
    assert "[[" not in html(text)


@pytest.mark.parametrize(
    ("text", "card"),
    [
        (SCRIPT[:5], "&lt;img "),
        ("![x](http://tracker/x.png)", r"!\[x\](http://tracker/x.png)"),
        ("<https://x> &copy;", "&lt;https://x&gt; &amp;copy;"),
        ("a | b", r"a \| b"),
        ("one\n\n# two\n- three\n===", r"one \# two - three ==="),
        ("**bold** ~~struck~~ `code` $x$", r"\*\*bold\*\* \~\~struck\~\~ \`code\` \$x\$"),
        ("ltx_2_3.safetensors, _slanted_, __init__", r"ltx_2_3.safetensors, \_slanted\_, \_\_init\_\_"),
        ("a\\", "a\\\\"),
        (ESCAPE[:2] + "\u202e", r"\\x1b\]\\u202e"),
    ],
)
def test_markdown_of_a_text_is_the_text_on_one_line(text, card):
    assert markdown(text) == card


def test_markdown_of_megabytes_is_a_cell():
    assert len(markdown("<" * 45_000_000)) < 5 * LONGEST_CELL
