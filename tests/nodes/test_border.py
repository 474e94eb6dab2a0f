# SPDX-License-Identifier: Apache-2.0
"""What leaves nodes and routes when something fails: own errors as they are, all else as one internal error."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Callable

import comfy.model_management
import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.host import border
from nvfp4_video.host.guard import routes
from nvfp4_video.host.show import show, tell
from nvfp4_video.kernels.errors import PackError
from nvfp4_video.nodes import NODES
from nvfp4_video.nodes.checkpoint import NVFP4Inspect
from nvfp4_video.nodes.model import NVFP4ModelLoader
from nvfp4_video.tests.support.hostile import ESCAPE, SCRIPT, SHOWN, checkpoint
from server import PromptServer


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(border, "_references", {})


def node(raising: Callable[[], None]) -> type:
    """A node whose functions do this."""

    class Node:
        @classmethod
        def execute(cls, value: int = 0) -> int:
            raising()
            return value

        @classmethod
        def fingerprint_inputs(cls) -> None:
            raising()

    return border.guarded(Node)


def test_every_node_is_guarded():
    for cls in NODES:
        for name in {"execute", "fingerprint_inputs"} & cls.__dict__.keys():
            assert hasattr(cls.__dict__[name].__func__, "__wrapped__"), (cls, name)


@pytest.mark.parametrize("name", ["execute", "fingerprint_inputs"])
def test_what_nobody_foresaw_is_an_internal_error_whose_reference_the_log_has_once(name, caplog):
    broken = node(lambda: {}[f"layer {ESCAPE}"])
    for _ in range(3):
        with pytest.raises(border.InternalError, match=r"internal error in Node \(KeyError\).*please report") as raised:
            getattr(broken, name)()
    (record,) = caplog.records
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    assert str(raised.value).rpartition(" ")[2] in record.getMessage()
    assert "KeyError" in record.getMessage() and "test_border.py" in record.getMessage()
    assert "\x1b" not in record.getMessage()


def test_an_own_error_stays_what_it_is_and_can_be_read_in_a_terminal():
    def raising() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise CheckpointError(f"layer {ESCAPE} is odd", where="x", remedy="look") from error

    with pytest.raises(CheckpointError) as raised:
        node(raising).execute()
    assert str(raised.value) == f"x: layer {SHOWN} is odd; look" and isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [FileNotFoundError("x is in none of models/vae"), OSError(28, "No space left", "x")])
def test_an_error_of_the_file_system_stays_what_it_is(error):
    def raising() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        node(raising).execute()
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [comfy.model_management.InterruptProcessingException(), torch.cuda.OutOfMemoryError("no memory"), MemoryError()],
)
def test_what_the_host_acts_on_passes_untouched(error, caplog):
    def raising() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        node(raising).execute()
    assert raised.value is error and caplog.records == []


def test_the_host_shows_a_short_name_of_an_error_s_class():
    # It writes module and class, the module being the path of the pack's folder otherwise.
    kinds, waiting = {border.InternalError}, [PackError]
    while waiting:
        kinds.add(kind := waiting.pop())
        waiting += kind.__subclasses__()
    assert {kind.__module__ for kind in kinds} == {"nvfp4_video"}
    assert CheckpointError in kinds


def test_a_result_is_handed_on():
    assert node(lambda: None).execute(value=3) == 3


def test_a_file_s_names_are_visible_in_what_its_nodes_report_and_raise(stub_comfy, tmp_path):
    checkpoint(tmp_path / "models" / "diffusion_models" / "x.safetensors", SCRIPT + ESCAPE)
    (text,) = NVFP4Inspect.execute("x.safetensors").ui["text"]
    assert SCRIPT + SHOWN in text and not set("\x1b\x07\u202e") & set(text)
    with pytest.raises(CheckpointError) as raised:
        NVFP4ModelLoader.execute("x.safetensors", "bf16", "comfy")
    assert f"x.safetensors, layer {SCRIPT}{SHOWN}: " in str(raised.value)


def test_a_progress_text_is_html_that_shows_it_and_a_report_is_text(stub_comfy):
    hidden = types.SimpleNamespace(hidden=types.SimpleNamespace(unique_id="3"))
    tell(hidden, f"{SCRIPT}{ESCAPE}")
    ((text, node_id),) = PromptServer.instance.sent
    assert node_id == "3" and text.startswith(r"\x3cimg src=") and "<" not in text and text.endswith(SHOWN)
    assert show(NVFP4Inspect, f"{SCRIPT}{ESCAPE}\nline")["text"] == (f"{SCRIPT}{SHOWN}\nline",)


@pytest.mark.parametrize("route", [routes.get_report, routes.get_reports, routes.post_check])
def test_a_route_answers_what_nobody_foresaw_with_a_sentence_and_a_reference(route, monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("it broke")

    class Body:
        async def iter_chunked(self, _: int):
            yield b'{"prompt": {}}'

    for name in ("probe", "reports"):
        monkeypatch.setattr(routes, name, broken)
    request = types.SimpleNamespace(
        content=Body(), query=types.SimpleNamespace(getall=lambda *_: [], get=lambda *_: "")
    )
    answer = asyncio.run(route(request))
    sentence = json.loads(answer.body)["error"]
    assert answer.status == 500 and sentence.startswith(f"internal error in {route.__name__} (RuntimeError)")
    assert sentence.rpartition(" ")[2] in caplog.text and "it broke" in caplog.text and "it broke" not in sentence
