"""Weights, activations and KV cache with fewer bits."""
