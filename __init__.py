"""NVFP4 Video: ComfyUI nodes for NVFP4 video models."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"


class NVFP4VideoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> NVFP4VideoExtension:
    return NVFP4VideoExtension()
