"""Part 8: speculative decoding. Several tokens in one step, where they were guessed right."""
