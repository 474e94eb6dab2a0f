"""Checkpoint files on disk: headers, dialects, signatures. No ComfyUI."""
