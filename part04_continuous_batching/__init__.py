"""Part 4: continuous batching. The scheduler forms a new batch before every step."""
