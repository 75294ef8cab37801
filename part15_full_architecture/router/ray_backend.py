"""Replicas on the machines of a Ray cluster: Ray finds a node that has the resources. Needs `pip install ray`, and the
course installed on every node."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from common.errors import FieldError

from .config import RouterConfig
from .processes import END_TIMEOUT_S, START_TIMEOUT_S, ReplicaProcess, Start

try:
    import ray
except ImportError:
    ray = None

CONNECT_TIMEOUT_S = 10.0


class ReplicaActor:
    """Runs on a node of the cluster, and holds one server there. If the actor ends, the server does: Linux sends it
    SIGTERM when the thread that started it ends, and an actor's event loop has one thread as long as the actor lives.
    """

    async def start(self, flags: list[str]) -> str:
        """Returns the server's URL: it listens on its node's address."""
        self.server = await ReplicaProcess.start(flags, ray.util.get_node_ip_address())
        return self.server.url

    async def wait(self) -> str:
        return await self.server.wait()

    async def stop(self, timeout_s: float) -> None:
        await self.server.stop(timeout_s)


class RayReplica:
    """A server that an actor holds."""

    def __init__(self, actor: Any, url: str) -> None:
        self.actor, self.url = actor, url

    @classmethod
    async def start(cls, flags: Sequence[str], cpus: float, gpus: float) -> RayReplica:
        """Raises OSError if no node has room for START_TIMEOUT_S, or if the server does not start."""
        options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD", "max_concurrency": 8}
        actor = ray.remote(ReplicaActor).options(**options).remote()
        try:
            await asyncio.wait_for(actor.__ray_ready__.remote(), START_TIMEOUT_S)
            return cls(actor, await actor.start.remote(list(flags)))
        except BaseException as error:
            ray.kill(actor)
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, OSError):
                raise error.cause from None
            if isinstance(error, ray.exceptions.RayError):
                raise OSError(f"Ray did not start a replica: {_last_line(error)}") from error
            if isinstance(error, asyncio.TimeoutError):
                raise OSError(f"no node of the Ray cluster has room for {cpus:g} CPUs and {gpus:g} GPUs") from error
            raise

    async def wait(self) -> str:
        """An actor that is lost, with its node or alone, is a replica that has ended. (Ray could restart the actor
        itself, but its server would have another URL.) One that has lost its server is ended: it still has its CPUs
        and GPUs."""
        try:
            how = await self.actor.wait.remote()
        except ray.exceptions.RayError as error:
            return f"was lost with its actor: {str(error).splitlines()[0]}"
        ray.kill(self.actor)
        return how

    async def stop(self, timeout_s: float = END_TIMEOUT_S) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # it is lost already
            await self.actor.stop.remote(timeout_s)
        ray.kill(self.actor)


def connect(config: RouterConfig) -> Start:
    """Join the cluster at ray_address. Raises FieldError if there is none."""
    if ray is None:
        raise FieldError("replica_backend", "ray is not installed: pip install ray")
    try:
        _check_reachable(config.ray_address)
        ray.init(config.ray_address, log_to_driver=False, logging_level="WARNING", ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FieldError("ray_address", f"no Ray cluster at {config.ray_address}: {_last_line(error)}") from error
    return functools.partial(RayReplica.start, cpus=config.replica_cpus, gpus=config.replica_gpus)


def _check_reachable(address: str) -> None:
    """Raises OSError or ValueError. Ray itself would try again and again for minutes."""
    if address != "auto":
        parts = urlsplit(f"//{address}")
        if not parts.hostname or not parts.port:
            raise ValueError("expected auto or host:port")
        socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()


def _last_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]
