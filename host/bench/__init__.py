# SPDX-License-Identifier: Apache-2.0
"""ComfyUI in a process of its own, measured."""
