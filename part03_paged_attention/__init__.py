"""Part 3: paged attention. A model of our own over a paged KV cache shared by a batch of requests."""
