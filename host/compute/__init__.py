"""How a Linear, a block and a token are computed."""
