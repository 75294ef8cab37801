"""The results of a load run: one result per request, and a summary of all."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from common.stats import Summary, summarize


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request failed. status: the HTTP status, or the code of an error in the stream, or None."""

    status: int | None
    message: str


@dataclass(slots=True)
class RequestResult:
    """The result of one request. It is filled in while the reply arrives, so a failed request keeps what it received.

    start_s: when it was sent, in seconds after the run's start. content_times_s: when each piece of content arrived, in
    seconds after start_s; if no token had text, the time of the finish reason. e2e_s: when the reply ended. The token
    counts come from the server: None until it has sent them.
    """

    request_id: str
    start_s: float
    content_times_s: list[float] = field(default_factory=list)
    e2e_s: float | None = None
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: RequestError | None = None
    cancelled: bool = False

    @property
    def completed(self) -> bool:
        return self.error is None and not self.cancelled

    @property
    def ttft_s(self) -> float | None:
        """Time to the first content; None if there was none."""
        return self.content_times_s[0] if self.content_times_s else None

    @property
    def itl_s(self) -> list[float]:
        """Times between one piece of content and the next."""
        return [later - earlier for earlier, later in pairwise(self.content_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for a reply of one token or one that did not complete."""
        if self.e2e_s is None or self.ttft_s is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A whole run. Rates and summaries cover completed requests only; a summary of no values is None.

    duration_s: from the run's start to the end of the last request. goodput_requests_per_s: completed requests that
    met the SLOs, per second; None if the config sets none.
    """

    duration_s: float
    num_completed: int
    num_failed: int
    num_cancelled: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_requests_per_s: float | None
    ttft_s: Summary | None
    itl_s: Summary | None
    tpot_s: Summary | None
    e2e_s: Summary | None
    results: list[RequestResult]

    def measurements(self) -> dict[str, Any]:
        """The report without its results, as plain values for a result file."""
        values = asdict(self)
        del values["results"]
        return values


def aggregate(
    results: Sequence[RequestResult],
    duration_s: float,
    *,
    ttft_slo_s: float | None = None,
    tpot_slo_s: float | None = None,
) -> LoadReport:
    """Count and summarize. A reply of one token has no TPOT, so it cannot miss that limit."""
    done = [result for result in results if result.completed]
    prompt_tokens = sum(result.prompt_tokens or 0 for result in done)
    output_tokens = sum(result.output_tokens or 0 for result in done)
    good = sum(_meets(r.ttft_s, ttft_slo_s) and _meets(r.tpot_s, tpot_slo_s) for r in done)
    return LoadReport(
        duration_s=duration_s,
        num_completed=len(done),
        num_failed=sum(result.error is not None for result in results),
        num_cancelled=sum(result.cancelled for result in results),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / duration_s,
        goodput_requests_per_s=None if ttft_slo_s is None and tpot_slo_s is None else good / duration_s,
        ttft_s=_summary([result.ttft_s for result in done]),
        itl_s=_summary([gap_s for result in done for gap_s in result.itl_s]),
        tpot_s=_summary([result.tpot_s for result in done]),
        e2e_s=_summary([result.e2e_s for result in done]),
        results=list(results),
    )


def print_report(report: LoadReport, console: Console) -> None:
    """Print the report as tables: rates, latencies in milliseconds and, if there were errors, each with its count."""
    rates = Table(title="load", show_header=False)
    counts = f"{report.num_completed} completed, {report.num_failed} failed, {report.num_cancelled} cancelled"
    rates.add_row("requests", f"{counts} in {report.duration_s:.2f} s")
    rates.add_row("tokens", f"{report.prompt_tokens:,} prompt, {report.output_tokens:,} output")
    rates.add_row("requests/s", f"{report.requests_per_s:.2f}")
    if report.goodput_requests_per_s is not None:
        rates.add_row("goodput, requests/s", f"{report.goodput_requests_per_s:.2f}")
    rates.add_row("output tokens/s", f"{report.output_tokens_per_s:.1f}")
    rates.add_row("total tokens/s", f"{report.total_tokens_per_s:.1f}")
    console.print(rates)

    latencies = Table("ms", "mean", "p50", "p90", "p99", "max")
    rows = {"TTFT": report.ttft_s, "ITL": report.itl_s, "TPOT": report.tpot_s, "E2E": report.e2e_s}
    for name, summary in rows.items():
        if summary is not None:
            values = (summary.mean, summary.p50, summary.p90, summary.p99, summary.max)
            latencies.add_row(name, *(f"{value * 1000:.1f}" for value in values))
    console.print(latencies)

    for error, count in Counter(result.error for result in report.results if result.error).most_common():
        console.print(f"{count} × {error.status or 'error'}: {error.message}", markup=False)


def _meets(value_s: float | None, limit_s: float | None) -> bool:
    return value_s is None or limit_s is None or value_s <= limit_s


def _summary(values: Sequence[float | None]) -> Summary | None:
    known = [value for value in values if value is not None]
    return summarize(known) if known else None
