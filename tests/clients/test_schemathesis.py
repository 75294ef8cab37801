"""schemathesis reads /openapi.json and sends what it allows, and what it forbids, to every endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.serve import server_process
from tests.clients.conftest import NEWEST_PART, ROOT

pytest.importorskip("schemathesis", reason="schemathesis is not installed: make test-clients")

# Short answers of the smallest model, and a short queue: a request for 128 answers is refused instead of computed.
FLAGS = (
    "--model", "tiny-draft", "--max-model-len", "128", "--max-num-seqs", "8", "--max-queued-requests", "4",
    "--num-threads", "1", "--no-log-stats",
)  # fmt: skip


@pytest.fixture
def small_server_url() -> Iterator[str]:
    with server_process(NEWEST_PART, *FLAGS, cwd=ROOT) as url:
        yield url


def test_every_answer_is_as_described(
    small_server_url: str, run_client: Callable[..., str], tmp_path: Path
) -> None:  # fmt: skip
    """No status 5xx, no answer that the description lacks, nothing served that it forbids.

    positive_data_acceptance is left out: a description can't say which fields contradict each other.
    """
    report = tmp_path / "report.json"
    output = run_client(
        "schemathesis.cli", "run", f"{small_server_url}/openapi.json",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--generation-deterministic", "--seed", "0",
        "--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "--no-color",
        "--report", "json", "--report-json-path", str(report),
    )  # fmt: skip
    operations = json.loads(report.read_text(encoding="utf-8"))["operations"]
    assert operations["tested"] == operations["total"] > 10, f"got {operations}. {output[-1000:]}"
