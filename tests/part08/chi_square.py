"""Are these tokens drawn from this distribution?"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_P_VALUE = 1e-9  # a correct sampler falls below it once in a billion runs; a wrong one falls far below it
MIN_EXPECTED = 8.0  # cells with fewer expected draws are merged into one


def p_value(token_ids: Tensor, probs: Tensor) -> float:
    """The probability that draws from probs are as far from probs as token_ids: [n] are. Pearson's chi-square test.

    0 if one of them has probability 0.
    """
    counts = torch.bincount(token_ids, minlength=len(probs)).double()
    if len(counts) > len(probs) or bool(((probs == 0) & (counts > 0)).any()):
        return 0.0
    expected = probs.double() / probs.double().sum() * len(token_ids)
    is_large = expected >= MIN_EXPECTED
    cells = [(float(count), float(e)) for count, e in zip(counts[is_large], expected[is_large], strict=True)]
    rest = float(expected[~is_large].sum())
    if rest > 0:
        cells.append((float(counts[~is_large].sum()), rest))
    statistic = sum((count - e) ** 2 / e for count, e in cells)
    if len(cells) < 2:
        return 1.0
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
