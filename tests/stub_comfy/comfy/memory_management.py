# SPDX-License-Identifier: Apache-2.0
"""Whether DynamicVRAM is on; tests flip it with monkeypatch."""

__all__ = ["aimdo_enabled"]

aimdo_enabled = False
