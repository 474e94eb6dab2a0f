"""Facts about the running host, and what follows from them."""
