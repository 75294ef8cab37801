"""python -m part15_full_architecture.router: a server in front of several replicas."""

from __future__ import annotations

import sys

from common.cli import exit_on_error, parse_configs
from common.serve import ListenConfig, listen, serve_app, show_url

from .app import Router, create_app
from .config import RouterConfig

PROG = __package__ or ""
DESCRIPTION = """A router: an OpenAI-compatible server in front of several replicas.

  python -m part15_full_architecture.router --replicas 2 -- --num-threads 1
  python -m part15_full_architecture.router --worker-urls http://10.0.0.1:8000,http://10.0.0.2:8000
"""


def serve(server: ListenConfig, config: RouterConfig, replica_flags: list[str]) -> None:
    listener = listen(server.host, server.port)
    app = create_app(config, server, replica_flags)
    message = f"routing on {show_url(server.host, listener.getsockname()[1])} ({config.policy})"
    if config.replicas:
        message += f"; {config.replicas} replicas start"
    router: Router = app.state.router
    serve_app(app, listener, message, cause_of_death=lambda: router.cause_of_death)


def start(arguments: list[str]) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own_flags, replica_flags = arguments[:place], arguments[place + 1 :]
    server, config = parse_configs((ListenConfig, RouterConfig), DESCRIPTION, PROG, own_flags)
    serve(server, config, replica_flags)


def main() -> None:
    exit_on_error(PROG, lambda: start(sys.argv[1:]))


if __name__ == "__main__":
    main()
