"""guidellm measures the server: it finds every field that it needs in the streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ROOT

pytest.importorskip("guidellm", reason="guidellm is not installed: make test-clients")

NUM_REQUESTS, NUM_TOKENS = 4, 8


def test_four_requests(server_url: str, run_client: Callable[..., str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    spec: dict[str, Any] = {
        "backend": {"kind": "openai_http", "target": server_url, "model": "tiny"},
        "profile": {"kind": "synchronous"},
        "constraints": [{"kind": "max_requests", "count": NUM_REQUESTS}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(ROOT / "models" / "tiny")},
        "data": [{"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": NUM_TOKENS}],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    scenario = tmp_path / "scenario.json"
    scenario.write_text(json.dumps({"spec": spec}), encoding="utf-8")
    output = run_client("guidellm", "run", "--config", str(scenario), "--disable-console")
    [benchmark] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    counts = benchmark["scheduler_metrics"]["requests_made"]
    assert (counts["successful"], counts["errored"]) == (NUM_REQUESTS, 0), f"got {counts}. {output[-1000:]}"
    for request in benchmark["requests"]["successful"]:
        assert request["output_metrics"]["text_tokens"] == NUM_TOKENS, f"got {request}"
