# SPDX-License-Identifier: Apache-2.0
"""Whether a quantised file is right, against its source."""
