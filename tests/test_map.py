# SPDX-License-Identifier: Apache-2.0
"""docs/map.svg, the picture of the pack's folders, shows the imports as they are."""

from __future__ import annotations

from nvfp4_video.tests import make_map
from nvfp4_video.tests.support.source import ROOT, pack_files


def test_the_map_is_what_the_script_draws_now():
    drawn = (ROOT / make_map.TARGET).read_text(encoding="utf-8")
    assert drawn == make_map.draw(), "folders or imports changed: run python tests/make_map.py"


def test_every_folder_with_modules_has_a_box_with_its_purpose():
    folders = {path.parent.as_posix() for path in pack_files() if len(path.parts) > 1 and path.name != "__init__.py"}
    assert {folder for box in make_map.boxes(make_map.arrows()) for folder in box} == folders - make_map.LEFT_OUT
    assert [folder for folder in folders - make_map.LEFT_OUT if not make_map.purpose(folder)] == []


def test_implied_arrows_are_left_out_and_folders_in_a_circle_share_a_box():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"c"}}
    assert make_map.boxes(graph) == {("a",): {("b",)}, ("b",): {("c", "d")}, ("c", "d"): set()}
