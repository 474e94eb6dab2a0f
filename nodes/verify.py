# SPDX-License-Identifier: Apache-2.0
"""The node that proves what a quantised file is."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..checkpoint.file.header import CheckpointError
from ..checkpoint.identify.dialects import AUTO, DIALECTS
from ..checkpoint.verify.found import report, summary
from ..checkpoint.verify.verify import verify
from ..draw.verify import verification_picture
from ..host import files
from ..host.files import file_names, file_path, fingerprint
from ..host.show import show, telling, to_image

FOLDERS = ("diffusion_models", "checkpoints")
NO_CALIBRATION = "none"
REPORT, STOP = "report", "stop the job"


class NVFP4Verify(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4Verify",
            display_name="NVFP4 Verify",
            category="NVFP4",
            description="Compares an NVFP4 file with the checkpoint it was made from, tensor by tensor: what is "
            "quantized is measured, everything else must be there and equal. Reads both files once.",
            inputs=[
                io.Combo.Input(
                    "file_name", options=file_names(FOLDERS), tooltip="The NVFP4 file to examine, of any dialect."
                ),
                io.Combo.Input(
                    "source", options=file_names(FOLDERS),
                    tooltip="The BF16, FP16, FP32 or FP8 checkpoint that it was made from.",
                ),
                io.Combo.Input(
                    "on_finding", options=[REPORT, STOP], default=REPORT,
                    tooltip="When something is wrong: report it and go on, or stop the job with an error that says it.",
                ),
                io.Combo.Input(
                    "dialect", options=[AUTO, *DIALECTS], default=AUTO, optional=True, advanced=True,
                    tooltip="How the NVFP4 file lays out its weights; auto goes by its marks, or by what fits.",
                ),
                io.Combo.Input(
                    "calibration", options=[NO_CALIBRATION, *file_names(FOLDERS)], default=NO_CALIBRATION,
                    tooltip="A calibration file of the source: layers are judged by their outputs.", optional=True,
                    advanced=True,
                ),
                io.String.Input(
                    "written", default="", optional=True, force_input=True,
                    tooltip="In place of file_name: the output `file` of NVFP4 Quantize, once it is written.",
                ),
            ],
            outputs=[
                io.Boolean.Output("ok", display_name="ok", tooltip="Whether nothing is wrong."),
                io.String.Output(
                    "report", display_name="report", tooltip="The verdict, what is wrong, and the worst layers."
                ),
                io.Image.Output(
                    "picture", display_name="picture", tooltip="The error of every layer by block and layer type."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["check quantization", "compare checkpoints", "nvfp4 error", "sqnr", "damaged file"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(
        cls, file_name, source, on_finding, dialect=AUTO, calibration=NO_CALIBRATION, written=""
    ) -> str:
        names = file_name, source, None if calibration == NO_CALIBRATION else calibration
        return fingerprint(names, FOLDERS, on_finding, dialect)

    @classmethod
    def execute(
        cls, file_name, source, on_finding, dialect=AUTO, calibration=NO_CALIBRATION, written=""
    ) -> io.NodeOutput:
        path = files.output_written(written) if written else file_path(file_name, FOLDERS)
        found = verify(
            path, file_path(source, FOLDERS), dialect=dialect, plain_source=True, loras=files.folded_loras(path),
            calibration=None if calibration == NO_CALIBRATION else file_path(calibration, FOLDERS),
            device=files.restore_device(), on_step=telling(cls, files.progress()),
        )  # fmt: skip
        if on_finding == STOP and not found.ok:
            raise CheckpointError(summary(found))
        picture = to_image(verification_picture(found))
        return io.NodeOutput(found.ok, report(found), picture, ui=show(cls, report(found), large=picture))
