"""deploy/: the compose file, Prometheus, its alerts, and the Grafana dashboard."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from common.cli import parse_configs
from common.serve import DRAIN_TIMEOUT_S, END_TIMEOUT_S, ListenConfig, ServerConfig, running_app
from part15_full_architecture.api.observability import ObservabilityConfig
from part15_full_architecture.config import EngineConfig
from part15_full_architecture.core.engine_core import EngineCore
from part15_full_architecture.router.app import create_app
from part15_full_architecture.router.config import RouterConfig
from tests.forked_servers import Host, until
from tests.http_checks import COMPLETIONS
from tests.process_checks import ROOT, TIMEOUT_S

PART = "part15_full_architecture"
DEPLOY = ROOT / PART / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
CONFIGS: dict[str, tuple[type[Any], ...]] = {
    PART: (ServerConfig, EngineConfig, ObservabilityConfig), f"{PART}.router": (ListenConfig, RouterConfig),
}  # fmt: skip
VARIABLE = re.compile(r"\$\{\w+(:-(?P<default>[^}]*)|:\?[^}]*)\}")
METRIC = re.compile(r"\b(?:engine|router):[a-z0-9_]+")
needs_prometheus = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus (apt: prometheus)")


def dashboard_expressions() -> dict[str, list[str]]:
    """Panel → its queries."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in dashboard["panels"]}


@pytest.mark.parametrize("name", ["replica", "router"])
def test_the_commands_of_the_compose_file(name: str) -> None:
    """Every flag exists, the key is asked for, and open requests have time to finish."""
    python, minus_m, module, *flags = (
        VARIABLE.sub(lambda found: found["default"] or "key", part) for part in SERVICES[name]["command"]
    )
    assert (python, minus_m) == ("python", "-m")
    server, *_ = parse_configs(CONFIGS[module], "", name, flags)
    assert (server.host, server.port, server.api_key) == ("0.0.0.0", 8000, "key"), f"{name}: got {server}"
    grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert grace_s > DRAIN_TIMEOUT_S + END_TIMEOUT_S, f"{name}: SIGKILL comes after {grace_s} s"


def test_services_find_each_other() -> None:
    flags = {name: " ".join(SERVICES[name]["command"]) for name in ("replica", "router")}
    assert "--worker-dns=http://replica:8000" in flags["router"] and "redis://redis:6379" in flags["replica"]
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    engine, router = prometheus["scrape_configs"]
    assert engine["dns_sd_configs"][0]["names"] == ["replica"] and router["static_configs"][0]["targets"] == [
        "router:8000"
    ]
    datasource = yaml.safe_load((DEPLOY / "grafana" / "datasource.yml").read_text())["datasources"][0]
    assert datasource["url"] == "http://prometheus:9090"
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
    used = {panel["datasource"]["uid"] for panel in panels}
    assert used == {datasource["uid"]}, f"panels use the data sources {used}, there is {datasource['uid']}"


def test_what_the_compose_file_mounts_exists() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            if volume.split(":")[0] in COMPOSE["volumes"]:
                continue
            path = DEPLOY / volume.split(":")[0]
            assert path.is_file(), f"{name} mounts {path}, which does not exist"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} would be reachable from outside"
        if "build" in service:
            folder = DEPLOY / service["build"]["context"]
            assert (folder / service["build"]["dockerfile"]).is_file(), f"{name}: no {service['build']['dockerfile']}"


@needs_prometheus
@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
)
def test_promtool_accepts_the_configuration_and_the_alerts(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=DEPLOY, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_explained() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    page = (ROOT / PART / "OPERATIONS.md").read_text()
    for rule in (rule for group in groups for rule in group["rules"]):
        assert f"| `{rule['alert']}` |" in page, f"OPERATIONS.md does not say what to do about {rule['alert']}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metrics_of(url: str) -> set[str]:
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S, trust_env=False).text
    return set(METRIC.findall("\n".join(line for line in text.splitlines() if not line.startswith("#"))))


def test_dashboard_and_alerts_use_metrics_that_exist(host: Host, tmp_path: Path) -> None:
    server = host.serve(PART)
    app = create_app(RouterConfig(worker_urls=server.url), ListenConfig(), [])
    body = {"prompt": "What is a KV cache?", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with running_app(app) as router_url:
        until(lambda: httpx.get(f"{router_url}/health", trust_env=False).status_code == 200, "the router to find it")
        assert httpx.post(router_url + COMPLETIONS, json=body, timeout=TIMEOUT_S, trust_env=False).status_code == 200
        known = metrics_of(server.url) | metrics_of(router_url)
        texts = {**dashboard_expressions(), "alerts": [(DEPLOY / "alerts.yml").read_text()]}
        for where, expressions in texts.items():
            unknown = set(METRIC.findall(" ".join(expressions))) - known
            assert not unknown, f"{where}: /metrics of engine and router have no {sorted(unknown)}"
        if shutil.which("prometheus") is not None:
            check_queries(tmp_path, server.url, router_url)
    server.host.ask(end=True)


def check_queries(directory: Path, *targets: str) -> None:
    """A real Prometheus scrapes them; each query of the dashboard has a result there, or is a share of nothing."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "1s", "scrape_timeout": "200ms"}
    for job, target in zip(config["scrape_configs"], targets, strict=True):
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    path, port = directory / "prometheus.yml", free_port()
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={directory / 'data'}",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_ready(url), "Prometheus to be ready")
        for panel, expressions in dashboard_expressions().items():
            for expression in expressions:
                until(lambda expression=expression: query(url, expression), f"{panel}: a result of {expression}")
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def is_ready(prometheus_url: str) -> bool:
    """It answers 503 in plain text while it reads its data."""
    try:
        return httpx.get(f"{prometheus_url}/-/ready", timeout=TIMEOUT_S, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def query(prometheus_url: str, expression: str) -> list[Any]:
    response = httpx.get(
        f"{prometheus_url}/api/v1/query", params={"query": expression}, timeout=TIMEOUT_S, trust_env=False
    )
    assert response.status_code == 200, f"{expression}: {response.text}"
    found: list[Any] = response.json()["data"]["result"]
    return found


def test_the_router_counts_requests_that_it_refuses() -> None:
    app = create_app(RouterConfig(worker_urls=f"http://127.0.0.1:{free_port()}"), ListenConfig(), [])
    with running_app(app) as url:
        refused = httpx.post(url + COMPLETIONS, json={"prompt": "A"}, timeout=TIMEOUT_S, trust_env=False)
        text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S, trust_env=False).text
    assert refused.status_code == 503, refused.text
    for line in ('router:requests_refused_total{status="503"} 1.0', 'router:requests_refused_total{status="429"} 0.0'):
        assert line in text, f"expected {line} in /metrics. See router/app.py::RoutedResponse"


def test_the_router_measures_the_queue_time_of_requests_that_had_their_turn() -> None:
    """A request that is refused at once would make the queue look short."""
    config = RouterConfig(worker_urls=f"http://127.0.0.1:{free_port()}", max_queued_requests=0)
    app = create_app(config, ListenConfig(), [])
    queue = app.state.router.pool.queue
    with running_app(app) as url:
        for num_running, status, count in ((queue.max_running, 429, 0), (0, 503, 1)):
            queue.num_running = num_running
            answer = httpx.post(url + COMPLETIONS, json={"prompt": "A"}, timeout=TIMEOUT_S, trust_env=False)
            text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S, trust_env=False).text
            assert answer.status_code == status, answer.text
            line = f"router:request_queue_time_seconds_count {count}.0"
            assert line in text, (
                f"after status {status}, expected {line} in /metrics. See router/app.py::RoutedResponse"
            )


def test_a_failed_step_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    engine = SimpleNamespace(step=fail, fail=lambda error: [], lockstep=None, num_failures=1)
    core = EngineCore(engine, requests=None, outputs=None)  # type: ignore[arg-type]
    assert core.step() == []
    (record,) = caplog.records
    assert record.exc_info is not None and "no such kernel" in caplog.text, "OPERATIONS.md promises the cause"
