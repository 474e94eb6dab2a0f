# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with true names and random weights: what demo, bench and tests make files from."""
