"""Measurements of pictures and sound: pure functions, no ComfyUI. OpenCV, Pillow and PyAV are imported where used."""
