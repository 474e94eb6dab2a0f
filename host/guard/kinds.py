# SPDX-License-Identifier: Apache-2.0
"""The classes of nodes that several of the guard's files speak of, and the kinds of latents."""

from __future__ import annotations

GUARD_NODE = "NVFP4LaunchGuard"
CONCAT, SEPARATE, EMPTY_AUDIO = "LTXVConcatAVLatent", "LTXVSeparateAVLatent", "LTXVEmptyLatentAudio"
UPSAMPLER, CONDITIONING = "LTXVLatentUpsampler", "LTXVConditioning"
CFG_OVERRIDE = "CFGOverride"  # on a MODEL: another cfg than the guider's, between two points of the sampling
# Nodes that make a film of pictures, and how they call its frame rate.
FILMS = {
    "CreateVideo": "fps",
    "VHS_VideoCombine": "frame_rate",
    "SaveWEBM": "fps",
    "SaveAnimatedWEBP": "fps",
    "SaveAnimatedPNG": "fps",
}
# Nodes that have width and height, and how they call the length.
SIZED = {"EmptyLTXVLatentVideo": "length", "LTXVImgToVideo": "length", "LTXVBaseSampler": "num_frames"}
ALL_LATENTS = JOINT, VIDEO, AUDIO, UNKNOWN = "joint", "video", "audio", "unknown"
