# SPDX-License-Identifier: Apache-2.0
"""NVFP4 kernels in Triton: a file holds the kernel of one function of kernels/reference.py, whose name it bears."""
