"""Part 3: paged attention. A model of our own over a paged KV cache, which a batch of requests shares."""
