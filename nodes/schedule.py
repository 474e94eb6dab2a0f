# SPDX-License-Identifier: Apache-2.0
"""Node that chooses in which steps of a sampling a model computes more exactly."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..host.compute.schedule import FIRST_AND_LAST, STEPS, use_schedule


class NVFP4ComputeSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4ComputeSchedule",
            display_name="NVFP4 Compute Schedule",
            category="NVFP4",
            description="Has some steps of a sampling compute more exactly than the rest, on the same bytes: bf16 "
            "where an image is laid out or finished, int8, fp8 or fp4 between. For models of the NVFP4 Model Loader "
            "with compute int8, fp8, fp4 or auto.",
            inputs=[
                io.Model.Input("model", tooltip="The model that gets a schedule; it is not changed itself."),
                io.Combo.Input(
                    "steps",
                    options=list(STEPS),
                    default=FIRST_AND_LAST,
                    tooltip="The steps of each sampling that compute in bf16. by sigma: as `ranges` says.",
                ),
                io.String.Input(
                    "ranges",
                    default="0.95-1=bf16, 0-0.45=bf16",
                    tooltip="With by sigma: FROM-TO=MODE, separated by commas, MODE bf16, int8, fp8 or fp4; the first "
                    "that holds a step's sigma counts. A layer never computes less exactly than it was loaded to.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with that schedule."),
                io.String.Output("report", display_name="report", tooltip="Which steps compute how."),
            ],
            search_aliases=["nvfp4", "compute", "schedule", "int8", "fp8", "fp4", "bf16", "precision", "steps"],
        )

    @classmethod
    def execute(cls, model, steps, ranges) -> io.NodeOutput:
        patcher = model.clone()
        return io.NodeOutput(patcher, f"compute schedule: {use_schedule(patcher, steps, ranges)}")
