"""worker/token_buffer.py: rows have one owner each, and a token is where its row and position say."""

from __future__ import annotations

import random

import pytest
import torch

from part05_async_scheduling.worker.device import upload
from part05_async_scheduling.worker.token_buffer import TokenBuffer

LOOK = 'Look at worker/token_buffer.py::TokenBuffer; README "Tokens that nobody has seen yet".'


def check_rows(buffer: TokenBuffer, where: str) -> None:
    rows = [*buffer.rows.values(), *buffer._free_rows]
    assert sorted(rows) == list(range(len(buffer.data))), (
        f"{where}: taken {buffer.rows}, free {buffer._free_rows}, of {len(buffer.data)} rows. {LOOK}"
    )


def test_rows_are_given_out_and_taken_back() -> None:
    buffer = TokenBuffer(3, 8, "cpu")
    assert buffer.data.shape == (3, 8) and buffer.data.dtype is torch.int64, f"got {buffer.data.shape}. {LOOK}"
    got = [buffer.acquire(name) for name in "abc"]
    assert sorted(got) == [0, 1, 2] and buffer.rows == dict(zip("abc", got, strict=True)), f"got {got}. {LOOK}"
    buffer.release(["b"])
    check_rows(buffer, "b has left")
    assert buffer.acquire("d") == got[1], f"only b's row is free. {LOOK}"
    buffer.release(iter(["a", "b", "nobody", "a", "d"]))
    check_rows(buffer, "a and d have left, b and a are named once more")
    assert set(buffer.rows) == {"c"}, f"only c is left, got {buffer.rows}. {LOOK}"


def test_what_nobody_has_written_is_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a step fails, the one behind it reads what the failed one was to write. It must not fail as well."""
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: torch.full(*size, -(2**62), **kwargs))
    data = TokenBuffer(3, 8, "cpu").data
    assert not data.any(), f"expected zeros in the new buffer, got {data}. {LOOK}"


def test_rows_at_random() -> None:
    rng, buffer, there = random.Random(0), TokenBuffer(5, 4, "cpu"), list[str]()
    for number in range(500):
        if there and (len(there) == 5 or rng.random() < 0.5):
            left = rng.sample(there, rng.randint(1, len(there)))
            buffer.release([*left, str(rng.randrange(number))] if number % 2 else left)
            there = list(buffer.rows)
        else:
            there.append(str(number))
            buffer.acquire(there[-1])
        check_rows(buffer, f"after {number} changes")


@pytest.mark.parametrize("max_model_len", [1, 5, 64])
def test_a_place_is_a_row_and_a_position(max_model_len: int) -> None:
    buffer = TokenBuffer(4, max_model_len, "cpu")
    buffer.data.copy_(torch.arange(4 * max_model_len).view(4, -1))
    for row in range(4):
        for position in (0, max_model_len // 2, max_model_len - 1):
            place = buffer.place(row, position)
            got = buffer.read(torch.tensor([place]))
            assert got.tolist() == [int(buffer.data[row, position])], f"row {row}, {position}: got {got}. {LOOK}"


def test_fill_read_and_write() -> None:
    buffer = TokenBuffer(3, 6, "cpu")
    buffer.data.fill_(-1)
    buffer.fill(1, [10, 11, 12])
    buffer.fill(2, [20])
    assert buffer.data.tolist() == [[-1] * 6, [10, 11, 12, -1, -1, -1], [20] + [-1] * 5], f"got {buffer.data}. {LOOK}"
    places = torch.tensor([buffer.place(1, 3), buffer.place(2, 1)])
    buffer.write(places, torch.tensor([13, 21]))
    assert buffer.data.tolist() == [[-1] * 6, [10, 11, 12, 13, -1, -1], [20, 21] + [-1] * 4], (
        f"13 at position 3 of row 1, 21 at position 1 of row 2: got {buffer.data}. {LOOK}"
    )
    wanted = [buffer.place(2, 0), buffer.place(2, 1), buffer.place(1, 3), buffer.place(1, 1)]
    got = buffer.read(torch.tensor(wanted))
    assert got.tolist() == [20, 21, 13, 11] and got.dtype is torch.int64, f"got {got}. {LOOK}"
    buffer.fill(1, [7, 8])
    assert buffer.data[1].tolist() == [7, 8, 12, 13, -1, -1], f"a new owner writes its own tokens: {buffer.data[1]}"


def test_what_was_read_does_not_change_with_the_buffer() -> None:
    buffer = TokenBuffer(1, 4, "cpu")
    buffer.fill(0, [1, 2, 3])
    got = buffer.read(torch.tensor([0, 1, 2]))
    buffer.fill(0, [7, 7, 7])
    assert got.tolist() == [1, 2, 3], f"a step's input changed under its hands: {got}. {LOOK}"


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, 2, 3], torch.int64, torch.tensor([1, 2, 3])),
        ([1, 2, 3], torch.int32, torch.tensor([1, 2, 3], dtype=torch.int32)),
        ([[1, 2], [3, 0]], torch.int32, torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)),
        ([0.5, 1.0], None, torch.tensor([0.5, 1.0])),
        ([3, 4], None, torch.tensor([3, 4])),
        ([], torch.int64, torch.tensor([], dtype=torch.int64)),
    ],
    ids=str,
)
def test_upload(values: list, dtype: torch.dtype | None, expected: torch.Tensor) -> None:
    got = upload(values, "cpu", dtype)
    look = "Look at worker/device.py::upload."
    assert got.dtype is expected.dtype and torch.equal(got, expected), f"expected {expected}, got {got}. {look}"
    assert torch.equal(upload(values, torch.device("cpu"), dtype), expected), f"a torch.device does as well. {look}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory and copies that nobody waits for")
def test_upload_to_a_gpu_waits_for_nobody() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = upload([1, 2, 3], "cuda", torch.int32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.device.type == "cuda" and got.tolist() == [1, 2, 3], f"got {got}. Look at worker/device.py::upload."


def test_upload_to_a_gpu_goes_by_way_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, and with stand-ins for the two calls that need one."""
    calls = []

    class Pinned:
        def to(self, *args: object, **kwargs: object) -> str:
            calls.append(("to", args, kwargs))
            return "there"

    def tensor(values: object, **kwargs: object) -> Pinned:
        calls.append(("tensor", (values,), kwargs))
        return Pinned()

    monkeypatch.setattr(torch, "tensor", tensor)
    assert upload([1, 2], "cuda:0", torch.int32) == "there"
    assert calls[0] == ("tensor", ([1, 2],), {"dtype": torch.int32, "pin_memory": True}), f"got {calls[0]}"
    assert calls[1] == ("to", ("cuda:0",), {"non_blocking": True}), (
        f"from pinned memory, and without waiting: got {calls[1]}. Look at worker/device.py::upload."
    )
