"""router/processes.py: each replica on GPUs of its own. (Real processes: test_fleet.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from common.errors import FieldError
from part10_data_parallelism.router import processes
from part10_data_parallelism.router.config import RouterConfig

LOOK = 'Look at router/processes.py::processes_with_gpus and gpus_of; README "Replicas inside one server".'


class ScriptedProcess:
    """ended: whether its process has."""

    def __init__(self, gpus: str | None) -> None:
        self.gpus = gpus
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, flags: Sequence[str], host: str = "", env: Mapping[str, str] | None = None) -> ScriptedProcess:
        if "fails" in flags:
            raise OSError("it does not start")
        return cls((env or {}).get("CUDA_VISIBLE_DEVICES"))


def test_each_replica_has_the_gpus_that_no_other_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ReplicaProcess", ScriptedProcess)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    async def main() -> None:
        start: Any = processes.processes_with_gpus(2)
        first, second = await start([]), await start([])
        assert (first.gpus, second.gpus) == ("0,1", "2,3"), f"{first.gpus} and {second.gpus}. {LOOK}"
        with pytest.raises(OSError, match="does not start"):
            await start(["fails"])
        first.ended.set_result(0)
        await asyncio.sleep(0)
        third, fourth = await start([]), await start([])
        assert (third.gpus, fourth.gpus) == ("0,1", "4,5"), (
            f"of one that has ended: {third.gpus}, {fourth.gpus}. {LOOK}"
        )

    asyncio.run(main())


@pytest.mark.parametrize(
    ("allowed", "number", "num_gpus", "expected"),
    [
        (None, 3, 0, None),
        (None, 3, 1, "3"),
        ("6,7", 1, 1, "7"),
        ("4,5,6,7", 1, 2, "6,7"),
        ("GPU-a,GPU-b", 0, 1, "GPU-a"),
    ],
)
def test_gpus_are_those_that_the_router_may_use(
    allowed: str | None, number: int, num_gpus: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    found = processes.gpus_of(number, num_gpus).get("CUDA_VISIBLE_DEVICES")
    assert found == expected, f"replica {number} with {num_gpus} of {allowed}: {found}. {LOOK}"


@pytest.mark.parametrize(("allowed", "num_gpus"), [("6,7", 1), ("4,5,6,7,8", 2), ("", 1)])
def test_no_gpus_left(allowed: str, num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    with pytest.raises(OSError, match="CUDA_VISIBLE_DEVICES"):
        processes.gpus_of(2 if allowed else 0, num_gpus)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"request_timeout": 1e5}, "request_timeout: expected seconds, above 0 and up to 86400, got 100000.0"),
        ({"replica_cpus": float("inf")}, "replica_cpus: expected 0 to 1024, got inf"),
        ({"replicas": 2_000}, "replicas: expected 0 to 1024, got 2000"),
        ({"session_header": "x-ł"}, "session_header: expected the name of a header, got 'x-ł'"),
        ({"session_header": "a b"}, "session_header: expected the name of a header, got 'a b'"),
        ({"worker_urls": "http://a:1,HTTP://A:1/"}, "worker_urls: expected different ones, got http://a:1 twice"),
        ({"worker_urls": "http://a:1?b"}, "worker_urls: expected http://host:port, got 'http://a:1?b'"),
    ],
)
def test_flags_that_are_out_of_range(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as caught:
        RouterConfig(**{"replicas": 1, **flags})
    assert str(caught.value) == message, f"got {caught.value}"


def test_a_flag_that_no_process_can_have() -> None:
    with pytest.raises(OSError, match="a replica did not start: embedded null byte"):
        asyncio.run(processes.ReplicaProcess.start(["--model", "a\0b"]))


def test_half_a_gpu_needs_ray() -> None:
    with pytest.raises(FieldError, match="replica_gpus"):
        RouterConfig(replicas=2, replica_gpus=0.5)
    RouterConfig(replicas=2, replica_gpus=0.5, replica_backend="ray")
