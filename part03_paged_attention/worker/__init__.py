"""Computes: the model, the KV cache, attention, sampling. It imports nothing of core or api."""
