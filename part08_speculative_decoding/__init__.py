"""Part 8: speculative decoding. Several tokens in one step, where draft tokens are accepted."""
