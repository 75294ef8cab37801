"""docs/kubernetes: the files follow Kubernetes' schemas, name each other correctly, and fit part 10's commands."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from common.serve import DRAIN_TIMEOUT_S, END_TIMEOUT_S
from tests.clients.conftest import ROOT, TIMEOUT_S

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed: make test-clients"
)

VERSION = "1.37"
FOLDER = ROOT / "docs" / "kubernetes"
FILES = ("replicas.yaml", "router.yaml")


def objects_of(file: str) -> dict[str, dict[str, Any]]:
    """Each by its kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8"))}


def container_of(file: str) -> dict[str, Any]:
    [container] = objects_of(file)["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def flags_of(file: str) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in container_of(file)["args"])


@pytest.mark.parametrize("file", FILES)
def test_schema(file: str) -> None:
    objects = objects_of(file)
    assert set(objects) == {"Deployment", "Service"}, f"{file}: got {list(objects)}"
    for each in objects.values():
        kubernetes_validate.validate(each, VERSION, strict=True)


def test_the_check_is_strict() -> None:
    deployment = objects_of("replicas.yaml")["Deployment"]
    deployment["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


@pytest.mark.parametrize("file", FILES)
def test_selectors_and_ports(file: str) -> None:
    deployment, service = objects_of(file)["Deployment"]["spec"], objects_of(file)["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == service["selector"] == labels, f"{file}: the pods have {labels}"
    [container_port], [service_port] = container_of(file)["ports"], service["ports"]
    assert flags_of(file)["--port"] == str(container_port["containerPort"]), file
    target = service_port.get("targetPort", service_port["port"])
    assert target in (container_port["name"], container_port["containerPort"]), f"{file}: {target}"
    for probe in ("readinessProbe", "livenessProbe"):
        assert container_of(file)[probe]["httpGet"]["port"] == container_port["name"], f"{file}: {probe}"


def test_the_router_looks_up_the_headless_service() -> None:
    service = objects_of("replicas.yaml")["Service"]
    assert service["spec"]["clusterIP"] == "None"
    url, [port] = urlsplit(flags_of("router.yaml")["--worker-dns"]), service["spec"]["ports"]
    assert (url.scheme, url.hostname, url.port) == ("http", service["metadata"]["name"], port["port"])


@pytest.mark.parametrize("file", FILES)
def test_flags_and_the_key(file: str) -> None:
    container = container_of(file)
    command = [sys.executable, *container["command"][1:], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    for flag in flags_of(file):
        assert f"\n  {flag} " in done.stdout, f"{file}: {flag} is no flag of {container['command']}"
    [variable] = container["env"]
    assert flags_of(file)["--api-key"] == f"$({variable['name']})", f"{file}: the key comes from the Secret"
    assert variable["valueFrom"]["secretKeyRef"]["name"] == "llm-api-key", f"{file}: got {variable}"


@pytest.mark.parametrize("file", FILES)
def test_open_requests_have_time_to_finish(file: str) -> None:
    grace_s = objects_of(file)["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    needed_s = container_of(file)["lifecycle"]["preStop"]["sleep"]["seconds"] + DRAIN_TIMEOUT_S + END_TIMEOUT_S
    assert grace_s > needed_s, f"{file}: SIGKILL comes after {grace_s} s, and the server may need {needed_s} s"
