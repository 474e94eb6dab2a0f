# SPDX-License-Identifier: Apache-2.0
"""The VAE loader."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..checkpoint.identify.dialects import AUTO, DIALECTS
from ..host.files import SAME_FILE, VAE_FOLDERS, file_names, file_path, fingerprint, optional_path
from ..host.load.vae import DECODES, EXACT, KINDS, load_vae


class NVFP4VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4VAELoader",
            display_name="NVFP4 VAE Loader",
            category="NVFP4",
            description="Loads the full LTX video or audio VAE from its own file or from inside a checkpoint, told by "
            "its tensors and not by its name. Refuses preview decoders and VAEs of other models, restores quantized "
            "weights, and keeps all weights on the GPU while it decodes.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=file_names(VAE_FOLDERS),
                    tooltip="From models/vae, models/checkpoints or models/diffusion_models: a VAE file, or a full "
                    "checkpoint, of which only the VAE is read.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="auto",
                    tooltip="Which VAE of a checkpoint that has both. auto: the video VAE, or the audio VAE of a file "
                    "that has no other.",
                ),
                io.Boolean.Input(
                    "allow_preview",
                    default=False,
                    tooltip="Let a preview decoder of LTX-2 (taeltx) pass, with a warning. Its picture is several "
                    "times softer than that of the full VAE.",
                ),
                io.Combo.Input(
                    "config_from",
                    options=[SAME_FILE, *file_names(VAE_FOLDERS)],
                    default=SAME_FILE,
                    optional=True,
                    tooltip="For a file whose header lost its `config`: another file of the same model version.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "dialect",
                    options=[AUTO, *DIALECTS],
                    default=AUTO,
                    optional=True,
                    tooltip="For NVFP4 weights in the VAE that do not declare how they are laid out.",
                    advanced=True,
                ),
                io.String.Input(
                    "vae_prefix",
                    default="",
                    optional=True,
                    tooltip="For a checkpoint with several VAEs: how the tensor names of the wanted one begin.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "decode",
                    options=list(DECODES),
                    default=EXACT,
                    optional=True,
                    tooltip="exact: ComfyUI's own decoder, bit for bit. fast: the same computation with less memory "
                    "traffic, which rounds otherwise. LTX's video VAE on an NVIDIA GPU; the report says why not.",
                ),
            ],
            outputs=[
                io.Vae.Output(tooltip="The VAE, for VAE Decode and Encode, or LTXV Audio VAE Decode and Encode."),
                io.String.Output("report", display_name="report", tooltip="Which VAE it is, its device and dtype."),
            ],
            search_aliases=["nvfp4", "fp4", "ltx", "vae", "load vae", "audio vae", "vae from checkpoint"],
        )

    @classmethod
    def fingerprint_inputs(
        cls, vae_name, kind, allow_preview, config_from=SAME_FILE, dialect=AUTO, vae_prefix="", decode=EXACT
    ) -> str:
        return fingerprint((vae_name, config_from), VAE_FOLDERS, kind, allow_preview, dialect, vae_prefix, decode)

    @classmethod
    def execute(
        cls, vae_name, kind, allow_preview, config_from=SAME_FILE, dialect=AUTO, vae_prefix="", decode=EXACT
    ) -> io.NodeOutput:
        config = optional_path(config_from, VAE_FOLDERS)
        path = file_path(vae_name, VAE_FOLDERS)
        vae, report = load_vae(path, kind, allow_preview, config, dialect, vae_prefix or None, decode)
        return io.NodeOutput(vae, str(report))
