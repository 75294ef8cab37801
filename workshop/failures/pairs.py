"""Part 13's engines with the proxy in front of them, each in a process of its own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from part13_disaggregation.kv_params import SECRET_VARIABLE
from workshop.failures.checks import until
from workshop.failures.clients import ask
from workshop.failures.lab import Lab
from workshop.failures.servers import Server

PART = "part13_disaggregation"
FLAGS = ("--num-threads", "1", "--device", "cpu", "--no-log-stats", "--model", "tiny", "--num-kv-blocks", "300",
         "--kv-connector", "shm")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cluster:
    """proxy: what clients ask. prefill: the one prefill engine."""

    proxy: Server
    prefill: Server
    decode: list[Server]


def start_cluster(lab: Lab, num_decode: int, flags: Sequence[str], prefill_flags: Sequence[str] = ()) -> Cluster:
    """One prefill engine, some decode engines, and a proxy that sends every prompt to the prefill engine first.

    flags: of all engines.
    """
    env = {SECRET_VARIABLE: secrets.token_hex(16)}
    prefill = lab.start(PART, *FLAGS, *flags, *prefill_flags, **env)
    decode = [lab.start(PART, *FLAGS, *flags, **env) for _ in range(num_decode)]
    lab.wait_until_ready()
    proxy = lab.start(
        f"{PART}.disagg", "--prefill-urls", prefill.url, "--decode-urls", ",".join(server.url for server in decode),
        "--policy", "round_robin", "--remote-prefill-chars", "0", **env,
    )  # fmt: skip
    lab.wait_until_ready()

    def is_ready() -> bool:
        """Whether it has asked the engines where their KV can be fetched. Until then, it uses decode engines only."""
        ask(proxy.url, "Hi", 1)
        return proxy.metrics()["remote_prefills"] >= 2 * num_decode

    until(is_ready, f"{proxy.url} to use the prefill engine")
    return Cluster(proxy, prefill, decode)
