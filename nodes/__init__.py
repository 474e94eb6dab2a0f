# SPDX-License-Identifier: Apache-2.0
"""The pack's nodes, one file a family."""

from ..host.border import guarded
from .attention import NVFP4Attention
from .calibrate import NVFP4Calibrate
from .checkpoint import NVFP4Inspect, NVFP4Split
from .guard import NVFP4HostReport, NVFP4LaunchGuard
from .measure import NVFP4Compare, NVFP4Sharpness
from .model import NVFP4ModelLoader
from .plan import NVFP4DistilledSettings, NVFP4Planner
from .quantize import NVFP4Quantize
from .repair import NVFP4Repair
from .schedule import NVFP4ComputeSchedule
from .text_encoder import NVFP4TextEncoderLoader
from .vae import NVFP4VAELoader
from .verify import NVFP4Verify

NODES = [
    NVFP4ModelLoader,
    NVFP4VAELoader,
    NVFP4TextEncoderLoader,
    NVFP4Attention,
    NVFP4ComputeSchedule,
    NVFP4Inspect,
    NVFP4Split,
    NVFP4Calibrate,
    NVFP4Quantize,
    NVFP4Verify,
    NVFP4Repair,
    NVFP4DistilledSettings,
    NVFP4Planner,
    NVFP4LaunchGuard,
    NVFP4HostReport,
    NVFP4Sharpness,
    NVFP4Compare,
]
for _node in NODES:
    guarded(_node)
