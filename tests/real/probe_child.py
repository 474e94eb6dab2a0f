# SPDX-License-Identifier: Apache-2.0
"""What the probe says about the ComfyUI in whose folder this runs, on the CPU, as one line of JSON.

usage: <the host's python> probe_child.py, in the folder of a ComfyUI checkout
"""

from __future__ import annotations

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
    facts = {fact.id: [fact.value, fact.text] for fact in probe.probe().values()}
    doctor = importlib.import_module("nvfp4_video.host.doctor.report")
    prefetch = sys.modules.get("comfy.model_prefetch")
    found = {
        "facts": facts,
        "imported_with_the_probe": early,
        "queues_left": len(getattr(prefetch, "PREFETCH_QUEUES", ())),
        "cuda_initialised": importlib.import_module("torch").cuda.is_initialized(),
        "launch": doctor.report()["launch"],
    }
    sys.stdout.write(f"\n{MARK}{json.dumps(found, default=sorted)}\n")


if __name__ == "__main__":
    main()
