"""python -m part07_prefix_caching: load a model and serve it."""

from __future__ import annotations

from common.threads import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before the imports below load torch

from common.cli import exit_on_error, parse_config
from common.serve import listen, serve_app

from .api.async_engine import AsyncLLM
from .api.server import create_app
from .config import EngineConfig

PROG = "part07_prefix_caching"
DESCRIPTION = """Part 7: prefix caching. What was computed once is found again.

  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is a KV cache?"}], "temperature": 0, "stream": true}'
"""


def serve(config: EngineConfig) -> None:
    listener = listen(config.host, config.port)
    engine = AsyncLLM(config)
    message = (
        f"serving {engine.model_name} on http://{config.host}:{listener.getsockname()[1]} "
        f"({engine.device}, {engine.max_model_len} tokens of context, {engine.num_kv_blocks - 1:,} KV blocks "
        f"of {engine.block_size} tokens, engine core in process {engine.core.process.pid})"
    )
    try:
        serve_app(create_app(engine, config), listener, message, cause_of_death=lambda: engine.cause_of_death)
    finally:
        engine.shutdown()


def main() -> None:
    config = parse_config(EngineConfig, DESCRIPTION, prog=PROG)
    exit_on_error(PROG, lambda: serve(config))


if __name__ == "__main__":
    main()
