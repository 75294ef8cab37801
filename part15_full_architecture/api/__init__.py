"""Talks to clients: HTTP, text, streams. It knows nothing about blocks and tensors."""
