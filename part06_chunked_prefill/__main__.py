"""python -m <this part>: load a model and serve it."""

from __future__ import annotations

from common import startup
from common.threads import limit_spinning

if __name__ == "__main__":  # before the imports below load torch
    startup.begin()
    limit_spinning()

from common.cli import exit_on_error, parse_configs
from common.openai_app.viewer import ViewerConfig
from common.serve import ServerConfig, listen, serve_app, show_url

from . import __doc__ as PART
from .api.async_engine import AsyncLLM
from .api.server import create_app
from .config import EngineConfig

PROG = __package__
DESCRIPTION = f"""{PART}

  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is a KV cache?"}}], "temperature": 0, "stream": true}}'
"""


def serve(server: ServerConfig, config: EngineConfig, viewer: ViewerConfig) -> None:
    listener = listen(server.host, server.port)
    engine = AsyncLLM(viewer.traced(config))
    message = (
        f"serving {engine.model_name} on {show_url(server.host, listener.getsockname()[1])} "
        f"({engine.device}, context of {engine.max_model_len} tokens, {engine.num_kv_blocks - 1:,} KV blocks "
        f"of {engine.block_size} tokens, engine core in process {engine.core.process.pid})"
    )
    try:
        app = create_app(engine, server)
        viewer.add_to(app, server.api_key)
        serve_app(app, listener, message, cause_of_death=lambda: engine.cause_of_death)
    finally:
        engine.shutdown()


def main() -> None:
    server, config, viewer = parse_configs((ServerConfig, EngineConfig, ViewerConfig), DESCRIPTION, prog=PROG)
    exit_on_error(PROG, lambda: serve(server, config, viewer))


if __name__ == "__main__":
    main()
