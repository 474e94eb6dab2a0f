"""A prompt and facts in, findings out; and where they speak."""
