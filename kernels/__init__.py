"""NVFP4 numerics on tensors: no files, no ComfyUI."""
