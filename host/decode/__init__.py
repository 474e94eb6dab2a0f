# SPDX-License-Identifier: Apache-2.0
"""LTX's video VAE decoded in channels_last_3d, chunk by chunk."""
