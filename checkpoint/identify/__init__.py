"""What a file is, from its header: model, components, dialect, VAE, text encoder, faults."""
