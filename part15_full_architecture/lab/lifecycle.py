"""One request from HTTP to the forward pass and back: which process has it when, and for how long.

python -m part15_full_architecture.lab.lifecycle writes results/part15_lifecycle.json, from which a diagram is drawn.
"""

from __future__ import annotations

from common.threads import limit_spinning

if __name__ == "__main__":  # before the imports below load torch
    limit_spinning()

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.results import median, write_result
from common.serve import ServerConfig, running_app
from common.trace import StepTrace, Trace, read_trace

from ..api.async_engine import AsyncLLM
from ..api.server import create_app
from ..api.timeline import RequestTimeline
from ..config import EngineConfig

QUESTION = "What is a KV cache?"
NUM_TOKENS = 24
BAR = 28  # characters
COLORS = {"client": "white", "API": "blue", "core": "magenta", "worker": "green"}


@dataclass(frozen=True, slots=True)
class Stage:
    """What a process does with the request. start_s, end_s: since the client sent it."""

    process: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ClientTimes:
    """When the client sent the request, and when each piece of the answer arrived (time.perf_counter)."""

    sent_s: float
    arrived_s: list[float]


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """to_first_token: the stages up to the first token. decode_step: the same for one further token, the one that took
    the median time; its times count from the step's beginning. num_steps: all steps that computed the request."""

    to_first_token: list[Stage]
    decode_step: list[Stage]
    num_steps: int
    ttft_s: float
    total_s: float


def trace_request(model: str) -> Lifecycle:
    """Serve one request after a warm-up, with a trace."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        engine = AsyncLLM(EngineConfig(model=model, trace=str(path)))
        timelines: list[RequestTimeline] = []
        engine.observers.append(timelines.append)
        try:
            with running_app(create_app(engine, ServerConfig(log_stats=False))) as url:
                ask(url, "What is a block table?")
                times = ask(url, QUESTION)
        finally:
            engine.shutdown()  # which writes the rest of the trace
        return lifecycle(times, timelines[-1], read_trace(path))


def ask(url: str, question: str) -> ClientTimes:
    body = {
        "messages": [{"role": "user", "content": question}], "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    arrived_s: list[float] = []
    with httpx.Client(trust_env=False, timeout=600) as client:
        client.get(f"{url}/health")  # connects
        sent_s = time.perf_counter()
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    arrived_s.append(time.perf_counter())
    return ClientTimes(sent_s, arrived_s)


def lifecycle(times: ClientTimes, timeline: RequestTimeline, trace: Trace) -> Lifecycle:
    zero_s = times.sent_s - float(trace.header["began_s"])  # the client's beginning on the trace's clock
    steps = [step for step in trace.steps if any(each.id == timeline.request_id for each in step.requests)]
    queued_s, scheduled_s, first_s = timeline.first("queued"), timeline.first("scheduled"), timeline.first_token_s
    assert queued_s and scheduled_s and first_s, f"the request has not run: {timeline}"
    http = timeline.http
    stages = [
        ("client", "send the request", times.sent_s, http.received_s),
        ("API", "parse, apply the chat template, tokenize", http.received_s, timeline.submitted_s),
        ("core", "receive the message", timeline.submitted_s, queued_s),
        ("core", "wait in the queue", queued_s, scheduled_s),
    ]
    to_first_token = [Stage(process, name, a - times.sent_s, b - times.sent_s) for process, name, a, b in stages]
    to_first_token += list(step_stages(steps[0], zero_s))
    core_end_s = to_first_token[-1].end_s
    to_first_token += [
        Stage("API", "receive the token, detokenize, send it", core_end_s, first_s - times.sent_s),
        Stage("client", "receive the first text", first_s - times.sent_s, times.arrived_s[0] - times.sent_s),
    ]
    return Lifecycle(
        to_first_token, decode_stages(steps[1:]), len(steps), times.arrived_s[0] - times.sent_s,
        times.arrived_s[-1] - times.sent_s,
    )  # fmt: skip


def step_stages(step: StepTrace, zero_s: float) -> Iterator[Stage]:
    assert step.forward_start_s is not None and step.forward_s is not None, "all parts since 5 record it"
    forward_end_s = step.forward_start_s + step.forward_s
    num_tokens = sum(each.num_scheduled for each in step.requests)
    executed_s = step.start_s + step.schedule_s + step.execute_s
    yield Stage("core", "schedule, allocate blocks", step.start_s - zero_s, step.start_s + step.schedule_s - zero_s)
    yield Stage(
        "worker", f"forward pass over {num_tokens} token{'s' * (num_tokens > 1)}, sample",
        step.forward_start_s - zero_s, forward_end_s - zero_s,
    )  # fmt: skip
    yield Stage("core", "take the result", forward_end_s - zero_s, executed_s - zero_s)
    yield Stage("core", "append the token, check for a stop", executed_s - zero_s, step.end_s - zero_s)


def decode_stages(steps: Sequence[StepTrace]) -> list[Stage]:
    """Of the step whose forward pass took the median time. With async scheduling, the next step is scheduled while this
    one's forward pass runs."""
    middle = median([step.forward_s or 0.0 for step in steps])
    step = min(steps, key=lambda each: abs((each.forward_s or 0.0) - middle))
    return list(step_stages(step, step.start_s))


def show_lifecycle(console: Console, model: str) -> None:
    found = trace_request(model)
    console.rule(f"{QUESTION} From HTTP to the forward pass and back")
    console.print(stage_table("to the first token", found.to_first_token))
    console.print(stage_table("one decode step, from its scheduling on", found.decode_step))
    console.print(
        f"TTFT {1e3 * found.ttft_s:.1f} ms; {NUM_TOKENS} tokens in {found.num_steps} steps and "
        f"{1e3 * found.total_s:.1f} ms.",
        highlight=False,
    )


def stage_table(title: str, stages: Sequence[Stage]) -> Table:
    table = Table("process", title, "ms", "", box=None, padding=(0, 1))
    whole_s = max(stage.end_s for stage in stages)
    for stage in stages:
        first, last = (round(BAR * seconds / whole_s) for seconds in (stage.start_s, stage.end_s))
        bar = Text(" " * first + "█" * max(1, last - first), style=COLORS[stage.process])
        table.add_row(stage.process, stage.name, f"{1e3 * (stage.end_s - stage.start_s):.2f}", bar)
    return table


def main() -> None:
    found = trace_request("tiny")
    rows = {
        name: [
            {**asdict(stage), "start_s": round(stage.start_s, 6), "end_s": round(stage.end_s, 6)} for stage in stages
        ]
        for name, stages in (("to_first_token", found.to_first_token), ("decode_step", found.decode_step))
    }
    write_result(
        Path("results") / "part15_lifecycle.json", benchmark="part15_lifecycle", seed=0, repeats=1,
        config={"model": "tiny", "question": QUESTION, "num_tokens": NUM_TOKENS},
        measurements={**rows, "num_steps": found.num_steps, "ttft_s": found.ttft_s, "total_s": found.total_s},
    )  # fmt: skip


if __name__ == "__main__":
    main()
