# SPDX-License-Identifier: Apache-2.0
"""File in, MODEL, CLIP or VAE out, with a report."""

from .model import load_model

__all__ = ["load_model"]
