"""Part 2: streaming. An OpenAI-compatible API on FastAPI and server-sent events, one request at a time."""
