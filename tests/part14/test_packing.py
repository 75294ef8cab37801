"""worker/quantization/packing.py: which half of a byte, and which bits of a word, hold which code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from part14_quantization.worker.quantization.packing import (
    AWQ_ORDER,
    IN_ORDER,
    pack_nibbles,
    pack_words,
    unpack_nibbles,
    unpack_words,
)

NIBBLES, UNPACK_NIBBLES, WORDS, UNPACK_WORDS = (
    f"See worker/quantization/packing.py::{name}."
    for name in ("pack_nibbles", "unpack_nibbles", "pack_words", "unpack_words")
)


def as_bytes(packed: Tensor) -> list[str]:
    return [f"{byte & 255:#04x}" for byte in packed.flatten().tolist()]


def as_words(packed: Tensor) -> list[str]:
    return [f"{word & 2**32 - 1:#010x}" for word in packed.flatten().tolist()]


@pytest.mark.parametrize(
    ("codes", "group_size", "expected"),
    [
        ([-8, 7], 2, ["0xf0"]),  # code -8 is stored as 0, in the lower half; 7 as 15, in the upper half
        ([7, -8], 2, ["0x0f"]),
        ([0, 0], 2, ["0x88"]),
        ([-7, -6, -5, -4], 4, ["0x31", "0x42"]),  # codes 0 and 2 of the group share a byte
        ([-7, -6, -5, -4], 2, ["0x21", "0x43"]),  # neighbors do
        ([-7, -6, -5, -4, -3, -2, -1, 0], 8, ["0x51", "0x62", "0x73", "0x84"]),
        ([-7, -6, -5, -4, -3, -2, -1, 0], 4, ["0x31", "0x42", "0x75", "0x86"]),
    ],
)
def test_nibbles_by_hand(codes: list[int], group_size: int, expected: list[str]) -> None:
    packed = pack_nibbles(torch.tensor([codes], dtype=torch.int8), group_size)
    assert packed.dtype == torch.int8 and packed.shape == (1, len(codes) // 2), f"got {packed}. {NIBBLES}"
    assert as_bytes(packed) == expected, (
        f"codes {codes} in groups of {group_size}: byte i has code i in its lower half and code i + {group_size // 2} "
        f"in its upper half, both plus 8: expected {expected}, got {as_bytes(packed)}. {NIBBLES}"
    )
    got = unpack_nibbles(packed, group_size).tolist()
    assert got == [codes], f"{expected} is unpacked to {got}, expected {codes}. {UNPACK_NIBBLES}"


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 4, 6, 8, 16, 34]), st.integers(1, 3), st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_nibbles_there_and_back(group_size: int, num_groups: int, rows: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (*rows, num_groups * group_size), dtype=torch.int8, generator=generator)
    packed = pack_nibbles(codes, group_size)
    assert packed.shape == (*rows, num_groups * group_size // 2), f"got {list(packed.shape)}. {NIBBLES}"
    got = unpack_nibbles(packed, group_size)
    assert got.dtype == torch.int8 and torch.equal(got, codes), (
        f"{codes.tolist()} in groups of {group_size} became {got.tolist()}. {UNPACK_NIBBLES}"
    )


def test_every_byte_is_unpacked() -> None:
    packed = torch.arange(-128, 128).to(torch.int8).unsqueeze(1)
    codes = unpack_nibbles(packed, 2)
    num_pairs, low, high = len(codes.unique(dim=0)), int(codes.min()), int(codes.max())
    assert (num_pairs, low, high) == (256, -8, 7), (
        f"256 bytes are {num_pairs} pairs of codes, from {low} to {high}: expected 256, from -8 to 7. {UNPACK_NIBBLES}"
    )
    again = pack_nibbles(codes, 2)
    assert torch.equal(again, packed), f"bytes {packed[again != packed][:4].tolist()} changed. {NIBBLES}"


@pytest.mark.parametrize(
    ("codes", "bits", "order", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, IN_ORDER, ["0x87654321"]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, AWQ_ORDER, ["0x75316420"]),  # from the lowest: codes 0, 2, 4, 6, 1, 3, 5, 7
        ([15] * 8, 4, IN_ORDER, ["0xffffffff"]),
        ([0, 0, 0, 0, 0, 0, 0, 8], 4, IN_ORDER, ["0x80000000"]),  # the sign of an int32
        ([1, 2, 3, 4], 8, IN_ORDER, ["0x04030201"]),
        ([255, 0, 0, 128], 8, IN_ORDER, ["0x800000ff"]),
        ([9], 4, IN_ORDER, ["0x00000009"]),  # padded
        ([9], 4, AWQ_ORDER, ["0x00000009"]),
        ([0, 9], 4, AWQ_ORDER, ["0x00090000"]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 4, IN_ORDER, ["0x87654321", "0x000000a9"]),
        ([1, 2, 3, 4, 5], 8, IN_ORDER, ["0x04030201", "0x00000005"]),
    ],
)
def test_words_by_hand(codes: list[int], bits: int, order: tuple[int, ...], expected: list[str]) -> None:
    packed = pack_words(torch.tensor([codes]), bits, order)
    assert packed.dtype == torch.int32 and packed.shape == (1, len(expected)), f"got {packed}. {WORDS}"
    assert as_words(packed) == expected, (
        f"codes {codes} of {bits} bits in the order {order}: expected {expected}, got {as_words(packed)}. {WORDS}"
    )
    got = unpack_words(packed, bits, len(codes), order)
    assert got.dtype == torch.int32 and got.tolist() == [codes], f"{expected} became {got.tolist()}. {UNPACK_WORDS}"


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([4, 8]), st.integers(1, 33), st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.sampled_from([IN_ORDER, AWQ_ORDER]), st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_words_there_and_back(
    bits: int, size: int, rows: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    order = IN_ORDER if bits == 8 else order  # four codes in a word: AWQ has none of these
    codes = torch.randint(0, 2**bits, (*rows, size), generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack_words(codes, bits, order)
    assert packed.shape == (*rows, -(-size * bits // 32)), f"{size} codes: got {list(packed.shape)}. {WORDS}"
    got = unpack_words(packed, bits, size, order)
    assert torch.equal(got, codes.int()), f"{codes.tolist()} in {bits} bits became {got.tolist()}. {UNPACK_WORDS}"


def test_awq_has_another_order() -> None:
    codes = torch.arange(16)
    ours, awqs = pack_words(codes, 4), pack_words(codes, 4, AWQ_ORDER)
    assert not torch.equal(ours, awqs), f"AWQ's words are the same as those in order. {WORDS}"
    mixed = unpack_words(awqs, 4, 16).tolist()
    assert mixed == [*AWQ_ORDER, *(8 + code for code in AWQ_ORDER)], (
        f"read in order, AWQ's nibbles are codes {AWQ_ORDER} of each word, got {mixed}. {WORDS}"
    )


def test_a_column_of_words() -> None:
    """GPTQ packs along the input features: a transposed view, which isn't contiguous."""
    codes = torch.randint(0, 16, (24, 5), generator=torch.Generator().manual_seed(0))
    packed = pack_words(codes.T, 4).T
    assert packed.shape == (3, 5), f"24 rows of codes are 3 rows of words, got {list(packed.shape)}. {WORDS}"
    word, wanted = as_words(packed[1, 2])[0], "".join(f"{code:x}" for code in codes[8:16, 2].flip(0).tolist())
    assert word == f"0x{wanted}", f"codes 8 to 15 of column 2: expected 0x{wanted}, got {word}. {WORDS}"
    got = unpack_words(packed.T, 4, 24).T
    assert torch.equal(got, codes.int()), f"column 2 became {got[:, 2].tolist()}. {UNPACK_WORDS}"
