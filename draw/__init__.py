# SPDX-License-Identifier: Apache-2.0
"""Every picture, drawn of what checkpoint/ and measure/ found. Pillow is imported here alone."""
