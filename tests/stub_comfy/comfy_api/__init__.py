"""Stand-in for ComfyUI's node API."""
