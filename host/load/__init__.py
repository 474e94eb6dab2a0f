"""File in, MODEL, CLIP or VAE out, with a report."""
