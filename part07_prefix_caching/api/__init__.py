"""Speaks with clients: HTTP, text, streams. It knows no block and no tensor."""
