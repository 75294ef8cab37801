"""api/data_parallel_client.py: several engine cores behind the interface of one. All but the last test script them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.errors import FieldError
from common.sampling_params import SamplingParams
from part10_data_parallelism.__main__ import main
from part10_data_parallelism.api import data_parallel_client as module
from part10_data_parallelism.api.async_engine import AsyncLLM
from part10_data_parallelism.api.data_parallel_client import DataParallelClient, config_of
from part10_data_parallelism.config import EngineConfig
from part10_data_parallelism.core.validation import EngineLimits
from part10_data_parallelism.messages import (
    AbortRequests,
    AddRequest,
    EngineCoreOutput,
    EngineCoreOutputs,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
)

LOOK_TORCHRUN = "Look at torchrun.py::Torchrun.check and __main__.py::main."
LOOK = 'Look at api/data_parallel_client.py::DataParallelClient; README "Replicas inside one server".'
LIMITS = EngineLimits(max_model_len=64, vocab_size=256, num_kv_tokens=1_000)


def stats_of(running: int = 0, waiting: int = 0, usage: float = 0.0) -> dict[str, float]:
    return {"num_requests_running": running, "num_requests_waiting": waiting, "kv_cache_usage_perc": usage}


class ScriptedCore:
    """In the place of a CoreClient. error: of its start. inbox: what receive() returns next."""

    made: list[ScriptedCore] = []
    errors: dict[int, Exception] = {}

    def __init__(self, config: EngineConfig, waits: bool = True) -> None:
        assert not waits, f"all cores load at the same time. {LOOK}"
        self.config, self.number = config, len(self.made)
        self.made.append(self)
        self.sent: list[Any] = []
        self.inbox: list[Any] = []
        self.is_shut_down = False
        self.ready = Ready(LIMITS, 101, stats_of())
        self.process = self
        self.pid: int | None = 100 + self.number

    def wait_until_ready(self) -> None:
        assert len(self.made) == self.config_size, f"all cores load at the same time. {LOOK}"
        if self.number in self.errors:
            raise self.errors[self.number]

    config_size = 2

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def receive(self) -> list[Any]:
        messages, self.inbox = self.inbox, []
        return messages

    def terminate(self) -> None: ...

    def shutdown(self) -> None:
        self.is_shut_down = True

    def describe_exit(self) -> str:
        return "killed by SIGKILL"


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedCore]:
    monkeypatch.setattr(module, "CoreClient", ScriptedCore)
    ScriptedCore.made, ScriptedCore.errors = [], {}
    return ScriptedCore.made


def client_of(num_cores: int = 2) -> DataParallelClient:
    ScriptedCore.config_size = num_cores
    return DataParallelClient(EngineConfig(device="cpu", data_parallel_size=num_cores))


def add(client: DataParallelClient, *names: str) -> None:
    for name in names:
        client.send(AddRequest(name, [5], SamplingParams()))


def names_at(core: ScriptedCore) -> list[str]:
    return [message.request_id for message in core.sent if isinstance(message, AddRequest)]


def test_requests_are_shared_and_aborts_follow_them(cores: list[ScriptedCore]) -> None:
    client = client_of(2)
    add(client, "a", "b", "c", "d")
    assert [names_at(core) for core in cores] == [["a", "c"], ["b", "d"]], f"{[core.sent for core in cores]}. {LOOK}"
    client.send(AbortRequests(["a", "d", "unknown", "c"]))
    assert cores[0].sent[-1] == AbortRequests(["a", "c"]) and cores[1].sent[-1] == AbortRequests(["d"]), LOOK
    assert set(client.core_of) == {"b"}, f"{client.core_of}. {LOOK}"


def test_reports_decide_who_is_next(cores: list[ScriptedCore]) -> None:
    client = client_of(2)
    cores[0].inbox.append(EngineCoreOutputs([], stats_of(running=7)))
    cores[1].inbox.append(EngineCoreOutputs([], stats_of(running=1, waiting=1)))
    client.receive()
    add(client, "a")
    assert names_at(cores[1]) == ["a"], f"scores 7 and 5: {[core.sent for core in cores]}. {LOOK}"
    add(client, "b")
    assert names_at(cores[0]) == ["b"], f"scores 7 and 9: {[core.sent for core in cores]}. {LOOK}"


def test_outputs_end_requests_and_stats_are_of_all_cores(cores: list[ScriptedCore]) -> None:
    client = client_of(2)
    add(client, "a", "b", "c")
    ends = [EngineCoreOutput("a", [7], finish_reason="stop"), EngineCoreOutput("c", [], error="oh no")]
    cores[0].inbox.append(EngineCoreOutputs(ends, stats_of(running=2, usage=0.5)))
    cores[1].inbox.append(EngineCoreOutputs([EngineCoreOutput("b", [7])], stats_of(running=1, waiting=3, usage=0.25)))
    messages: list[Any] = client.receive()
    assert [output.request_id for message in messages for output in message.outputs] == ["a", "c", "b"], LOOK
    assert messages[-1].stats == stats_of(running=3, waiting=3, usage=0.375), f"{messages[-1].stats}. {LOOK}"
    assert set(client.core_of) == {"b"}, f"{client.core_of}. {LOOK}"


def test_the_pool_is_that_of_all_cores(cores: list[ScriptedCore]) -> None:
    assert client_of(3).ready.num_kv_blocks - 1 == 3 * 100, LOOK
    assert len(cores) == 3


def test_the_cache_is_reset_when_all_have_done_so(cores: list[ScriptedCore]) -> None:
    client = client_of(2)
    for _ in range(2):
        client.send(ResetPrefixCache())
    assert [core.sent.count(ResetPrefixCache()) for core in cores] == [2, 2], LOOK
    cores[0].inbox += [PrefixCacheReset(True), PrefixCacheReset(True)]
    assert client.receive() == [], f"the other core has not answered. {LOOK}"
    cores[1].inbox += [PrefixCacheReset(False), PrefixCacheReset(True)]
    assert client.receive() == [PrefixCacheReset(False), PrefixCacheReset(True)], LOOK


@pytest.mark.parametrize("number", [0, 1])
def test_a_core_that_does_not_start_ends_the_others(cores: list[ScriptedCore], number: int) -> None:
    ScriptedCore.errors[number] = FieldError("kv_cache_memory", "too small")
    with pytest.raises(FieldError, match="too small"):
        client_of(2)
    assert all(core.is_shut_down for core in cores) and len(cores) == 2, LOOK


def test_only_a_server_has_several_cores() -> None:
    from part10_data_parallelism.llm import LLM

    with pytest.raises(FieldError, match="data_parallel_size: expected 1 without a server, got 2"):
        LLM(EngineConfig(device="cpu", data_parallel_size=2))
    with pytest.raises(FieldError, match="data_parallel_size: expected at most 1024, got 2000"):
        EngineConfig(device="cpu", data_parallel_size=2_000)


def test_a_core_has_its_share() -> None:
    config = EngineConfig(device="cpu", data_parallel_size=2, trace="x")
    got = [config_of(config, core) for core in range(2)]
    assert [each.trace for each in got] == ["x.0", "x.1"] and {each.data_parallel_size for each in got} == {1}, LOOK
    assert all(each.num_threads is not None and each.num_threads >= 1 for each in got), LOOK


def test_answers_of_two_real_cores() -> None:
    """Each of eight requests gets what one engine answers, both cores have some, and both end."""
    config = EngineConfig(device="cpu", data_parallel_size=2, num_threads=1, num_kv_blocks=64)
    engine = AsyncLLM(config)
    prompts = [[5 + number] * 6 for number in range(8)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    async def ask_all() -> tuple[list[list[int]], dict[str, int]]:
        engine.start()
        streams = [engine.generate(prompt, params) for prompt in prompts]
        assert isinstance(engine.core, DataParallelClient)
        cores = dict(engine.core.core_of)

        async def read(stream: Any) -> list[int]:
            return [token_id async for output in stream for token_id in output.token_ids]

        answers = await asyncio.gather(*map(read, streams))
        assert await engine.reset_prefix_cache(), f"both are idle. {LOOK}"
        assert not engine.core.core_of, f"all have ended: {engine.core.core_of}. {LOOK}"
        return answers, cores

    try:
        answers, cores = asyncio.run(ask_all())
    finally:
        engine.shutdown()
    assert sorted(cores.values()) == [0] * 4 + [1] * 4, f"8 requests for 2 cores: {cores}. {LOOK}"
    assert not [process for process in engine.core.processes if process.is_alive()], f"they still run. {LOOK}"
    from part10_data_parallelism.llm import LLM

    one = LLM(EngineConfig(device="cpu", num_threads=1, num_kv_blocks=64))
    expected = [output.outputs[0].token_ids for output in one.generate(prompts, params)]
    assert answers == expected, f"expected {expected}, got {answers}. {LOOK}"


def test_torchrun_starts_the_ranks_of_one_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else each core would take torchrun's other ranks for its own. No process is started."""
    told = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for name, value in {"TORCHELASTIC_RUN_ID": "test", **told}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.argv", ["part10", "--data-parallel-size", "2"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "data_parallel_size" in said and "torchrun" in said, (
        f"expected an error that names the flag, got {exit_info.value.code}: {said}. {LOOK_TORCHRUN}"
    )
