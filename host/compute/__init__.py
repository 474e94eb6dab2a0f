# SPDX-License-Identifier: Apache-2.0
"""How a Linear, a block and a token are computed."""
