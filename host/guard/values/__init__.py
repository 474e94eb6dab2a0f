# SPDX-License-Identifier: Apache-2.0
"""What the nodes of a prompt put out, as far as constants decide it: numbers, texts, sizes of pictures and latents."""
