"""Part 4: continuous batching. Before every step it is decided anew who is in it."""
