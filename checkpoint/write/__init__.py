# SPDX-License-Identifier: Apache-2.0
"""New files from old ones: split, repaired, restored, quantised."""
