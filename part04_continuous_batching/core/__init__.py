"""Decides what the next step computes, and in which KV blocks. It knows no tensor and no HTTP."""
