# SPDX-License-Identifier: Apache-2.0
"""The text encoder loader."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..checkpoint.identify.dialects import AUTO, DIALECTS
from ..host.files import SAME_FILE, file_names, file_path, fingerprint, optional_path
from ..host.load.text_encoder import DEVICES, LTX, load_text_encoder, types
from ..kernels.backends import BACKENDS

FOLDERS = ("text_encoders",)
PROJECTION_FOLDERS = ("checkpoints", "text_encoders", "diffusion_models")


class NVFP4TextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4TextEncoderLoader",
            display_name="NVFP4 Text Encoder Loader",
            category="NVFP4",
            description="Loads a text encoder in NVFP4, of any dialect and of any family ComfyUI knows. For LTX-2.x "
            "that is the Gemma with the text projection of its checkpoint, which also writes prompts (Generate LTX2 "
            "Prompt) several times faster; by type also Qwen, T5, Llama, gpt-oss and others. Encodes as ComfyUI's own "
            "loader.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=file_names(FOLDERS),
                    tooltip="From models/text_encoders: Gemma 3 12B (LTX-2, LTX-2.3) or Gemma 4 12B (LTX-2.5), for "
                    "ComfyUI, such as gemma_3_12B_it_fp4_mixed.safetensors. With another type, the text encoder of "
                    "that model. Of a text encoder in several files, any one of them.",
                ),
                io.Combo.Input(
                    "projection",
                    options=[SAME_FILE, *file_names(PROJECTION_FOLDERS)],
                    default=SAME_FILE,
                    tooltip="Where the text projection is: the full LTX-2.x checkpoint, a file of its own (NVFP4 Split "
                    "Checkpoint writes one), or the text encoder itself (LTX-2.5). With another type, a second text "
                    "encoder, as ComfyUI's DualCLIPLoader takes it; the file itself means that there is none.",
                ),
                io.Combo.Input(
                    "dialect",
                    options=[AUTO, *DIALECTS],
                    default=AUTO,
                    optional=True,
                    tooltip="How the text encoder lays out its NVFP4 weights, for a file that does not say it.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", *BACKENDS],
                    default="auto",
                    optional=True,
                    tooltip="What computes from packed weights. auto: Triton where it runs, torch elsewhere.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default="default",
                    optional=True,
                    tooltip="cpu: run the text encoder on the CPU, which is slow and needs no GPU memory.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "graphs",
                    default=True,
                    optional=True,
                    tooltip="While a prompt is written, replay each block as a CUDA graph where ComfyUI can. Off: "
                    "ComfyUI's plain token loop.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "type",
                    options=list(types()),
                    default=LTX,
                    optional=True,
                    tooltip="The model that the text encoder is for, as in ComfyUI's CLIPLoader. ltxv: LTX-2.x, and T5 "
                    "for LTX-Video. The report says which families have not been tried.",
                ),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoder, for CLIP Text Encode and the like."),
                io.String.Output("report", display_name="report", tooltip="What was loaded and how it is computed."),
            ],
            search_aliases=["nvfp4", "fp4", "ltx", "load clip", "gemma", "qwen", "t5", "prompt enhancer"],
        )

    @classmethod
    def fingerprint_inputs(
        cls, text_encoder, projection, dialect=AUTO, backend="auto", device="default", graphs=True, type=LTX
    ) -> str:
        files = fingerprint((text_encoder,), FOLDERS, dialect, backend, device, graphs, type)
        return files + fingerprint((projection,), PROJECTION_FOLDERS)

    @classmethod
    def execute(
        cls, text_encoder, projection, dialect=AUTO, backend="auto", device="default", graphs=True, type=LTX
    ) -> io.NodeOutput:
        path = file_path(text_encoder, FOLDERS)
        other = optional_path(projection, PROJECTION_FOLDERS)
        clip, report = load_text_encoder(path, other, dialect, backend, device, graphs, type)
        return io.NodeOutput(clip, str(report))
