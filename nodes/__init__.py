"""The pack's nodes, one file a family."""

from .model import NVFP4ModelLoader

NODES = [NVFP4ModelLoader]
