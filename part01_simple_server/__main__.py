"""python -m part01_simple_server: load a model and serve it."""

from __future__ import annotations

from common import startup
from common.threads import limit_spinning

if __name__ == "__main__":  # before the imports below load torch
    startup.begin()
    limit_spinning()

import signal
import socket
import sys
import threading

from werkzeug.serving import WSGIRequestHandler, make_server, select_address_family

from common.cli import exit_on_error, parse_config
from common.serve import show_url

from .config import EngineConfig
from .server import LLM, create_app

PROG = "part01_simple_server"
DESCRIPTION = """Part 1: the simplest LLM server. Flask, one request at a time, and a KV cache.

  curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is a KV cache?"}], "temperature": 0}'
"""


class RequestHandler(WSGIRequestHandler):
    timeout = 5  # seconds: a client that connects and sends nothing would block all others


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError naming the address. (On its own, werkzeug would print two lines and exit with status 1.)"""
    try:
        return socket.create_server((host, port), family=select_address_family(host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def serve(config: EngineConfig) -> None:
    listener = listen(config.host, config.port)
    llm = LLM(config)
    # One request at a time, including /health: threaded=False (the default) is this part's whole concurrency model.
    server = make_server(
        config.host, config.port, create_app(llm), request_handler=RequestHandler, fd=listener.fileno()
    )
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(
        f"serving {llm.name} on {show_url(config.host, server.port)} "
        f"({llm.device}, {llm.max_model_len} tokens of context)"
    )
    sys.stdout.flush()
    startup.end()
    server.serve_forever()


def main() -> None:
    config = parse_config(EngineConfig, DESCRIPTION, prog=PROG)
    exit_on_error(PROG, lambda: serve(config))


if __name__ == "__main__":
    main()
