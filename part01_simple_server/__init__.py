"""Part 1: the simplest LLM server. Flask, one request at a time, and a KV cache."""
