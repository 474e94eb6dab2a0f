# SPDX-License-Identifier: Apache-2.0
"""Facts about the running host, and what follows from them."""
