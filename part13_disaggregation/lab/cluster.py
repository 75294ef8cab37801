"""Engines and a proxy in processes of their own, for demo and bench."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from common.serve import ListenConfig, running_app, server_process

from ..disagg.config import DisaggConfig
from ..disagg.proxy import Proxy, create_app
from ..kv_params import HEADER, SECRET_VARIABLE, sign
from ..messages import KVSource, KVTransferParams

PART = __name__.partition(".")[0]
SCRIPTED = f"{PART}.lab.scripted_engine"


@dataclass(frozen=True, slots=True)
class Cluster:
    """url: of the proxy. prefill, decode: the engines' URLs."""

    url: str
    prefill: list[str]
    decode: list[str]
    proxy: Proxy


@dataclass(frozen=True, slots=True)
class Layout:
    """num_prefill, num_decode: engines of each role; without prefill engines, all do both. flags: of all engines.
    module: what each engine runs."""

    name: str
    num_prefill: int
    num_decode: int
    flags: tuple[str, ...] = field(default=("--num-threads", "1"))
    module: str = PART

    @property
    def num_engines(self) -> int:
        return self.num_prefill + self.num_decode


@contextlib.contextmanager
def engines(layout: Layout, *flags: str, trace_dir: str | None = None) -> Iterator[tuple[list[str], str]]:
    """The URLs of a layout's engines, prefill engines first, and their secret."""
    secret = secrets.token_hex(16)
    env = {**os.environ, SECRET_VARIABLE: secret}
    flags = ("--device", "cpu", "--no-log-stats", "--kv-connector", "shm", *layout.flags, *flags)
    with contextlib.ExitStack() as stack:
        urls = list[str]()
        for number in range(layout.num_engines):
            trace = [] if trace_dir is None else ["--trace", f"{trace_dir}/{number}"]
            urls.append(stack.enter_context(server_process(layout.module, *flags, *trace, env=env)))
        yield urls, secret


@contextlib.contextmanager
def proxied(prefill: Sequence[str], decode: Sequence[str], secret: str, remote_chars: int = 1_000) -> Iterator[Cluster]:
    """A proxy, in a thread of this process, in front of engines that run already."""
    config = DisaggConfig(
        prefill_urls=",".join(prefill), decode_urls=",".join(decode), kv_transfer_secret=secret,
        remote_prefill_chars=remote_chars, policy="least_pending", max_queued_requests=4_096,
    )  # fmt: skip
    app = create_app(config, ListenConfig())
    with running_app(app) as url:
        proxy: Proxy = app.state.router
        while not all(replica.kv_sources for replica in proxy.pool.replicas):
            time.sleep(0.05)
        yield Cluster(url, list(prefill), list(decode), proxy)


@contextlib.contextmanager
def cluster(layout: Layout, *flags: str, trace_dir: str | None = None) -> Iterator[Cluster]:
    """A layout's engines, and the proxy in front."""
    with contextlib.ExitStack() as stack:
        urls, secret = stack.enter_context(engines(layout, *flags, trace_dir=trace_dir))
        yield stack.enter_context(proxied(urls[: layout.num_prefill], urls[layout.num_prefill :], secret))


def kv_header(transfer_id: str, source_url: str | None, secret: str) -> dict[str, str]:
    """What the proxy would send: to the engine that computes a prompt, and with source_url to the one that fetches."""
    sources: tuple[KVSource, ...] = ()
    if source_url is not None:
        found = httpx.get(f"{source_url}/kv_transfer", timeout=60, trust_env=False).json()["sources"]
        sources = msgspec.convert(found, tuple[KVSource, ...])
    return {HEADER: sign(KVTransferParams(transfer_id, sources), secret)}


def metrics(url: str) -> dict[str, float]:
    """Name → value, of an engine's metrics without labels."""
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
    return {
        name.removesuffix("_total"): float(value)
        for name, value in re.findall(r"^engine:(\w+) (\S+)$", text, re.MULTILINE)
    }


def reset_caches(urls: Sequence[str]) -> None:
    """Empty the prefix caches. The engines must be idle."""
    for url in urls:
        httpx.post(f"{url}/reset_prefix_cache", timeout=60, trust_env=False).raise_for_status()
