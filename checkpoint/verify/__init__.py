"""Whether a quantised file is right, against its source."""
