"""python -m <this part>: load a model and serve it."""

from __future__ import annotations

import sys

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
from .api.observability import ObservabilityConfig, observed
from .api.server import create_app
from .config import EngineConfig
from .disagg import __main__ as proxy
from .kernel_names import show_kernels
from .preset import names, take_preset
from .router import __main__ as router
from .torchrun import Torchrun
from .worker.rank_process import run_torchrun_rank

PROG = __package__
DESCRIPTION = f"""{PART}

  curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is a KV cache?"}}], "temperature": 0, "stream": true}}'

Deployments that start with one flag, --preset NAME; further flags are added to the preset's:
  {", ".join(names())}
"""


def serve(
    server: ServerConfig, config: EngineConfig, viewer: ViewerConfig, observability: ObservabilityConfig
) -> None:  # fmt: skip
    listener = listen(server.host, server.port)
    engine = AsyncLLM(viewer.traced(config))
    cores = ", ".join(str(process.pid) for process in engine.core.processes)
    message = (
        f"serving {engine.model_name} on {show_url(server.host, listener.getsockname()[1])} "
        f"({engine.device}, context of {engine.max_model_len} tokens, {engine.num_kv_blocks - 1:,} KV blocks "
        f"of {engine.block_size} tokens, engine core in process {cores}; kernels: {show_kernels(engine.kernels)})"
    )
    try:
        with observed(engine, observability):
            app = create_app(engine, server)
            viewer.add_to(app, server.api_key)
            serve_app(app, listener, message, cause_of_death=lambda: engine.cause_of_death)
    finally:
        engine.shutdown()


def start_engine(argv: list[str]) -> None:
    configs = (ServerConfig, EngineConfig, ViewerConfig, ObservabilityConfig)
    server, config, viewer, observability = parse_configs(configs, DESCRIPTION, PROG, argv)
    torchrun = Torchrun.from_environment()
    if torchrun is not None:
        torchrun.check(config)
    if torchrun is not None and torchrun.rank > 0:
        run_torchrun_rank(torchrun, viewer.traced(config))  # for a trace, the ranks measure their own times
    else:
        serve(server, config, viewer, observability)


def start(argv: list[str]) -> None:
    preset, flags = take_preset(argv)
    if preset is None:
        start_engine(flags)
    else:
        starts = {"engine": start_engine, "router": router.start, "proxy": proxy.start}
        starts[preset.starts](preset.command_line(flags))


def main() -> None:
    exit_on_error(PROG, lambda: start(sys.argv[1:]))


if __name__ == "__main__":
    main()
