"""Record the traces in results/traces, for the viewer: python -m tools.sample_traces [NAME …].

Every trace is of a real run of `tiny` or `tiny-moe`: two bursts of short chats, with a KV cache that is small enough
for requests to wait. Open them in common/pages/engine.html.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx

from common.sampling_params import SamplingParams
from common.serve import server_process
from common.trace import RequestTrace, StepDeltas, StepTrace, TraceWriter
from common.workloads import QUESTIONS

ROOT = Path(__file__).parent.parent
TRACES = ROOT / "results" / "traces"
SECRET = "a secret of the sample traces"
RULES = "You answer questions about LLM inference in one sentence. You never guess. " * 4
COPYING = "Repeat these words: apple river stone lantern bridge garden apple river stone lantern bridge garden"
SMALL = {"max_num_seqs": 6, "num_kv_blocks": 24}  # requests wait, and one is preempted


def bursts() -> list[list[tuple[list[dict[str, str]], int]]]:
    """Chats with their numbers of output tokens. Those with RULES share a prefix of several blocks."""
    short = [([user(question)], length) for question, length in zip(QUESTIONS[:5], (12, 40, 20, 8, 30), strict=True)]
    shared = [([{"role": "system", "content": RULES}, user(question)], 16) for question in QUESTIONS[5:8]]
    return [[*short, *shared[:2]], [([user(COPYING)], 24), *shared, ([user(RULES * 2)], 12)]]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def trace_engine(part: str, path: Path, times: int = 1, **flags: Any) -> None:
    """A part's engine without a server. times: how often the bursts come."""
    llm_class, config_class = import_module(f"{part}.llm").LLM, import_module(f"{part}.config").EngineConfig
    llm = llm_class(config_class(**{"model": "tiny", "trace": str(path), **SMALL, **flags}))
    try:
        for burst in times * bursts():
            prompts = [
                llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                for chat, _ in burst
            ]
            params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in burst]
            llm.generate(prompts, params)
    finally:
        llm.engine.tracer.close()
        getattr(llm.engine, "shutdown", lambda: None)()


def trace_static_batches(path: Path) -> None:
    """Part 3 writes no traces: its steps are taken one by one here, and noted from outside."""
    llm_class = import_module("part03_paged_attention.llm").LLM
    config_class = import_module("part03_paged_attention.config").EngineConfig
    llm = llm_class(
        config_class(model="tiny", max_num_seqs=SMALL["max_num_seqs"], num_kv_blocks=SMALL["num_kv_blocks"])
    )
    engine, deltas, number = llm.engine, StepDeltas(), 0
    with TraceWriter(path, part="part03_paged_attention", model="tiny", block_size=engine.blocks.block_size) as writer:
        for burst in bursts():
            for chat, length in burst:
                prompt = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                engine.add_request(str(number), prompt, params)
                number += 1
            while engine.has_unfinished_requests:
                writer.write(static_step(engine, writer, deltas))


def static_step(engine: Any, writer: TraceWriter, deltas: StepDeltas) -> StepTrace:
    """A step of part 3's engine, with its trace."""
    before, start_s = list(engine.running), writer.elapsed_s()
    step = engine._schedule()
    scheduled_s, running = writer.elapsed_s(), list(engine.running)
    preempted = [request.request_id for request in before if request not in running]
    deltas.forget(preempted)
    requests = [
        RequestTrace(
            id=request.request_id, num_computed=share.num_computed_tokens, num_scheduled=share.num_scheduled_tokens,
            **deltas.of_request(
                request.request_id, engine.blocks.block_tables[request.request_id], request.prompt_token_ids
            ),
        )
        for request, share in zip(running, step.requests, strict=True)
    ]  # fmt: skip
    waiting = [request.request_id for request in engine.waiting]
    output = engine.executor.execute(step)
    executed_s = writer.elapsed_s()
    outputs = engine._update(output)
    for request, result in zip(requests, outputs, strict=True):
        request.token_ids = result.token_ids
    finished = [each.request_id for each in outputs if each.finish_reason]
    deltas.forget(finished)
    return StepTrace(
        step=engine.num_steps, start_s=start_s, schedule_s=scheduled_s - start_s, execute_s=executed_s - scheduled_s,
        update_s=writer.elapsed_s() - executed_s, num_running=len(running), num_waiting=len(waiting), requests=requests,
        num_blocks_total=engine.blocks.num_blocks - 1, num_blocks_free=engine.blocks.num_free_blocks,
        preempted=preempted, finished=finished, queued=deltas.queued(waiting),
    )  # fmt: skip


def trace_replica(policy: str, path: Path) -> None:
    """The first of two replicas behind part 10's router."""
    part = "part10_data_parallelism"
    engine_flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    with ExitStack() as stack:
        urls = [
            stack.enter_context(server_process(part, "--no-log-stats", *engine_flags, *flags))
            for flags in (["--trace", str(path)], [])
        ]
        router = stack.enter_context(
            server_process(f"{part}.router", "--worker-urls", ",".join(urls), "--policy", policy)
        )
        ask_all(router)


def trace_disaggregated(role: str, path: Path) -> None:
    """Part 13's prefill engine or its decode engine, behind the proxy."""
    part = "part13_disaggregation"
    flags = ["--no-log-stats", "--kv-connector=tcp", f"--kv-transfer-secret={SECRET}", "--num-kv-blocks=56"]
    with ExitStack() as stack:
        urls = {
            each: stack.enter_context(server_process(part, *flags, *(["--trace", str(path)] if each == role else [])))
            for each in ("prefill", "decode")
        }
        addresses = [f"--{each}-urls={url}" for each, url in urls.items()]
        every_prompt = "--remote-prefill-chars=0"
        proxy = server_process(f"{part}.disagg", *addresses, every_prompt, f"--kv-transfer-secret={SECRET}")
        ask_all(stack.enter_context(proxy))


def ask_all(url: str) -> None:
    """Each burst at once, one after the other."""

    def ask(chat: list[dict[str, str]], length: int) -> None:
        body = {"messages": chat, "max_tokens": length, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300, trust_env=False).raise_for_status()

    for burst in bursts():
        with ThreadPoolExecutor(len(burst)) as threads:
            list(threads.map(lambda each: ask(*each), burst))


def samples() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Name of the trace → what writes it."""
    yield "part03_static_batches", trace_static_batches
    draft = {"speculative_method": "draft_model", "speculative_model": "tiny-draft"}
    offloading: dict[str, Any] = {"kv_offload_gib": 0.05, "times": 2}  # evicted prompts come again
    full: dict[str, Any] = {
        "times": 2,
        "speculative_method": "ngram",
        "kv_offload_gib": 0.05,
        "max_num_batched_tokens": 64,
    }
    flags: dict[str, dict[str, Any]] = {
        "part04_continuous_batching": {}, "part05_async_scheduling": {},
        "part06_chunked_prefill": {"max_num_batched_tokens": 48},
        "part07_prefix_caching": {}, "part07_without_prefix_caching": {"enable_prefix_caching": False},
        "part08_speculative_decoding": draft, "part09_tensor_parallelism": {"tensor_parallel_size": 2},
        "part11_expert_parallelism": {"model": "tiny-moe", "tensor_parallel_size": 2, "enable_expert_parallel": True},
        "part12_cpu_offloading": offloading, "part14_quantization": {"quantization": "int8"},
        "part15_full_architecture": full,
    }  # fmt: skip
    for name, each in flags.items():
        part = "part07_prefix_caching" if name.startswith("part07") else name
        yield name, partial(trace_engine, part, **each)
    for policy in ("round_robin", "cache_aware"):
        yield f"part10_{policy}", partial(trace_replica, policy)
    for role in ("prefill", "decode"):
        yield f"part13_{role}", partial(trace_disaggregated, role)


def main() -> None:
    known = dict(sorted(samples()))
    names = sys.argv[1:] or list(known)
    for name in names:
        if name not in known:
            sys.exit(
                f"python -m tools.sample_traces: error: unknown trace {name!r}: expected some of {', '.join(known)}"
            )
    TRACES.mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trace.jsonl"
            known[name](path)
            (TRACES / f"{name}.jsonl").write_bytes(path.read_bytes())
        print(f"{name}: {len((TRACES / f'{name}.jsonl').read_bytes()):,} bytes", flush=True)


if __name__ == "__main__":
    main()
