# SPDX-License-Identifier: Apache-2.0
"""What the probe says about the ComfyUI in whose folder this runs, on the CPU, as one line of JSON.

usage: <the host's python> probe_child.py, in the folder of a ComfyUI checkout
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path

MARK = "facts: "


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    # ComfyUI reads its command line while it is imported, and looks for a GPU unless told not to.
    sys.argv = ["main.py", "--cpu"]
    sys.path[0] = str(Path.cwd())
    package = types.ModuleType("nvfp4_video")
    package.__path__ = [str(root)]
    sys.modules["nvfp4_video"] = package
    probe = importlib.import_module("nvfp4_video.host.doctor.probe")
    early = sorted({name.partition(".")[0] for name in sys.modules} & {"comfy", "torch"})
    importlib.import_module("comfy.options").enable_args_parsing()
    found_facts = probe.probe()
    facts = {fact.id: [fact.value, fact.text] for fact in found_facts.values()}
    names = ("report", "profiles", "machine")
    doctor, profiles, machine = (importlib.import_module(f"nvfp4_video.host.doctor.{name}") for name in names)
    card = {"gpu_maker": dataclasses.replace(found_facts["gpu_maker"], value=machine.NVIDIA)}
    prefetch = sys.modules.get("comfy.model_prefetch")
    found = {
        "facts": facts,
        "imported_with_the_probe": early,
        "queues_left": len(getattr(prefetch, "PREFETCH_QUEUES", ())),
        "cuda_initialised": importlib.import_module("torch").cuda.is_initialized(),
        "launch": doctor.report(found_facts)["launch"],
        "launch_with_nvidia": profiles.launch_profile(found_facts | card).as_dict(),
    }
    sys.stdout.write(f"\n{MARK}{json.dumps(found, default=sorted)}\n")


if __name__ == "__main__":
    main()
