"""Part 4: continuous batching. The batch is decided anew before every step."""
