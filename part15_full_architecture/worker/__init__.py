"""Computes: the model, the KV cache, attention, sampling. It imports nothing from core or api."""
