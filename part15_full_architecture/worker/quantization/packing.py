"""Two codes of 4 bits in a byte, and several codes in a 32-bit word: how matrices lie in memory and in checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)  # nibble i of a word holds code i
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds code AWQ_ORDER[i]: AWQ's kernels unpack pairs


def pack_nibbles(codes: Tensor, group_size: int) -> Tensor:
    """Two codes in each byte, for our kernels: byte i of a group has code i in its lower half, and in its upper half
    code i + group_size / 2. So a kernel unpacks a run of bytes into two runs of neighboring codes.

    codes: […, columns], int8, -8 to 7, stored as 0 to 15. Returns […, columns / 2], int8.
    """
    groups = codes.unflatten(-1, (-1, group_size)).view(torch.uint8) + 8 & 15
    low, high = groups.chunk(2, dim=-1)
    return (low | high << 4).view(torch.int8).flatten(-2)


def unpack_nibbles(packed: Tensor, group_size: int) -> Tensor:
    """The inverse. packed: […, columns / 2]. Returns […, columns], int8, -8 to 7."""
    groups = packed.unflatten(-1, (-1, group_size // 2)).view(torch.uint8)
    codes = torch.cat((groups & 15, groups >> 4), dim=-1).view(torch.int8) - 8
    return codes.flatten(-2)


def pack_words(codes: Tensor, bits: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """Several codes in each word, the first in its lowest bits, along the last dimension.

    codes: […, n], of any integer type, 0 to 2^bits - 1; n is padded to whole words. order: which code each place
    of a word has. Returns […, number of words], int32.
    """
    per_word = WORD_BITS // bits
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[-1] % per_word))
    words = padded.unflatten(-1, (-1, per_word))[..., list(order[:per_word])]
    word = (words << bits * torch.arange(per_word, device=codes.device)).sum(dim=-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack_words(words: Tensor, bits: int, size: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """The inverse. words: […, number of words], int32; size: the number of codes. Returns […, size], int32, 0 to
    2^bits - 1."""
    per_word = WORD_BITS // bits
    places = words.unsqueeze(-1) >> bits * torch.arange(per_word, dtype=torch.int32, device=words.device)
    codes = torch.empty_like(places)
    codes[..., list(order[:per_word])] = places & 2**bits - 1
    return codes.flatten(-2)[..., :size]
