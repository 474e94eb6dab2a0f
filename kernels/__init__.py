# SPDX-License-Identifier: Apache-2.0
"""NVFP4 numerics on tensors: no files, no ComfyUI."""
