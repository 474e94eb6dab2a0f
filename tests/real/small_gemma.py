# SPDX-License-Identifier: Apache-2.0
"""A Gemma 3 of 48 blocks, as ComfyUI recognises it, 64 wide: its dimensions, and a tokenizer.

``shrink`` sets the host's own dimensions accordingly, in the process that calls it only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import io

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 128, 4, 2, 32, 800
BLOCKS, WINDOW, VIDEO, AUDIO = 48, 24, 32, 16
PROMPT = "a cat walks over a wooden bridge while rain falls on the river"


def comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def shrink() -> None:
    """Give the host's Gemma 3 12B the dimensions above."""
    llama = comfy("text_encoders.llama")
    whole = llama.Gemma3_12B_Config
    whole.head_dim, whole.sliding_attention = HEAD_DIM, [WINDOW, WINDOW, WINDOW, WINDOW, WINDOW, False]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    if hasattr(whole, "vision_config"):
        whole.vision_config = whole.vision_config | small
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    llama.Gemma3_12B_Config = functools.partial(whole, **sizes)
    _shrink_projection()


class _Rewritten(importlib.machinery.SourceFileLoader):
    """Loads a module with some of its source replaced."""

    replacements: tuple[tuple[bytes, bytes], ...] = ()

    def get_code(self, fullname: str):
        source = self.get_data(self.path)
        for old, new in self.replacements:
            source = source.replace(old, new)
        return self.source_to_code(source, self.path)


def _shrink_projection() -> None:
    """Older hosts build the projection in its released size whatever the Gemma: load that module with ours."""
    lt, columns = comfy("text_encoders.lt"), HIDDEN * (BLOCKS + 1)
    loader = _Rewritten(lt.__name__, lt.__file__)
    sizes = {"3840 * 49, 4096, 2048": f"{columns}, {VIDEO}, {AUDIO}", "3840 * 49, 3840": f"{columns}, {VIDEO}"}
    loader.replacements = tuple((old.encode(), new.encode()) for old, new in sizes.items())
    if any(old in loader.get_data(lt.__file__) for old, _ in loader.replacements):
        loader.exec_module(lt)


def tokenizer_bytes() -> bytes:
    """A SentencePiece model of ``VOCABULARY`` pieces: letters, syllables, and what the prompts are made of."""
    sentencepiece = importlib.import_module("sentencepiece")
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in "nrstlxyz"]
    lines = [" ".join(syllables[start : start + 8]) for start in range(0, len(syllables), 8)]
    text = ["".join(chr(c) for c in range(33, 127)), *[PROMPT] * 3, *lines]
    if importlib.util.find_spec("comfy_extras.nodes_textgen") is not None:
        spoken = getattr(importlib.import_module("comfy_extras.nodes_textgen"), "LTX2_T2V_SYSTEM_PROMPT", "")
        text += spoken.splitlines()
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=VOCABULARY, model_type="bpe",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    return written.getvalue()
