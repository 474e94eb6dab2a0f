# SPDX-License-Identifier: Apache-2.0
"""Numbers of clips, machines and plans: pure functions, no ComfyUI. OpenCV and PyAV are imported where used."""
