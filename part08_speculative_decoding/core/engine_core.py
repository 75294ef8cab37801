"""The engine in a process of its own: requests come over one socket, tokens go out over another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading

import zmq

from common.errors import FieldError
from common.threads import leave_a_core

from ..config import EngineConfig
from ..messages import (
    AbortRequests,
    AddRequest,
    EngineCoreOutput,
    EngineCoreOutputs,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
    Start,
    StartFailed,
    ToCore,
    decode_to_core,
    encode,
)
from .engine import LLMEngine, StepFailedError

LAST_WORDS_MS = 1_000  # how long messages that were not delivered hold up the end


class EngineCore:
    """The loop: hear what is new, take a step, tell what it brought (vLLM's EngineCoreProc.run_busy_loop).

    It waits for a message only when there is nothing to do.
    """

    def __init__(self, engine: LLMEngine, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> None:
        self.engine, self.requests, self.outputs = engine, requests, outputs

    def run(self) -> None:
        """Never returns; SIGTERM raises SystemExit."""
        while True:
            refused = [output for message in self.receive() if (output := self.handle(message))]
            outputs = refused + self.step()
            if outputs or not self.engine.has_unfinished_requests:
                self.outputs.send(encode(EngineCoreOutputs(outputs, self.stats())))

    def receive(self) -> list[ToCore]:
        """What has come; if the engine is idle, wait for it."""
        messages = [] if self.engine.has_unfinished_requests else [decode_to_core(self.requests.recv())]
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(decode_to_core(self.requests.recv(zmq.NOBLOCK)))
        return messages

    def handle(self, message: ToCore) -> EngineCoreOutput | None:
        """Returns an output for a request that cannot be taken."""
        match message:
            case AddRequest():
                try:
                    self.engine.add_request(message.request_id, message.prompt_token_ids, message.params)
                except FieldError as error:
                    return EngineCoreOutput(message.request_id, [], error=str(error))
            case AbortRequests():
                self.engine.abort_requests(message.request_ids)
            case ResetPrefixCache():
                self.outputs.send(encode(PrefixCacheReset(self.engine.reset_prefix_cache())))
        return None

    def step(self) -> list[EngineCoreOutput]:
        """One step. If it fails, so do the requests in it, with its cause; the others go on."""
        try:
            return self.engine.step()
        except StepFailedError as failure:
            self.engine.abort_requests(failure.request_ids)
            cause = f"{type(failure.__cause__).__name__}: {failure.__cause__}"
            return [EngineCoreOutput(request_id, [], error=cause) for request_id in failure.request_ids]

    def stats(self) -> dict[str, float]:
        """Gauges for /metrics."""
        scheduler, blocks, spec_decode = self.engine.scheduler, self.engine.blocks, self.engine.speculation.stats
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_cache_usage_perc": blocks.num_used_blocks / (blocks.num_blocks - 1),
            "num_preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.num_queried_tokens,
            "prefix_cache_hits": scheduler.num_hit_tokens,
            "spec_decode_num_drafts": spec_decode.num_drafts,
            "spec_decode_num_draft_tokens": spec_decode.num_draft_tokens,
            "spec_decode_num_accepted_tokens": spec_decode.num_accepted_tokens,
        }


def run_engine_core(directory: str) -> None:
    """The process's main function: serve the sockets in a directory until SIGTERM, or until the parent has ended."""
    os.setsid()  # Ctrl-C is for the API process, which still has answers to finish
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(target=_end_with_parent, args=(directory,), name="parent-watch", daemon=True).start()
    context = zmq.Context()
    requests, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    requests.bind(f"ipc://{directory}/requests")
    outputs.connect(f"ipc://{directory}/outputs")
    try:
        start = decode_to_core(requests.recv())
        assert isinstance(start, Start), f"expected Start first, got {start}"
        _serve(start.config, requests, outputs)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows comes to its end by itself
        context.destroy(linger=LAST_WORDS_MS)


def _serve(config: EngineConfig, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> None:
    leave_a_core()
    try:
        engine = LLMEngine(config)
    except (FieldError, OSError) as error:
        failed = StartFailed(error.field if isinstance(error, FieldError) else None, str(error))
    else:
        _run(engine, requests, outputs)
        return
    outputs.send(encode(failed))  # half an engine is gone by now: the answer is SIGTERM, which should not meet it dying


def _run(engine: LLMEngine, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> None:
    try:
        outputs.send(encode(Ready(engine.limits, engine.blocks.num_blocks)))
        EngineCore(engine, requests, outputs).run()
    finally:
        engine.tracer.close()


def _end_with_parent(directory: str) -> None:
    """However the parent ends, also by SIGKILL: nobody is left to serve, nor to remove the sockets' directory."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "run_engine_core is started by multiprocessing"
    parent.join()
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
