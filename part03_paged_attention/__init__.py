"""Part 3: paged attention. Our own model over a paged KV cache that a batch of requests shares."""
