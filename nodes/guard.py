# SPDX-License-Identifier: Apache-2.0
"""The launch guard and the host report."""

from __future__ import annotations

import time

from comfy_api.v0_0_2 import io

from ..host.doctor import report as doctor
from ..host.doctor.probe import probe
from ..host.guard import check as guard
from ..host.guard.cure import guard_model
from ..host.guard.routes import REFUSED
from ..host.show import show


class NVFP4LaunchGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4LaunchGuard",
            display_name="NVFP4 Launch Guard",
            category="NVFP4",
            description="Checks the workflow for what crashes or spoils an LTX-2 render on this ComfyUI, before it "
            "runs. Stands between a model and its sampler; on a healthy host it passes the model on unchanged.",
            inputs=[
                io.Model.Input("model", tooltip="The model, from a loader or a LoRA."),
                io.Combo.Input(
                    "policy",
                    options=list(guard.POLICIES),
                    default=guard.WARN,
                    tooltip="warn: log and show what is found. cure: besides, on a ComfyUI with the prefetch crash, "
                    "turn the prefetch off for this model, without a flag or a restart. block: refuse to run the "
                    "workflow while there is an error in it.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model; with cure and where it is needed, without the prefetch."),
                io.String.Output("report", display_name="report", tooltip="What was found, with reason and remedy."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
            search_aliases=["wait_stream", "crash", "doctor", "disable-async-offload", "dynamic vram"],
        )

    @classmethod
    def validate_inputs(cls, policy) -> bool | str:
        if policy is None or policy in guard.POLICIES:  # None: it comes over a link
            return True
        refused = isinstance(policy, str) and policy.startswith(REFUSED)
        return policy[len(REFUSED) :] if refused else f"{policy!r}; expected one of {', '.join(guard.POLICIES)}"

    @classmethod
    def execute(cls, model, policy) -> io.NodeOutput:
        model, report = guard_model(model, policy, cls.hidden.prompt)
        return io.NodeOutput(model, report, ui=show(cls, report))


class NVFP4HostReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4HostReport",
            display_name="NVFP4 Host Report",
            category="NVFP4",
            description="What this ComfyUI runs on and how: versions, GPU, offloading, which path NVFP4 weights take, "
            "findings on this workflow, and the launch command recommended for this machine.",
            inputs=[],
            outputs=[io.String.Output("report", display_name="report", tooltip="What the node shows.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
            search_aliases=["doctor", "system info", "launch flags", "fast path"],
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return time.time()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        facts = probe()
        findings = guard.check_host(facts) + guard.check(cls.hidden.prompt, facts)
        report = doctor.text(doctor.report(facts, findings))
        return io.NodeOutput(report, ui=show(cls, report))
