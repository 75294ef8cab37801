"""worker/token_buffer.py, request_states.py and device.py: what the worker keeps in rows, and how numbers get there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.sampling_params import SamplingParams
from part05_async_scheduling.messages import NewRequest
from part05_async_scheduling.worker.device import to_device
from part05_async_scheduling.worker.request_states import RequestStates
from part05_async_scheduling.worker.token_buffer import TokenBuffer

LOOK = 'Look at worker/token_buffer.py::TokenBuffer; README "The token buffer".'
LOOK_STATES = 'Look at worker/request_states.py::RequestStates; README "The token buffer".'
LOOK_DEVICE = "Look at worker/device.py::to_device."


# Tokens


def test_unwritten_positions_hold_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a step fails, the one behind it reads what the failed one was to write. It must not fail as well."""
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: torch.full(*size, -(2**62), **kwargs))
    data = TokenBuffer(3, 8, "cpu").data
    assert data.shape == (3, 8) and data.dtype is torch.int64, f"got {data.shape}, {data.dtype}. {LOOK}"
    assert not data.any(), f"expected zeros in the new buffer, got {data}. {LOOK}"


@pytest.mark.parametrize("max_model_len", [1, 5, 64])
def test_a_flat_index_is_a_row_and_a_position(max_model_len: int) -> None:
    buffer = TokenBuffer(4, max_model_len, "cpu")
    buffer.data.copy_(torch.arange(4 * max_model_len).view(4, -1))
    for row in range(4):
        for position in (0, max_model_len // 2, max_model_len - 1):
            index = buffer.flat_index(row, position)
            got = buffer.read(torch.tensor([index]))
            assert got.tolist() == [int(buffer.data[row, position])], f"row {row}, {position}: got {got}. {LOOK}"


def test_fill_read_and_write() -> None:
    buffer = TokenBuffer(3, 6, "cpu")
    buffer.data.fill_(-1)
    buffer.fill(1, [10, 11, 12])
    buffer.fill(2, [20])
    assert buffer.data.tolist() == [[-1] * 6, [10, 11, 12, -1, -1, -1], [20] + [-1] * 5], f"got {buffer.data}. {LOOK}"
    indices = torch.tensor([buffer.flat_index(1, 3), buffer.flat_index(2, 1)])
    buffer.write(indices, torch.tensor([13, 21]))
    assert buffer.data.tolist() == [[-1] * 6, [10, 11, 12, 13, -1, -1], [20, 21] + [-1] * 4], (
        f"13 at position 3 of row 1, 21 at position 1 of row 2: got {buffer.data}. {LOOK}"
    )
    wanted = [buffer.flat_index(2, 0), buffer.flat_index(2, 1), buffer.flat_index(1, 3), buffer.flat_index(1, 1)]
    got = buffer.read(torch.tensor(wanted))
    assert got.tolist() == [20, 21, 13, 11] and got.dtype is torch.int64, f"got {got}. {LOOK}"
    buffer.fill(1, [7, 8])
    assert buffer.data[1].tolist() == [7, 8, 12, 13, -1, -1], (
        f"the next request writes its own tokens: {buffer.data[1]}"
    )


def test_tokens_that_were_read_do_not_change_with_the_buffer() -> None:
    buffer = TokenBuffer(1, 4, "cpu")
    buffer.fill(0, [1, 2, 3])
    got = buffer.read(torch.tensor([0, 1, 2]))
    buffer.fill(0, [7, 7, 7])
    assert got.tolist() == [1, 2, 3], f"a step's input was changed by the next request: {got}. {LOOK}"


# Block tables and parameters


def new(row: int, num_prompt_tokens: int = 2, **fields: Any) -> NewRequest:
    return NewRequest(row, [5, 6, 7], num_prompt_tokens, SamplingParams(**fields))


def test_block_tables_grow_by_what_is_sent() -> None:
    states = RequestStates(max_num_seqs=3, max_model_len=20, block_size=4)
    for row in (2, 0):
        states.add(new(row))
    for row, block_ids in ((2, [9, 4]), (0, [3]), (2, []), (2, [7])):
        states.append_blocks(row, block_ids)
    got = states.tables([2, 0])
    assert got.dtype is torch.int32 and got.shape == (2, 3), f"as wide as the longest, int32: got {got}. {LOOK_STATES}"
    assert (got[0].tolist(), got[1, :1].tolist()) == ([9, 4, 7], [3]), f"got {got}. {LOOK_STATES}"
    assert states.tables([0]).tolist() == [[3]], f"row 0 alone: got {states.tables([0])}. {LOOK_STATES}"
    assert states.tables([]).shape[0] == 0, f"no rows: got {states.tables([])}. {LOOK_STATES}"


def test_a_context_that_is_no_multiple_of_the_block_size_fits() -> None:
    states = RequestStates(max_num_seqs=1, max_model_len=9, block_size=4)
    states.add(new(0))
    states.append_blocks(0, [1, 2, 3])
    assert states.tables([0]).tolist() == [[1, 2, 3]], f"9 tokens need 3 blocks of 4. {LOOK_STATES}"


def test_the_next_request_in_a_row_begins_anew() -> None:
    states = RequestStates(max_num_seqs=2, max_model_len=20, block_size=4)
    states.add(new(1, seed=3))
    states.append_blocks(1, [9, 4, 7])
    states.add(new(1, 3, seed=8))
    states.append_blocks(1, [2])
    got = (states.tables([1]).tolist(), states.num_prompt_tokens[1], states.params[1].seed)
    assert got == ([[2]], 3, 8), f"(blocks, prompt tokens, seed): expected ([[2]], 3, 8), got {got}. {LOOK_STATES}"


def test_tables_are_copies() -> None:
    """A step that has not run keeps the tables it was launched with."""
    states = RequestStates(max_num_seqs=1, max_model_len=20, block_size=4)
    states.add(new(0))
    states.append_blocks(0, [9, 4])
    table = states.tables([0])
    states.add(new(0))
    states.append_blocks(0, [1, 2, 3])
    assert table.tolist() == [[9, 4]], f"a later request changed a table that was given out: {table}. {LOOK_STATES}"


# To the device


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
def test_to_device(values: list, dtype: torch.dtype | None, expected: torch.Tensor) -> None:
    got = to_device(values, "cpu", dtype)
    assert got.dtype is expected.dtype and torch.equal(got, expected), f"expected {expected}, got {got}. {LOOK_DEVICE}"
    assert torch.equal(to_device(values, torch.device("cpu"), dtype), expected), (
        f"a torch.device does as well. {LOOK_DEVICE}"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory and asynchronous copies")
def test_a_copy_to_a_gpu_does_not_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = to_device([1, 2, 3], "cuda", torch.int32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.device.type == "cuda" and got.tolist() == [1, 2, 3], f"got {got}. Look at worker/device.py::to_device."


def test_a_copy_to_a_gpu_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, and with stand-ins for the two calls that need one."""
    calls: list[Any] = []

    class Pinned:
        def to(self, *args: object, **kwargs: object) -> str:
            calls.append((args, kwargs))
            return "copied"

    def pin_memory(tensor: torch.Tensor) -> Pinned:
        calls.append((tensor.tolist(), tensor.dtype))
        return Pinned()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for values in ([1, 2], torch.tensor([1, 2], dtype=torch.int32)):
        calls.clear()
        assert to_device(values, "cuda:0", torch.int32) == "copied", f"expected the copy. {LOOK_DEVICE}"
        expected = [([1, 2], torch.int32), (("cuda:0",), {"non_blocking": True})]
        assert calls == expected, f"from pinned memory, without waiting: {expected}, got {calls}. {LOOK_DEVICE}"
