"""Part 6: chunked prefill. Long prompts go through the engine in pieces, and nobody waits for them."""
