# SPDX-License-Identifier: Apache-2.0
"""NVFP4 Video: ComfyUI nodes for NVFP4 video models."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .host.guard import routes
from .nodes import NODES

WEB_DIRECTORY = "./web"


class NVFP4VideoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> NVFP4VideoExtension:
    # Here and not in on_load, which ComfyUI 0.12 does not call.
    routes.start()
    return NVFP4VideoExtension()
