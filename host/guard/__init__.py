# SPDX-License-Identifier: Apache-2.0
"""A prompt and facts in, findings out; and where they speak."""
