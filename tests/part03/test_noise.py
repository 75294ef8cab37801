"""worker/noise.py: exponential noise as a function of (seed, position), the same in every batch."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from part03_paged_attention.worker import noise
from part03_paged_attention.worker.noise import GOLDEN_RATIO, exponential_noise, mix, shift_right

LOOK = "Look at worker/noise.py::exponential_noise."
LOOK_MIX = "Look at worker/noise.py::mix and shift_right."
SEEDS = [0, 1, 7, -1, -(2**63), 2**63 - 1, 2**62 + 12_345, 2**31, 2**32]
MASK = 2**64 - 1


def signed(x: int) -> int:
    """The int64 with these 64 bits."""
    return (x & MASK) - (x & MASK & 1 << 63) * 2


def rows(seeds: list[int], positions: list[int], size: int) -> Tensor:
    return exponential_noise(torch.tensor(seeds), torch.tensor(positions), size)


def kolmogorov_smirnov(samples: Tensor) -> float:
    """The largest distance between the samples' distribution function and Exp(1)'s, times the root of their number.

    For samples of Exp(1) it exceeds 1.95 once in 1,000 times.
    """
    ordered = samples.flatten().double().sort().values
    expected, n = 1 - (-ordered).exp(), len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()) * math.sqrt(n)


def chi_square_of_pairs(a: Tensor, b: Tensor, num_bins: int = 8) -> float:
    """Whether pairs are independent: counts in a grid of bins that Exp(1) fills evenly. 63 degrees of freedom: by
    chance it exceeds 103.4 once in 1,000 times."""
    cells = [(num_bins * (1 - (-x.flatten().double()).exp())).long().clamp(max=num_bins - 1) for x in (a, b)]
    counts = torch.bincount(cells[0] * num_bins + cells[1], minlength=num_bins**2).double()
    expected = counts.sum() / num_bins**2
    return float(((counts - expected) ** 2 / expected).sum())


# The distribution


@pytest.mark.parametrize("seed", SEEDS)
def test_over_the_vocabulary_the_noise_is_exponential(seed: int) -> None:
    got = kolmogorov_smirnov(rows([seed], [17], 100_000))
    assert got < 1.95, f"seed {seed}, position 17: distance to Exp(1) {got:.2f}, expected below 1.95. {LOOK}"


@pytest.mark.parametrize("seed", SEEDS)
def test_over_positions_the_noise_is_exponential(seed: int) -> None:
    """Of one token, as its share of draws in a long answer needs it."""
    samples = rows([seed] * 50_000, list(range(50_000)), 3)
    for token_id in range(3):
        got = kolmogorov_smirnov(samples[:, token_id])
        assert got < 1.95, f"seed {seed}, token {token_id}: distance to Exp(1) {got:.2f}, expected below 1.95. {LOOK}"


def test_over_seeds_the_noise_is_exponential() -> None:
    """Of consecutive seeds, as n answers to one prompt have them."""
    for first in (0, -25_000, 2**62):
        got = kolmogorov_smirnov(rows(list(range(first, first + 50_000)), [5] * 50_000, 2)[:, 1])
        assert got < 1.95, f"seeds from {first} on: distance to Exp(1) {got:.2f}, expected below 1.95. {LOOK}"


def test_every_token_is_the_largest_equally_often() -> None:
    """Chi-square over 20,000 rows of 64 tokens; 63 degrees of freedom exceed 103.4 once in 1,000 times."""
    smallest = rows([3] * 20_000, list(range(20_000)), 64).argmin(dim=1)
    counts = torch.bincount(smallest, minlength=64).double()
    got = float(((counts - 312.5) ** 2 / 312.5).sum())
    assert got < 103.4, f"which token has the smallest noise: chi-square {got:.1f}, expected below 103.4. {LOOK}"


@pytest.mark.parametrize("seed", [0, 7, 2**62])
def test_neighbors_are_independent(seed: int) -> None:
    """Neighboring seeds, positions and tokens, and both moved in opposite directions."""
    n, size = 400, 100
    base = rows([seed] * n, list(range(n)), size)
    pairs = {
        "the next position": (base, rows([seed] * n, list(range(1, n + 1)), size)),
        "the next seed": (base, rows([seed + 1] * n, list(range(n)), size)),
        "the next seed, one position earlier": (base[1:], rows([seed + 1] * (n - 1), list(range(n - 1)), size)),
        "the negative seed": (base, rows([-seed - 1] * n, list(range(n)), size)),
        "the next token": (base[:, :-1], base[:, 1:]),
        "the next token at the next position": (base[:-1, 1:], base[1:, :-1]),
    }
    for what, (a, b) in pairs.items():
        got = chi_square_of_pairs(a, b)
        assert got < 103.4, f"seed {seed} and {what}: chi-square {got:.1f}, expected below 103.4. {LOOK}"
        same = int((a == b).sum())
        assert same < 5, f"seed {seed} and {what}: {same} of {a.numel()} numbers are equal. {LOOK}"


# A function of (seed, position)


def test_the_noise_does_not_depend_on_the_batch() -> None:
    rng = random.Random(0)
    pairs = [
        (rng.choice([rng.randrange(100), rng.randrange(-(2**63), 2**63)]), rng.randrange(5_000)) for _ in range(40)
    ]
    alone = {pair: rows([pair[0]], [pair[1]], 333)[0] for pair in pairs}
    for _ in range(10):
        batch = [rng.choice(pairs) for _ in range(rng.randint(1, 20))]
        got = rows([seed for seed, _ in batch], [position for _, position in batch], 333)
        for number, pair in enumerate(batch):
            assert torch.equal(got[number], alone[pair]), (
                f"(seed, position) {pair} in row {number} of {len(batch)}: expected the noise that it has alone. {LOOK}"
            )


def test_a_smaller_vocabulary_has_the_same_noise() -> None:
    long, short = rows([7, 8], [3, 4], 1_000), rows([7, 8], [3, 4], 10)
    assert torch.equal(long[:, :10], short), (
        f"the first 10 of 1,000 tokens: expected {short}, got {long[:, :10]}. {LOOK}"
    )


def test_no_two_rows_are_alike() -> None:
    """Rows of 300 seeds at 100 positions: a repeated row would repeat a whole answer."""
    seeds = [*range(-100, 100), *(2**62 + i for i in range(50)), *(2**63 - 1 - i for i in range(50))]
    pairs = [(seed, position) for seed in seeds for position in range(100)]
    got = rows([seed for seed, _ in pairs], [position for _, position in pairs], 4)
    distinct = len(got.unique(dim=0))
    assert distinct == len(pairs), f"expected {len(pairs)} different rows, got {distinct}. {LOOK}"


def test_the_global_generator_is_not_used() -> None:
    before = torch.get_rng_state()
    rows([7], [3], 100)
    assert torch.equal(torch.get_rng_state(), before), f"seeded noise moved torch's global generator. {LOOK}"


# Its bits


def splitmix(x: int) -> int:
    """SplitMix64's output function, on unsigned integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def test_mix_is_splitmix64() -> None:
    """The first outputs of the published generator with seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([signed(1_234_567 + i * GOLDEN_RATIO) for i in range(1, 5)])
    got = [x & MASK for x in mix(states).tolist()]
    assert got == expected, f"SplitMix64 with seed 1234567: expected {expected}, got {got}. {LOOK_MIX}"
    rng = random.Random(0)
    numbers = [0, 1, -1, -(2**63), 2**63 - 1, *(rng.randrange(-(2**63), 2**63) for _ in range(200))]
    got = [x & MASK for x in mix(torch.tensor(numbers)).tolist()]
    assert got == [splitmix(x & MASK) for x in numbers], f"mix() and SplitMix64 differ. {LOOK_MIX}"


@pytest.mark.parametrize("num_bits", [1, 30, 33, 63])
def test_a_shift_brings_zeros_in(num_bits: int) -> None:
    numbers = [0, 1, 2**63 - 1, -1, -(2**63), -12_345]
    got, expected = shift_right(torch.tensor(numbers), num_bits).tolist(), [(x & MASK) >> num_bits for x in numbers]
    assert got == expected, f"{numbers} shifted by {num_bits}: expected {expected}, got {got}. {LOOK_MIX}"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_by_hand(seed: int) -> None:
    """The definition, on Python's integers."""
    position, golden = 11, GOLDEN_RATIO & MASK
    stream = splitmix((splitmix(seed & MASK) + position * golden) & MASK)
    expected = [-math.log1p(-((splitmix((stream + i * golden) & MASK) >> 33) / 2**31)) for i in range(1, 6)]
    got = rows([seed], [position], 5)[0].tolist()
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-9), f"seed {seed}: expected {expected}, got {got}. {LOOK}"


@pytest.mark.parametrize(("bits", "what"), [(0, "all bits 0"), (-1, "all bits 1")])
def test_the_noise_is_never_0_and_never_infinite(bits: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is chosen by p / noise: 0 would make it 0 / 0 for a token that must not be drawn, infinity 0 for all."""
    monkeypatch.setattr(noise, "mix", lambda x: torch.full_like(x, bits))
    got = rows([7, 8], [0, 1], 3)
    assert got.dtype == torch.float32, f"expected float32, got {got.dtype}. {LOOK}"
    assert (got > 0).all() and got.isfinite().all(), f"{what}: expected noise above 0 and finite, got {got}. {LOOK}"
    probs = torch.tensor([0.0, 1e-30, 1.0])
    assert int((probs / got[0]).argmax()) == 2, f"{what}: expected token 2 of {probs}, got another. {LOOK}"
