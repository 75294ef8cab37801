"""python -m part02_streaming: load a model and serve it."""

from __future__ import annotations

from common import startup
from common.threads import limit_spinning

if __name__ == "__main__":  # before the imports below load torch
    startup.begin()
    limit_spinning()

from common.cli import exit_on_error, parse_config
from common.serve import is_loopback, listen, serve_app, show_url

from .config import EngineConfig
from .engine import LLM
from .server import create_app

PROG = "part02_streaming"
DESCRIPTION = """Part 2: streaming. An OpenAI-compatible API with server-sent events; still one request at a time.

  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is a KV cache?"}], "temperature": 0, "stream": true}'
"""


def serve(config: EngineConfig) -> None:
    listener = listen(config.host, config.port)
    llm = LLM(config)
    message = (
        f"serving {llm.name} on {show_url(config.host, listener.getsockname()[1])} "
        f"({llm.device}, {llm.max_model_len} tokens of context)"
    )
    app = create_app(llm, config.max_queued_requests, is_loopback(config.host))
    serve_app(app, listener, message)


def main() -> None:
    config = parse_config(EngineConfig, DESCRIPTION, prog=PROG)
    exit_on_error(PROG, lambda: serve(config))


if __name__ == "__main__":
    main()
