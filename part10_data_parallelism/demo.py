"""python -m part10_data_parallelism.demo: policies compared, a replica killed, a new version rolled out."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.live import Live
from rich.table import Table

from common.checkpoint import MODELS_DIR
from common.cli import exit_on_error, option, parse_config
from common.load_client import LoadConfig, run_load
from common.load_report import LoadReport
from common.serve import ListenConfig, running_app

from .lab.replicas import num_running, prompt_tokens, reset_caches
from .lab.tenants import Tenants, as_chats
from .router.app import Router, create_app
from .router.config import RouterConfig
from .router.policies import POLICIES
from .router.replica import Replica

PROG = f"{__package__}.demo"
KEY, POLL_S = "demo", 0.1
TENANTS = Tenants(num_tenants=8, zipf=0.0, system_chars=3_000, own_chars=100, max_tokens=16, is_heavy_tailed=False)
NUM_REQUESTS, NUM_STREAMS = 48, 8
STREAMS = Tenants(num_tenants=1, system_chars=40, own_chars=40, max_tokens=400, is_heavy_tailed=False)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    num_kv_blocks: int = option(220, "of each replica: enough for about two thirds of the tenants' system prompts", 200)


def load(url: str, tenants: Tenants, num_requests: int, max_concurrency: int, seed: int = 0) -> LoadReport:
    config = LoadConfig(url, "tiny", api_key=KEY, max_concurrency=max_concurrency)
    return asyncio.run(run_load(config, as_chats(tenants.requests(num_requests, seed))))


def compare_policies(console: Console, urls: list[str]) -> None:
    console.rule("1. Policies")
    console.print(
        f"{TENANTS.num_tenants} tenants, each with its own system prompt, send {NUM_REQUESTS} requests to two "
        "replicas, 8 at a time. A replica's KV cache has room for about two thirds of the system prompts.\n",
        highlight=False,
    )  # fmt: skip
    table = Table("policy", "hit rate", "prompt tokens computed", "TTFT p50", "TTFT p99", "requests")
    with Live(table, console=console, auto_refresh=False) as live:
        for policy in POLICIES:
            reset_caches(urls)
            before = prompt_tokens(urls)
            app = create_app(RouterConfig(worker_urls=",".join(urls), policy=policy), ListenConfig(api_key=KEY))
            with running_app(app) as url:
                report = load(url, TENANTS, NUM_REQUESTS, 8)
            assert report.num_completed == NUM_REQUESTS and report.ttft_s is not None
            queried, computed = (after - b for after, b in zip(prompt_tokens(urls), before, strict=True))
            counts = [replica.num_requests for replica in app.state.router.pool.replicas]
            table.add_row(
                policy, f"{1 - computed / queried:.0%}", f"{computed:,.0f}", f"{1e3 * report.ttft_s.p50:.0f} ms",
                f"{1e3 * report.ttft_s.p99:.0f} ms", " + ".join(map(str, counts)),
            )  # fmt: skip
            live.refresh()
    console.print()


class Watch:
    """A live table of the router's replicas; they are numbered as they come."""

    def __init__(self, console: Console, router: Router) -> None:
        self.router, self.numbers = router, dict[Replica, int]()
        self.live = Live(console=console, auto_refresh=False)

    def update(self) -> None:
        table = Table("replica", "state", "requests now", "requests so far", "failures")
        for replica in self.router.pool.replicas:
            number = self.numbers.setdefault(replica, len(self.numbers) + 1)
            state = "draining" if replica.is_draining else "serving" if replica.is_available else "not available"
            counts = (replica.num_pending, replica.num_requests, replica.num_failures)
            table.add_row(str(number), state, *map(str, counts))
        self.live.update(table, refresh=True)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            time.sleep(POLL_S)
            self.update()


def kill_one(console: Console, router: Router, url: str, watch: Watch) -> None:
    console.rule("2. A replica is killed")
    console.print(f"{NUM_STREAMS} streams run on two replicas, and one replica gets SIGKILL.\n", highlight=False)
    replicas = router.pool.replicas
    with ThreadPoolExecutor(1) as threads, watch.live:
        running = threads.submit(load, url, STREAMS, NUM_STREAMS, NUM_STREAMS)
        watch.until(lambda: all(num_running(replica.url) == NUM_STREAMS // 2 for replica in replicas))
        victim = replicas[0]
        os.kill(router.fleet.started[victim].process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        report = running.result()
        after = load(url, STREAMS, 4, 4)
        watch.until(lambda: victim not in replicas and len(replicas) == 2)
        watch.update()
    console.print()
    [error] = {result.error.message for result in report.results if result.error is not None}
    reason = error.removeprefix(victim.url)
    console.print(f"{report.num_completed} streams ended normally, {report.num_failed} with an error event: …{reason}")
    console.print(f"{after.num_completed} new requests were answered meanwhile. Another replica was started.\n")


def roll_out(console: Console, router: Router, url: str, watch: Watch, model: Path) -> None:
    console.rule("3. A new version")
    console.print("Four clients send requests all the time while a new version of the model is rolled out.\n")
    old = list(router.pool.replicas)
    with ThreadPoolExecutor(1) as threads, watch.live:
        body = {"model": str(model)}
        headers = {"Authorization": f"Bearer {KEY}"}
        rolling = threads.submit(httpx.post, f"{url}/rollout", json=body, headers=headers, timeout=600, trust_env=False)
        num_completed = num_failed = 0
        while not rolling.done():
            report = load(url, TENANTS, 8, 4)
            num_completed, num_failed = num_completed + report.num_completed, num_failed + report.num_failed
            watch.update()
        rolling.result().raise_for_status()
    console.print()
    assert not set(old) & set(router.pool.replicas)
    console.print(f"{num_completed} requests were answered, {num_failed} failed. Both replicas have the new version.")


def run(config: DemoConfig) -> None:
    console = Console()
    flags = ["--device", "cpu", "--num-threads", "1", "--num-kv-blocks", str(config.num_kv_blocks), "--no-log-stats"]
    app = create_app(RouterConfig(replicas=2, policy="least_pending"), ListenConfig(api_key=KEY), flags)
    router: Router = app.state.router
    with tempfile.TemporaryDirectory() as folder, running_app(app) as url:
        while len(router.pool.replicas) < 2:
            time.sleep(POLL_S)
            if router.cause_of_death is not None:
                raise OSError(router.cause_of_death)
        compare_policies(console, [replica.url for replica in router.pool.replicas])
        watch = Watch(console, router)
        kill_one(console, router, url, watch)
        new_version = Path(folder) / "tiny-v2"
        new_version.symlink_to(MODELS_DIR / "tiny")
        roll_out(console, router, url, watch, new_version)


def main() -> None:
    config = parse_config(DemoConfig, __doc__ or "", prog=PROG)
    exit_on_error(PROG, lambda: run(config))


if __name__ == "__main__":
    main()
