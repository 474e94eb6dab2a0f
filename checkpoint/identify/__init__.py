# SPDX-License-Identifier: Apache-2.0
"""What a file is, from its header: model, components, dialect, VAE, text encoder, faults."""
