"""Decides what the next step computes and which KV blocks it uses. It knows nothing about tensors and HTTP."""
