"""Part 8: speculative decoding. A step produces several tokens for a request if its draft tokens are accepted."""
