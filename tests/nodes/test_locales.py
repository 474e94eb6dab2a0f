# SPDX-License-Identifier: Apache-2.0
"""The texts of the nodes in four languages, as the front end looks them up: complete, of today's schemas, plain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from nvfp4_video.nodes import NODES
from nvfp4_video.tests.record_locales import FILE, LANGUAGES, LOCALES, english

TRANSLATED = [language for language in LANGUAGES if language != "en"]
# Character sets that hold one of the scripts only: simplified Chinese, traditional Chinese, Japanese.
CHARACTERS = {"zh": "gb2312", "zh-TW": "big5", "ja": "shift_jis"}
# Means something in a message of vue-i18n: a placeholder, a linked message, a plural.
MESSAGE_SYNTAX = re.compile(r"[{}@|]")
# Numbers and names that mean the same in every language: 0.5, BF16, models/vae, LTX-2.3, text_encoder_gb.
FACTS = re.compile(r"\d+(?:\.\d+)?|[A-Za-z_]+[/_][A-Za-z_/]+|\b[A-Z][A-Z0-9]+\b", re.ASCII)
SENTENCES = (".tooltip", ".description")
WIDGETS = {"BOOLEAN", "COMBO", "FLOAT", "INT", "STRING"}
PACK = Path(__file__).resolve().parents[2]


@pytest.fixture
def schema_texts(stub_comfy) -> dict[str, str]:
    """Dotted key -> English text, of every text in the schemas of today."""
    return flat(english(NODES))


def flat(tree: dict, above: str = "") -> dict[str, str]:
    """Nested dicts -> {"NVFP4Split.inputs.name.tooltip": text}."""
    found = {}
    for name, part in tree.items():
        found |= flat(part, f"{above}{name}.") if isinstance(part, dict) else {f"{above}{name}": part}
    return found


def texts(language: str) -> dict[str, str]:
    """The same of a language's file."""
    return flat(json.loads((LOCALES / language / FILE).read_text(encoding="utf-8")))


def test_there_are_the_four_languages_and_no_other():
    assert sorted(folder.name for folder in LOCALES.iterdir()) == sorted(LANGUAGES)


def test_the_english_file_says_what_the_schemas_say(schema_texts):
    # Remedy: python tests/record_locales.py, then the same texts in the other three languages.
    assert texts("en") == schema_texts


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_node_input_and_output_has_its_texts(language: str, schema_texts):
    assert sorted(schema_texts.keys() - texts(language).keys()) == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_no_text_belongs_to_something_that_is_gone(language: str, schema_texts):
    assert sorted(texts(language).keys() - schema_texts.keys()) == []


def test_every_input_and_every_output_but_those_named_after_their_type_has_a_name(schema_texts):
    names = []
    for schema in (node.GET_SCHEMA() for node in NODES):
        names += [f"{schema.node_id}.inputs.{port.id}.name" for port in schema.inputs]
        outputs = enumerate(schema.outputs)
        names += [f"{schema.node_id}.outputs.{index}.name" for index, port in outputs if port.display_name]
    assert [name for name in names if name not in schema_texts] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_plain_and_hold_nothing_that_vue_i18n_would_interpret(language: str):
    for key, text in texts(language).items():
        assert isinstance(text, str) and text == text.strip() != "", key
        assert not MESSAGE_SYNTAX.search(text), f"{language} {key}: {text}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_sentences_are_translated_and_in_the_script_of_the_language(language: str, schema_texts):
    found = texts(language)
    sentences = [key for key in schema_texts.keys() & found.keys() if key.endswith(SENTENCES)]
    assert [key for key in sentences if found[key] == schema_texts[key]] == []
    for key, text in found.items():
        try:
            text.encode(CHARACTERS[language])
        except UnicodeEncodeError as error:
            pytest.fail(f"{language} {key}: {text[error.start]!r} does not belong to its script")
    if language == "ja":
        assert [key for key in sentences if not re.search("[\u3041-\u3093]", found[key])] == []


@pytest.mark.parametrize("language", TRANSLATED)
def test_numbers_folders_and_formats_survive_translation(language: str, schema_texts):
    found = texts(language)
    for key in schema_texts.keys() & found.keys():
        if key.endswith(SENTENCES):
            # Chinese has a word for GPU memory without GPU in it.
            missing = set(FACTS.findall(schema_texts[key])) - set(FACTS.findall(found[key])) - {"GPU"}
            assert missing == set(), f"{language} {key}: {found[key]}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_widget_that_an_error_message_names_can_be_found_on_the_translated_node(language: str, stub_comfy):
    # Error messages are English and write the id of a widget in backquotes.
    sources = [path for folder in ("checkpoint", "host", "measure") for path in (PACK / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"(?<!`)`(\w+)`(?!`)", path.read_text(encoding="utf-8"))}
    assert {"dialect", "config_from"} <= named
    found, lost = texts(language), []
    for schema in (node.GET_SCHEMA() for node in NODES):
        widgets = {port.id for port in schema.inputs if port.get_io_type() in WIDGETS}
        keys = {name: f"{schema.node_id}.inputs.{name}.name" for name in widgets & named}
        lost += [key for name, key in keys.items() if name not in found.get(key, name)]
    assert lost == []
