# SPDX-License-Identifier: Apache-2.0
"""Stub of the package."""
