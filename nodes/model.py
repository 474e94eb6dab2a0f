"""Model loaders."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.v0_0_2 import io

from ..host.load import COMPUTE_MODES, DIALECTS, load_model
from ..kernels.backends import BACKENDS

FOLDERS = ("diffusion_models", "checkpoints")
SAME_FILE = "(the file itself)"


def model_files() -> list[str]:
    """Safetensors files of both model folders, each name once."""
    names = dict.fromkeys(name for folder in FOLDERS for name in folder_paths.get_filename_list(folder))
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]


def model_path(name: str) -> str:
    """Name from ``model_files`` -> path; FileNotFoundError if no folder has it (any more)."""
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise FileNotFoundError(f"{name} is in neither models/diffusion_models nor models/checkpoints; put it there")


class NVFP4ModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NVFP4ModelLoader",
            display_name="NVFP4 Model Loader",
            category="NVFP4",
            description="Loads an NVFP4 diffusion model of any dialect. Weights stay packed in GPU memory; each layer "
            "is dequantised on the GPU when it is used, with the result of ComfyUI's own weight-only path.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files(),
                    tooltip="From models/diffusion_models or models/checkpoints (a full checkpoint's model part).",
                ),
                io.Combo.Input(
                    "compute",
                    options=list(COMPUTE_MODES),
                    default="bf16",
                    tooltip="bf16: weight-only. Weights are dequantised, activations are left alone.",
                ),
                io.Combo.Input(
                    "dialect",
                    options=["auto", *DIALECTS],
                    default="auto",
                    tooltip="How the file lays out its NVFP4 weights. auto reads what its writer declared, and stops "
                    "with an error where that leaves a choice.",
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", *BACKENDS],
                    default="auto",
                    optional=True,
                    tooltip="What dequantises. auto: Triton where it runs, torch elsewhere; the report says why.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "config_from",
                    options=[SAME_FILE, *model_files()],
                    default=SAME_FILE,
                    optional=True,
                    tooltip="For a file whose header lost its `config`: another file of the same model version.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output("report", display_name="report")],
            search_aliases=["nvfp4", "fp4 loader", "load diffusion model nvfp4", "ltx nvfp4"],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, compute, dialect, backend="auto", config_from=SAME_FILE):
        stats = [os.stat(model_path(name)) for name in (model_name, config_from) if name not in (None, SAME_FILE)]
        return str([compute, dialect, backend, config_from, [(s.st_mtime_ns, s.st_size) for s in stats]])

    @classmethod
    def execute(cls, model_name, compute, dialect, backend="auto", config_from=SAME_FILE) -> io.NodeOutput:
        config_path = None if config_from == SAME_FILE else model_path(config_from)
        patcher, report = load_model(model_path(model_name), compute, dialect, backend, config_path)
        return io.NodeOutput(patcher, str(report))
