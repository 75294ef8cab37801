"""python -m part15_full_architecture.disagg: a proxy in front of prefill and decode engines."""

from __future__ import annotations

import sys

from common.cli import exit_on_error, parse_configs
from common.serve import ListenConfig, listen, serve_app, show_url

from .config import DisaggConfig
from .proxy import Proxy, create_app

PROG = __package__ or ""
DESCRIPTION = """A proxy: an OpenAI-compatible server in front of prefill engines and decode engines.

  python -m part15_full_architecture.disagg --prefill 1 --decode 2 -- --num-threads 1
  python -m part15_full_architecture.disagg --prefill-urls http://10.0.0.1:8000 --decode-urls http://10.0.0.2:8000
"""


def serve(server: ListenConfig, config: DisaggConfig, engine_flags: list[str]) -> None:
    listener = listen(server.host, server.port)
    app = create_app(config, server, engine_flags)
    message = f"routing on {show_url(server.host, listener.getsockname()[1])} ({config.policy})"
    if config.num_to_start:
        message += f"; {config.prefill} prefill and {config.decode} decode engines start"
    proxy: Proxy = app.state.router
    serve_app(app, listener, message, cause_of_death=lambda: proxy.cause_of_death)


def start(arguments: list[str]) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own_flags, engine_flags = arguments[:place], arguments[place + 1 :]
    server, config = parse_configs((ListenConfig, DisaggConfig), DESCRIPTION, PROG, own_flags)
    serve(server, config, engine_flags)


def main() -> None:
    exit_on_error(PROG, lambda: start(sys.argv[1:]))


if __name__ == "__main__":
    main()
