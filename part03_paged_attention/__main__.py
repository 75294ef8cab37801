"""python -m part03_paged_attention: load a model and serve it."""

from __future__ import annotations

from common.threads import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before the imports below load torch

from common.cli import exit_on_error, parse_config
from common.serve import listen, serve_app, single_threaded

from .api.server import create_app
from .config import EngineConfig
from .core.engine import LLMEngine

PROG = "part03_paged_attention"
DESCRIPTION = """Part 3: paged attention. A model of our own over a paged KV cache; static batches.

  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is a KV cache?"}], "temperature": 0, "stream": true}'
"""


def serve(config: EngineConfig) -> None:
    listener = listen(config.host, config.port)
    with single_threaded():  # the steps run in the engine's thread
        engine = LLMEngine(config)
    message = (
        f"serving {engine.model_name} on http://{config.host}:{listener.getsockname()[1]} "
        f"({engine.device}, {engine.max_model_len} tokens of context, {engine.blocks.num_blocks - 1:,} KV blocks "
        f"of {engine.blocks.block_size} tokens)"
    )
    serve_app(create_app(engine, config), listener, message)


def main() -> None:
    config = parse_config(EngineConfig, DESCRIPTION, prog=PROG)
    exit_on_error(PROG, lambda: serve(config))


if __name__ == "__main__":
    main()
