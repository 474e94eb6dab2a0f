# SPDX-License-Identifier: Apache-2.0
"""Every rule of the guard. A rule is a function: the view of a prompt in, findings out, with reason and remedy.

A rule speaks only of what it knows: a value that another node computes, a file that is not there, a fact that the host
does not tell give no finding.
"""

from __future__ import annotations

from .rules_clip import audio_length, frame_rates, frames, size
from .rules_files import unmade
from .rules_host import audio_dtype, replaced_noise, replaced_sampling
from .rules_joint import batches, old_model, swapped_streams, uncropped_guides, untold_rate
from .rules_model import distilled, no_audio_latent, prefetch_crash, slow_nvfp4
from .rules_tiles import tiles
from .rules_vae import confused_vaes, other_versions, wrong_vae

RULES = (
    unmade, prefetch_crash, no_audio_latent, old_model, wrong_vae, confused_vaes, other_versions, swapped_streams,
    batches, uncropped_guides, slow_nvfp4, distilled, frames, size, frame_rates, untold_rate, audio_length, tiles,
    replaced_noise, replaced_sampling, audio_dtype,
)  # fmt: skip
