"""Stand-in for the host's model code."""
