# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: their bytes, what they are, new ones from old ones, whether they are right. No ComfyUI."""
