"""Processes that torchrun has started, on any machine: what it tells them, and who may talk to whom."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from common.errors import FieldError

from .config import EngineConfig


@dataclass(frozen=True, slots=True)
class Torchrun:
    """What torchrun tells its processes in their environment."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int

    @classmethod
    def from_environment(cls) -> Torchrun | None:
        """None if torchrun has not started this process."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        rank, local_rank, world_size, master_addr, master_port = (os.environ[name] for name in names)
        return cls(int(rank), int(local_rank), int(world_size), master_addr, int(master_port))

    def check(self, config: EngineConfig) -> None:
        """Raises FieldError if torchrun started another number of ranks than the engine has, and for links that anyone
        could join. What torchrun starts are the ranks of one engine core."""
        if config.data_parallel_size > 1:
            size = config.data_parallel_size
            raise FieldError("data_parallel_size", f"expected 1 under torchrun, got {size}: put a router in front")
        if self.world_size != config.num_ranks:
            raise FieldError(
                "tensor_parallel_size",
                f"{config.tensor_parallel_size} × pipeline_parallel_size {config.pipeline_parallel_size} are "
                f"{config.num_ranks} ranks, torchrun started {self.world_size}",
            )
        if config.distributed_secret is None and not self.is_loopback:
            raise FieldError(
                "distributed_secret",
                f"expected one, the same on all machines, because {self.master_addr} is not a loopback address",
            )

    @property
    def is_loopback(self) -> bool:
        """Whether all ranks are on this machine."""
        try:
            return ipaddress.ip_address(self.master_addr).is_loopback
        except ValueError:
            return self.master_addr == "localhost"


def encrypt(socket: zmq.Socket[bytes], secret: str, is_server: bool) -> None:
    """Let a socket talk only to sockets of the same secret (ZeroMQ's CURVE). Call this before bind and connect.

    Both sides derive the server's key pair and the clients' from the secret. A client that has another one cannot
    finish the handshake.
    """
    (server_public, server_private), (client_public, client_private) = (
        _key_pair(secret, role) for role in ("server", "client")
    )
    socket.curve_secretkey = server_private if is_server else client_private
    socket.curve_publickey = server_public if is_server else client_public
    if is_server:
        socket.curve_server = True
    else:
        socket.curve_serverkey = server_public


@functools.lru_cache(maxsize=8)  # scrypt takes 50 ms on purpose, against brute force
def _key_pair(secret: str, role: str) -> tuple[bytes, bytes]:
    private = z85.encode(
        hashlib.scrypt(secret.encode(), salt=f"llm-engine {role}".encode(), n=2**14, r=8, p=1, dklen=32)
    )
    return zmq.curve_public(private), private
