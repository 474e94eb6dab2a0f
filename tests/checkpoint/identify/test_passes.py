# SPDX-License-Identifier: Apache-2.0
"""Readers go over a header's names a few times, however many prefixes these have; pictures measure a few texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from nvfp4_video.checkpoint.file.header import CheckpointError, Header, TensorInfo, read_header
from nvfp4_video.checkpoint.file.shards import Checkpoint
from nvfp4_video.checkpoint.identify.components import VIDEO_VAE, find_components
from nvfp4_video.checkpoint.identify.diagnosis import diagnose
from nvfp4_video.checkpoint.identify.report import inspect_checkpoint
from nvfp4_video.checkpoint.identify.signatures import longest_prefixes
from nvfp4_video.checkpoint.identify.vae_signatures import _prefixes, find_vaes
from nvfp4_video.draw.canvas import Canvas, wrap
from nvfp4_video.draw.inspect import inspection_picture
from nvfp4_video.samples import shapes
from PIL import ImageFont

MOST_PASSES = 60


class Counting(dict):
    """A dict that counts how often it is gone over."""

    passes = 0

    def __iter__(self):
        Counting.passes += 1
        return super().__iter__()

    def items(self):
        Counting.passes += 1
        return super().items()

    def keys(self):
        Counting.passes += 1
        return super().keys()


def header_of(names: list[str], metadata: dict[str, str] | None = None) -> Header:
    Counting.passes = 0
    tensors = Counting({name: TensorInfo("BF16", (2, 2), 0, 8) for name in names})
    return Header(Path("x.safetensors"), tensors, metadata or {}, 8)


@pytest.mark.parametrize("shape", ["vae_prefixes", "shared_beginnings", "models"])
def test_a_header_is_gone_over_a_few_times_however_many_prefixes_it_has(shape: str):
    header = header_of(shapes.HEADERS[shape](900))
    vaes = find_vaes(header)
    components = find_components(header)
    found = diagnose(Checkpoint(header, {}, (header,)))
    assert Counting.passes < MOST_PASSES
    assert len(vaes) == (450 if shape == "vae_prefixes" else 0)
    assert (VIDEO_VAE in components) == (shape == "vae_prefixes")
    assert (found.model is not None and found.model.family is not None) == (shape == "models") or found.prefix == ""


def test_names_of_more_vaes_than_any_file_has_are_refused():
    names = [f"v{i}.decoder.1.weight" for i in range(1001)]
    assert len(_prefixes(header_of(names[:1000]))) == 1000
    for read in (find_vaes, find_components):
        with pytest.raises(CheckpointError, match="1,001 VAEs"):
            read(header_of(names))


def test_a_model_below_a_prefix_that_nobody_expects_is_found_and_a_nested_one_is_not_taken_for_it():
    names = [f"some.where.{part}.weight" for part in ("adaln_single.linear", "audio_adaln_single.linear", *"abcd")]
    found = diagnose(Checkpoint(header_of(names), {}, ()))
    assert (found.model.family, found.prefix) == ("LTX-2", "some.where.")
    header = header_of([*names, "some.where.model.diffusion_model.x"])
    assert diagnose(Checkpoint(header, {}, ())).prefix != "some.where."


def test_a_config_is_parsed_once_for_all_vaes(monkeypatch):
    parsed = []
    module = __import__("nvfp4_video.checkpoint.identify.vae_signatures", fromlist=["json"])
    original = module.json.loads
    monkeypatch.setattr(module.json, "loads", lambda text: parsed.append(1) or original(text))
    names = [f"v{i}.decoder.conv_in_x_t.weight" for i in range(20)]
    vaes = find_vaes(header_of(names, {"config": "{}"}))
    assert len(vaes) == 20 and all(vae.has("config") for vae in vaes) and len(parsed) == 1


def test_the_longest_prefix_is_found_as_by_trying_all():
    rng = random.Random(5)  # noqa: S311
    for _ in range(200):
        names = ["".join(rng.choice("ab.") for _ in range(rng.randint(0, 8))) for _ in range(30)]
        prefixes = ["".join(rng.choice("ab.") for _ in range(rng.randint(0, 4))) for _ in range(rng.randint(0, 6))]
        expected = {}
        for name in dict.fromkeys(names):
            fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
            if fitting:
                expected[name] = max(fitting, key=len)
        found = longest_prefixes(dict.fromkeys(names), prefixes)
        assert found == expected and list(found) == list(expected)


def test_a_text_is_cut_after_a_few_measurements(monkeypatch):
    measured = []
    original = ImageFont.FreeTypeFont.getlength
    counting = lambda self, text, *more: measured.append(len(text)) or original(self, text)  # noqa: E731
    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", counting)
    page = Canvas(400, 50)
    width = page.text(0, 0, "W" * 45_000, 20, limit=200)
    assert 150 < width <= 200
    assert len(measured) < 20 and sum(measured) < 100_000
    assert page.text(0, 0, "short", 20, limit=200) == original(ImageFont.load_default(20), "short")


def test_a_text_without_a_limit_ends_with_the_picture_and_may_hold_line_breaks():
    page = Canvas(400, 50)
    assert page.text(0, 0, "a\nb\x1b[31m\u2028" * 5000, 20) <= 400
    assert all("\n" not in line for line in wrap("a\nb\x1bc " * 3, 20, 100))


def test_inspect_draws_a_file_whose_names_are_as_long_as_names_may_be(tmp_path):
    path = tmp_path / "long.safetensors"
    shapes.write_names(path, [f"{'W.' * 490}decoder.{end}" for end in ("1.weight", "22.bias")])
    assert len(read_header(path).tensors) == 2
    assert inspection_picture(inspect_checkpoint(path)).shape[1] == 1600
