"""The pack's nodes, one file a family."""

from .checkpoint import NVFP4Inspect, NVFP4Split
from .measure import NVFP4Compare, NVFP4Sharpness
from .model import NVFP4ModelLoader
from .vae import NVFP4VAELoader

NODES = [NVFP4ModelLoader, NVFP4VAELoader, NVFP4Inspect, NVFP4Split, NVFP4Sharpness, NVFP4Compare]
