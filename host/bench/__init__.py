"""ComfyUI in a process of its own, measured."""
