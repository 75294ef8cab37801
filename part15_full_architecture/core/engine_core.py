"""The engine in its own process: requests arrive on one socket, tokens leave on another."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading

import zmq

from common import startup
from common.errors import FieldError
from common.threads import leave_a_core

from ..config import EngineConfig
from ..messages import (
    AbortRequests,
    AddRequest,
    CoreGroup,
    EngineCoreDead,
    EngineCoreOutput,
    EngineCoreOutputs,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
    Start,
    StartFailed,
    StartWave,
    ToCore,
    decode_to_core,
    encode,
)
from .engine import LLMEngine
from .ranks import RankDied

logger = logging.getLogger(__name__)
LINGER_MS = 1_000  # how long the process waits at its end for messages to be delivered


class EngineCore:
    """The busy loop: receive messages, take a step, send its outputs (vLLM's EngineCoreProc.run_busy_loop).

    It waits for a message only when the engine is idle.
    """

    def __init__(self, engine: LLMEngine, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> None:
        self.engine, self.requests, self.outputs = engine, requests, outputs
        self.num_pending = 0  # transfers: blocks may be held without requests

    def run(self) -> None:
        """Never returns. Raises SystemExit on SIGTERM, the step's error when two steps in a row fail, and RankDied."""
        while True:
            messages = self.receive()
            refused = [output for message in messages if (output := self.handle(message))]
            self.start_wave()
            outputs = refused + self.step()
            num_pending, self.num_pending = self.num_pending, len(self.engine.orders.pending)
            has_news = outputs or messages or num_pending != self.num_pending
            if has_news or not self.engine.has_unfinished_requests:
                self.outputs.send(encode(EngineCoreOutputs(outputs, self.stats())))

    def receive(self) -> list[ToCore]:
        """The messages that have arrived; if the engine is idle, wait for one."""
        if not self.engine.has_unfinished_requests:
            self.engine.executor.wait_for(self.requests)
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(decode_to_core(self.requests.recv(zmq.NOBLOCK)))
        return messages

    def handle(self, message: ToCore) -> EngineCoreOutput | None:
        """Handle a message. Returns an output for a request that is rejected."""
        match message:
            case AddRequest():
                try:
                    self.engine.add_request(
                        message.request_id, message.prompt_token_ids, message.params, message.kv_transfer
                    )
                except FieldError as error:
                    return EngineCoreOutput(message.request_id, [], error=str(error))
            case AbortRequests():
                self.engine.abort_requests(message.request_ids)
            case StartWave() if self.engine.lockstep is not None:
                self.engine.lockstep.join(message.wave)
            case ResetPrefixCache():
                self.outputs.send(encode(PrefixCacheReset(self.engine.reset_prefix_cache())))
        return None

    def start_wave(self) -> None:
        """If the first request has come, the other cores that share experts must take steps, too."""
        lockstep = self.engine.lockstep
        if lockstep is not None and not lockstep.is_running and self.engine.scheduler.has_unfinished_requests:
            self.outputs.send(encode(StartWave(lockstep.wave)))
            lockstep.start()

    def step(self) -> list[EngineCoreOutput]:
        """One step. If it fails, all requests in the engine fail; if the next step fails too, the core stops. It stops
        at once if other cores take the same steps."""
        try:
            return self.engine.step()
        except RankDied:
            raise
        except Exception as error:
            logger.exception("a step failed: its requests end with an error")
            if self.engine.lockstep is not None:
                self.outputs.send(encode(EngineCoreDead(f"a step failed with {type(error).__name__}: {error}")))
                raise
            outputs = self.engine.fail(error)
            if self.engine.num_failures > 1:
                cause = f"two steps in a row failed, the second with {type(error).__name__}: {error}"
                self.outputs.send(encode(EngineCoreDead(cause)))
                raise
            return outputs

    def stats(self) -> dict[str, float]:
        """Gauges for /metrics."""
        scheduler, blocks, spec_decode = self.engine.scheduler, self.engine.blocks, self.engine.speculation.stats
        offloader, transfers = self.engine.offloader, self.engine.transfers
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": scheduler.num_waiting,
            "kv_cache_usage_perc": blocks.num_used_blocks / (blocks.num_blocks - 1),
            "weight_bytes": self.engine.executor.weight_bytes,
            "kv_block_bytes": self.engine.executor.bytes_per_block,
            "num_preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.num_queried_tokens,
            "prefix_cache_hits": scheduler.num_hit_tokens,
            "expert_balance_perc": self.engine.expert_balance[0],
            "spec_decode_num_drafts": spec_decode.num_drafts,
            "spec_decode_num_draft_tokens": spec_decode.num_draft_tokens,
            "spec_decode_num_accepted_tokens": spec_decode.num_accepted_tokens,
            "kv_offload_usage_perc": offloader.host_usage,
            "kv_offload_saved_tokens": offloader.stats.num_saved_tokens,
            "kv_offload_host_tokens": offloader.stats.num_host_tokens,
            "kv_offload_tier_tokens": offloader.stats.num_tier_tokens,
            "kv_offload_recomputed_tokens": offloader.stats.num_recomputed_tokens,
            "kv_offload_host_tokens_per_s": offloader.cost.host.tokens_per_s,
            "kv_offload_tier_tokens_per_s": offloader.cost.tiers.tokens_per_s,
            "kv_transfer_offered": transfers.stats.num_offered,
            "kv_transfer_expired": transfers.stats.num_expired,
            "kv_transfer_fetched_tokens": transfers.stats.num_fetched_tokens,
            "kv_transfer_fetched_bytes": transfers.stats.num_fetched_bytes,
            "kv_transfer_fetch_seconds": transfers.stats.fetch_s,
            "kv_transfer_failed": transfers.stats.num_failed,
            "prompt_tokens_per_s": offloader.cost.compute.tokens_per_s,
        }


def run_engine_core(directory: str, *shared_directories: str) -> None:
    """The process's main function: serve the sockets in a directory until SIGTERM, or until the parent ends.

    shared_directories: with other cores.
    """
    startup.begin()
    os.setsid()  # so that Ctrl-C reaches only the API process, which has open requests to finish
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(
        target=_end_with_parent, args=(directory, *shared_directories), name="parent-watch", daemon=True
    ).start()
    context = zmq.Context()
    requests, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    requests.bind(f"ipc://{directory}/requests")
    outputs.connect(f"ipc://{directory}/outputs")
    try:
        start = decode_to_core(requests.recv())
        assert isinstance(start, Start), f"expected Start first, got {start}"
        _serve(start.config, requests, outputs, start.cores)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rest takes no longer than LINGER_MS
        context.destroy(linger=LINGER_MS)


def _serve(
    config: EngineConfig, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes], cores: CoreGroup | None = None
) -> None:
    leave_a_core()
    try:
        engine = LLMEngine(config, cores)
    except (FieldError, OSError) as error:
        failed = StartFailed(error.field if isinstance(error, FieldError) else None, str(error))
    else:
        _run(engine, requests, outputs, f"core {cores.core}, " if cores else "")
        return
    outputs.send(encode(failed))  # after the half-built engine is gone, because the API process answers with SIGTERM


def _run(engine: LLMEngine, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes], name: str) -> None:
    core = EngineCore(engine, requests, outputs)
    try:
        startup.end()
        sources = engine.executor.kv_sources
        num_blocks, kernels = engine.blocks.num_blocks, engine.executor.kernels
        outputs.send(encode(Ready(engine.limits, num_blocks, core.stats(), sources, kernels)))
        core.run()
    except RankDied as error:
        outputs.send(encode(EngineCoreDead(f"{name}{error}")))
        sys.exit(1)
    finally:
        if threading.current_thread() is threading.main_thread():  # which alone may say so
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that does not end must still be killed
        engine.shutdown()


def _end_with_parent(*directories: str) -> None:
    """End when the parent ends, even by SIGKILL, and remove the directories, since the parent no longer can."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "run_engine_core is started by multiprocessing"
    parent.join()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
