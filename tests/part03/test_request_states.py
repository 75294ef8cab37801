"""worker/request_states.py and worker/token_buffer.py: what the worker keeps of a request between two steps."""

from __future__ import annotations

import torch

from common.sampling_params import SamplingParams
from part03_paged_attention.messages import NewRequest
from part03_paged_attention.worker.request_states import RequestStates
from part03_paged_attention.worker.token_buffer import TokenBuffer

LOOK = 'Look at worker/request_states.py::RequestStates; README "Static batches".'
LOOK_TOKENS = 'Look at worker/token_buffer.py::TokenBuffer; README "Static batches".'


def make(max_num_seqs: int = 3, max_model_len: int = 33, block_size: int = 4) -> RequestStates:
    return RequestStates(max_num_seqs, max_model_len, block_size)


def new(row: int, num_prompt_tokens: int = 5, **fields: int) -> NewRequest:
    return NewRequest(row, [7] * (num_prompt_tokens + 2), num_prompt_tokens, SamplingParams(**fields))


def check_table(states: RequestStates, row: int, expected: list[int], what: str) -> None:
    got = states.tables([row])[0].tolist()
    assert (got, states.num_blocks[row]) == (expected, len(expected)), (
        f"{what}: expected block table {expected}, got {got} ({states.num_blocks[row]} blocks). {LOOK}"
    )


def test_a_block_table_has_room_for_the_whole_context() -> None:
    for max_model_len, block_size, expected in ((33, 4, 9), (32, 4, 8), (1, 16, 1), (5, 1, 5)):
        got = make(2, max_model_len, block_size).block_tables
        assert got.shape == (2, expected) and got.dtype == torch.int32, (
            f"a context of {max_model_len} tokens in blocks of {block_size}: expected [2, {expected}] int32, got "
            f"{list(got.shape)} {got.dtype}. {LOOK}"
        )


def test_blocks_are_appended() -> None:
    states = make()
    states.add(new(row=1))
    states.append_blocks(1, [5, 3])
    states.append_blocks(1, [])
    states.append_blocks(1, [8])
    check_table(states, 1, [5, 3, 8], "blocks [5, 3], none, and [8]")
    assert states.num_blocks == [0, 3, 0], f"rows 0 and 2 got nothing: {states.num_blocks}. {LOOK}"


def test_what_is_known_of_a_request() -> None:
    states = make()
    states.add(new(row=2, num_prompt_tokens=4, seed=9))
    got = (states.num_prompt_tokens[2], states.params[2])
    assert got == (4, SamplingParams(seed=9)), f"expected 4 prompt tokens and seed 9, got {got}. {LOOK}"


def test_the_next_request_in_a_row_begins_anew() -> None:
    """Nothing is erased when a request leaves, and nothing of it is seen afterwards."""
    states = make()
    states.add(new(row=0, seed=1))
    states.append_blocks(0, [5, 3, 8, 2])
    states.add(new(row=0, num_prompt_tokens=3, seed=2))
    states.append_blocks(0, [7])
    check_table(states, 0, [7], "a row that another request took over")
    assert (states.num_prompt_tokens[0], states.params[0].seed) == (3, 2), f"the old request shows through. {LOOK}"


def test_tables_of_some_rows() -> None:
    """In the order asked for, as wide as the longest of them."""
    states = make()
    for row, block_ids in ((0, [1, 2, 3, 4]), (1, [5]), (2, [6, 7])):
        states.add(new(row))
        states.append_blocks(row, block_ids)
    got = states.tables([2, 1])
    assert got.shape == (2, 2), f"rows of 2 blocks and 1: expected [2, 2], got {list(got.shape)}. {LOOK}"
    assert got[0].tolist() == [6, 7] and int(got[1, 0]) == 5, f"expected [6, 7] and [5, …], got {got}. {LOOK}"


def test_tables_are_copies() -> None:
    """A step keeps its tables, whatever the next one appends."""
    states = make()
    states.add(new(row=0))
    states.append_blocks(0, [1, 2])
    tables = states.tables([0])
    states.add(new(row=0))
    states.append_blocks(0, [9, 9])
    assert tables.tolist() == [[1, 2]], f"tables of an earlier step changed to {tables.tolist()}. {LOOK}"


# The tokens


def test_tokens_are_read_where_they_were_written() -> None:
    tokens = TokenBuffer(3, 10, "cpu")
    tokens.fill(1, [5, 6, 7])
    tokens.fill(2, [8])
    places = [(1, 2), (2, 0), (1, 0)]
    indices = torch.tensor([tokens.flat_index(*place) for place in places])
    assert indices.tolist() == [12, 20, 10], f"row · 10 + position: expected [12, 20, 10], got {indices}. {LOOK_TOKENS}"
    got = tokens.read(indices).tolist()
    assert got == [7, 8, 5], f"(row, position) {places}: expected [7, 8, 5], got {got}. {LOOK_TOKENS}"
    tokens.write(torch.tensor([tokens.flat_index(1, 3), tokens.flat_index(2, 1)]), torch.tensor([1, 2]))
    assert tokens.data[1, :4].tolist() == [5, 6, 7, 1], f"row 1: got {tokens.data[1]}. {LOOK_TOKENS}"
    assert tokens.data[2, :2].tolist() == [8, 2], f"row 2: got {tokens.data[2]}. {LOOK_TOKENS}"
    assert not tokens.data[0].any(), f"row 0 was never written, got {tokens.data[0]}. {LOOK_TOKENS}"


def test_a_row_that_is_filled_to_the_end_leaves_the_next_alone() -> None:
    tokens = TokenBuffer(2, 4, "cpu")
    tokens.fill(0, [1, 2, 3, 4])
    assert tokens.data.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]], f"got {tokens.data.tolist()}. {LOOK_TOKENS}"
