# SPDX-License-Identifier: Apache-2.0
"""Bytes: headers, tensors, shards, files that survive a kill. Knows no dialect and no model."""
