# SPDX-License-Identifier: Apache-2.0
"""What the loader says of a damaged file, inspect, repair, quantize and verify say too: one reading, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nvfp4_video.checkpoint.file.header import CheckpointError
from nvfp4_video.checkpoint.file.shards import Source
from nvfp4_video.checkpoint.identify.components import DIFFUSION_MODEL
from nvfp4_video.checkpoint.identify.report import Inspection, inspect_checkpoint
from nvfp4_video.checkpoint.verify.verify import Verification, verify
from nvfp4_video.checkpoint.write.plan import QuantizePlan, QuantizeSettings, plan_quantization
from nvfp4_video.checkpoint.write.recipes import Options
from nvfp4_video.checkpoint.write.repair import Repaired, repair
from nvfp4_video.checkpoint.write.weights import FloatRows
from nvfp4_video.host.load.model import load_model
from nvfp4_video.host.load.report import LoadReport
from nvfp4_video.tests.host.load.test_mutants import (  # the fixtures come with their names
    chosen,
    differences,
    host,  # noqa: F401
    one_thread,  # noqa: F401
)
from nvfp4_video.tests.support import stored_files

EACH = 16
# ComfyUI has no format for these, so there is nothing that repair could declare.
NOT_REPAIRED = ("modelopt_svd", "blocks")
EVERYTHING = QuantizeSettings(options=Options(quantize=(".",)))


def tried(tool, *arguments, **options):
    """What a tool returns, or its refusal; any other exception is a fault of the tool."""
    try:
        return tool(*arguments, **options)
    except CheckpointError as error:
        return error


def loaded(path: Path, meant: stored_files.Meant) -> LoadReport | CheckpointError:
    found = tried(load_model, str(path))
    if isinstance(found, CheckpointError):
        return found
    assert differences(found[0].model.diffusion_model, meant) == []
    return found[1]


def read_to_quantise(plan: QuantizePlan, meant: stored_files.Meant) -> list[str]:
    """Layers whose numbers the quantiser would read otherwise than meant."""
    wrong = []
    with Source(plan.checkpoint) as reader:
        for job in (*plan.jobs.values(), *plan.restored.values()):
            own = job.layer.removeprefix(stored_files.PREFIX)
            values = FloatRows(reader, job, torch.device("cpu")).rows(0, job.info.shape[0]).numpy()
            if own in meant.weights and not np.allclose(values, meant.weights[own], rtol=1e-6, atol=0):
                wrong.append(own)
    return wrong


@pytest.mark.parametrize("name", stored_files.DIALECTS)
def test_all_tools_read_a_mutant_as_the_loader_does_or_refuse_it(name: str, host, tmp_path: Path):  # noqa: F811
    some, stored, meant = chosen(name, EACH)
    host(meant)
    folders = {part: tmp_path / part for part in ("files", "source", "repaired")}
    for folder in folders.values():
        folder.mkdir()
    path, target = (folders[part] / "model.safetensors" for part in ("files", "repaired"))
    original = meant.source().write(folders["source"] / "f32.safetensors")
    disagree = []
    for what, mutant in [("nothing", stored), *some]:
        mutant.write(path)
        load = loaded(path, meant)
        look, check = tried(inspect_checkpoint, path), tried(verify, path, original)
        plan = tried(plan_quantization, path, EVERYTHING)
        target.unlink(missing_ok=True)
        mend = tried(repair, path, target)
        right = isinstance(load, LoadReport)
        if what == "nothing":
            assert right and isinstance(plan, QuantizePlan) == (name in ("fp8", "old_fp8", "blocks"))
        if right and not isinstance(look, Inspection):
            disagree.append(f"{what}: loaded, but inspect says {look}")
        if right and isinstance(look, Inspection):
            if (look.dialect or "none") != load.dialect or DIFFUSION_MODEL not in look.loaders:
                disagree.append(f"{what}: loaded as {load.dialect}, inspect says {look.dialect}, {dict(look.loaders)}")
        if right and not isinstance(mend, Repaired) and name not in NOT_REPAIRED:
            disagree.append(f"{what}: loaded, but repair says {mend}")
        if isinstance(mend, Repaired) and mend.method != "nothing":
            loaded(target, meant)
        wrong = tried(read_to_quantise, plan, meant) if isinstance(plan, QuantizePlan) else []
        if right and isinstance(wrong, CheckpointError) or wrong and not isinstance(wrong, CheckpointError):
            disagree.append(f"{what}: the quantizer reads other numbers in {wrong}")
        if isinstance(check, Verification) and check.ok and not right:
            disagree.append(f"{what}: verify finds it good, the loader says {load}")
        if isinstance(check, Verification) and right and any(layer.verdict for layer in check.layers):
            disagree.append(f"{what}: loaded, but verify says {[layer.verdict for layer in check.layers]}")
    assert disagree == []
