"""router/policies.py: which replica gets a request."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from part10_data_parallelism.router import policies
from part10_data_parallelism.router.policies import (
    POLICIES,
    CacheAware,
    ConsistentHash,
    LeastPending,
    Policy,
    PolicyName,
    PowerOfTwo,
    RoundRobin,
    RoutedRequest,
    is_out_of_balance,
    make_policy,
)
from part10_data_parallelism.router.prefix_index import CHUNK_CHARS
from part10_data_parallelism.router.replica import Replica
from tests.part10.scripted import loads_of, replicas_with, text_of

LOOK = 'Look at router/policies.py; README "What a router can know".'
LOOK_TWO = 'Look at router/policies.py::PowerOfTwo.choose; README "What a router can know".'
LOOK_HASH = 'Look at router/policies.py::ConsistentHash.choose; README "Sessions".'
AROUND = "A key beyond the last point belongs to the first one."
LOOK_CACHE = 'Look at router/policies.py::CacheAware._choose; README "Prefix affinity against load".'
LOOK_NOTED = 'Look at router/policies.py::CacheAware.choose; README "Prefix affinity against load".'
LOOK_BALANCE = 'Look at router/policies.py::is_out_of_balance; README "Prefix affinity against load".'
REQUEST = RoutedRequest("hello")


def choose(
    policy: Policy, replicas: Sequence[Replica], request: RoutedRequest = REQUEST, look: str = LOOK, hint: str = ""
) -> int:
    """The index of the replica that was chosen. If choose() raises, the message says for which replicas.

    hint: why it could raise.
    """
    what = f"replicas with {loads_of(replicas)} unfinished requests"
    try:
        chosen = policy.choose(replicas, request)
    except (LookupError, ValueError) as error:
        pytest.fail(f"{what}: choose() fails with {error!r}. {f'{hint} ' if hint else ''}{look}")
    assert chosen in replicas, f"{what}: expected one of these Replica objects, got {chosen!r}. {look}"
    return list(replicas).index(chosen)


def count(policy: Policy, replicas: Sequence[Replica], number: int, look: str = LOOK) -> list[int]:
    """How many of a number of requests each replica gets. None begins before all are routed."""
    got = Counter(choose(policy, replicas, REQUEST, look) for _ in range(number))
    return [got[index] for index in range(len(replicas))]


# Without a look at the request


def test_round_robin() -> None:
    replicas, policy = replicas_with(9, 0, 0), RoundRobin()
    got = [choose(policy, replicas) for _ in range(5)]
    assert got == [0, 1, 2, 0, 1], f"5 requests for 3 replicas: expected [0, 1, 2, 0, 1], got {got}. {LOOK}"


def test_least_pending_and_its_ties() -> None:
    policy = LeastPending(random.Random(0))
    got = choose(policy, replicas_with(3, 1, 2))
    assert got == 1, f"3, 1 and 2 unfinished requests: expected replica 1, got {got}. {LOOK}"
    shares = count(policy, replicas_with(0, 0, 5, 0), 300)
    assert shares[2] == 0 and min(shares[0], shares[1], shares[3]) > 60, (
        f"300 requests, replica 2 is busy and the others idle: expected about 100 each for the others, got {shares}. "
        f"{LOOK}"
    )


def test_power_of_two_looks_at_unfinished_requests() -> None:
    """One replica has served a thousand requests and is idle; the other is new and has three."""
    replicas = replicas_with(0, 3)
    replicas[0].num_requests, replicas[1].num_requests = 1_000, 3
    got = count(PowerOfTwo(random.Random(0)), replicas, 50, LOOK_TWO)
    assert got == [50, 0], (
        f"0 and 3 unfinished requests, 1,000 and 3 since the start: expected all 50 at replica 0, got {got}. "
        f"Both are drawn, and compared by num_pending, which falls when a request ends. {LOOK_TWO}"
    )


def test_power_of_two_prefers_the_less_loaded_of_two() -> None:
    got = count(PowerOfTwo(random.Random(0)), replicas_with(0, 1, 2, 3), 1_200, LOOK_TWO)
    assert got[3] == 0, (
        f"0, 1, 2 and 3 unfinished requests: expected none of 1,200 at replica 3, which is never the less loaded of "
        f"two different ones, got {got}. {LOOK_TWO}"
    )
    for index, expected in enumerate((600, 400, 200)):  # of 6 pairs, 3, 2 and 1
        assert abs(got[index] - expected) < 60, (
            f"0, 1, 2 and 3 unfinished requests: expected about [600, 400, 200, 0] of 1,200, since only two replicas "
            f"are compared, got {got}. {LOOK_TWO}"
        )


def test_power_of_two_among_idle_replicas() -> None:
    got = count(PowerOfTwo(random.Random(0)), replicas_with(0, 0, 0, 0), 1_200, LOOK_TWO)
    assert all(abs(each - 300) < 60 for each in got), (
        f"all 4 replicas are idle: expected about 300 of 1,200 requests each, got {got}. Ties must not always go to "
        f"the one that comes first in the list. {LOOK_TWO}"
    )


def test_power_of_two_with_one_replica() -> None:
    got = choose(PowerOfTwo(random.Random(0)), replicas_with(5), look=LOOK_TWO, hint="There may be fewer than two.")
    assert got == 0, f"there is one replica: expected it, got {got}. {LOOK_TWO}"


def test_power_of_two_draws_with_the_generator_it_was_given() -> None:
    replicas = replicas_with(0, 0, 0, 0)
    got = [
        [choose(policy, replicas, look=LOOK_TWO) for _ in range(50)]
        for policy in (PowerOfTwo(random.Random(7)) for _ in range(2))
    ]
    assert got[0] == got[1], f"expected the same seed to give the same choices: draw with self.rng. {LOOK_TWO}"


@pytest.mark.parametrize(
    ("loads", "expected"),
    [([40, 5], True), ([37, 5], False), ([400, 365], False), ([33, 0], True), ([32, 0], False), ([7], False)],
)
def test_out_of_balance(loads: list[int], expected: bool) -> None:
    got = is_out_of_balance(loads)
    assert got is expected, f"{loads}: expected {expected}, got {got}. {LOOK_BALANCE}"


# Consistent hashing


def test_a_session_stays_where_it_is() -> None:
    replicas, policy = replicas_with(*[0] * 8), ConsistentHash()
    for number in range(50):
        got = set()
        for load in range(3):
            replicas[number % 8].num_pending = load
            request = RoutedRequest(f"text {load}", f"session {number}")
            got.add(choose(policy, replicas, request, LOOK_HASH, AROUND))
        assert len(got) == 1, f"session {number} went to the replicas {sorted(got)}, expected one. {LOOK_HASH}"


def test_only_the_sessions_of_a_lost_replica_move() -> None:
    replicas, policy = replicas_with(*[0] * 8), ConsistentHash()
    sessions = [RoutedRequest("", f"session {number}") for number in range(800)]
    before = [replicas[choose(policy, replicas, session, LOOK_HASH, AROUND)] for session in sessions]
    shares = [before.count(replica) for replica in replicas]
    assert min(shares) > 50 and max(shares) < 200, (
        f"800 sessions, 8 replicas: expected about 100 each, got {shares}. {LOOK_HASH}"
    )
    lost = replicas.pop(3)
    after = [replicas[choose(policy, replicas, session, LOOK_HASH, AROUND)] for session in sessions]
    moved = [was for was, now in zip(before, after, strict=True) if was is not now]
    assert set(moved) == {lost}, (
        f"800 sessions, and one replica of 8 was lost: expected only its {before.count(lost)} sessions to move, "
        f"{len(moved)} moved. {LOOK_HASH}"
    )
    shares = [after.count(replica) for replica in replicas]
    assert max(shares) < 250, f"the lost replica's sessions are spread over the others, got {shares}. {LOOK_HASH}"


@pytest.mark.parametrize(("key", "expected"), [(5, 1), (15, 0), (25, 2), (35, 0), (45, 1)])
def test_a_key_belongs_to_the_next_point(key: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last point comes the first one: it is a ring."""
    ring = [(10, 1), (20, 0), (30, 2), (40, 0)]
    monkeypatch.setattr(policies, "_point", lambda text: key)
    monkeypatch.setattr(ConsistentHash, "_ring", lambda self, urls: ring)
    hint = f"The ring is {ring}, the key {key}. {AROUND}"
    got = choose(ConsistentHash(), replicas_with(0, 0, 0), look=LOOK_HASH, hint=hint)
    assert got == expected, (
        f"the ring is {ring}, pairs of a point and a replica: expected replica {expected} for the key {key}, got "
        f"{got}. {LOOK_HASH}"
    )


# Cache-aware


def cache_aware() -> CacheAware:
    return CacheAware(random.Random(0), 100_000)


@pytest.mark.parametrize("loads", [(0, 30), (0, 32), (365, 400)])
def test_a_known_prompt_goes_where_it_is_known(loads: tuple[int, int]) -> None:
    replicas, policy, prompt = replicas_with(*loads), cache_aware(), text_of(0, 6)
    policy.index.insert(prompt, replicas[1])
    got = choose(policy, replicas, RoutedRequest(prompt), LOOK_CACHE)
    assert got == 1, (
        f"replica 1 has all of the prompt, and loads {loads} are not out of balance: expected replica 1, got {got}. "
        f"{LOOK_CACHE}"
    )


@pytest.mark.parametrize(("num_known", "num_new", "expected"), [(3, 4, 0), (3, 3, 0), (4, 3, 1)])
def test_more_than_half_of_a_prompt_must_be_known(num_known: int, num_new: int, expected: int) -> None:
    replicas, policy, known = replicas_with(0, 30), cache_aware(), text_of(0, 6)
    policy.index.insert(known, replicas[1])
    prompt = known[: num_known * CHUNK_CHARS] + text_of(1, num_new)
    got = choose(policy, replicas, RoutedRequest(prompt), LOOK_CACHE)
    assert got == expected, (
        f"replica 1 has {num_known} of the prompt's {num_known + num_new} chunks and 30 requests, replica 0 is idle: "
        f"expected replica {expected}, got {got}. A match must be longer than MIN_MATCH (a half) of the prompt. "
        f"{LOOK_CACHE}"
    )


def test_of_several_that_know_a_prompt_the_least_loaded_gets_it() -> None:
    replicas, policy, prompt = replicas_with(9, 2, 0), cache_aware(), text_of(0, 6)
    for replica in replicas[:2]:
        policy.index.insert(prompt, replica)
    got = choose(policy, replicas, RoutedRequest(prompt), LOOK_CACHE)
    assert got == 1, (
        f"replicas 0 and 1 have all of the prompt, with 9 and 2 unfinished requests: expected replica 1, got {got}. "
        f"{LOOK_CACHE}"
    )


def test_of_idle_ones_that_know_a_prompt_any_gets_it() -> None:
    replicas, policy, prompt = replicas_with(0, 0, 0), cache_aware(), text_of(0, 6)
    for replica in replicas[:2]:
        policy.index.insert(prompt, replica)
    got = Counter(choose(policy, replicas, RoutedRequest(prompt), LOOK_CACHE) for _ in range(200))
    assert got[2] == 0 and min(got[0], got[1]) > 60, (
        f"replicas 0 and 1 have all of the prompt, and all are idle: expected about 100 of 200 requests at each of the "
        f"two, got {[got[0], got[1], got[2]]}. {LOOK_CACHE}"
    )


@pytest.mark.parametrize(("loads", "known"), [((0, 40), [1]), ((0, 5, 40), [1, 2]), ((0, 5, 40), [1])])
def test_load_that_is_out_of_balance_overrides_the_prefix(loads: tuple[int, ...], known: list[int]) -> None:
    replicas, policy, prompt = replicas_with(*loads), cache_aware(), text_of(0, 6)
    for index in known:
        policy.index.insert(prompt, replicas[index])
    got = choose(policy, replicas, RoutedRequest(prompt), LOOK_CACHE)
    assert got == 0, (
        f"the loads {loads} of all replicas are out of balance, and the replicas {known} have the prompt: expected "
        f"replica 0, which has the least load of all, got {got}. {LOOK_CACHE}"
    )


def test_a_choice_by_load_is_noted_too() -> None:
    """The replica will have the prompt in its cache, whyever it was chosen."""
    replicas, policy, prompt = replicas_with(0, 40), cache_aware(), text_of(0, 6)
    policy.index.insert(prompt, replicas[1])
    chosen = replicas[choose(policy, replicas, RoutedRequest(prompt), LOOK_CACHE)]
    holders, _ = policy.index.match(prompt, replicas)
    assert chosen in holders, f"the replica that got the prompt is not among its holders in the index. {LOOK_NOTED}"


def test_a_prompt_that_no_replica_knows_goes_where_load_is_least() -> None:
    """The replica with the most load has seen fewer prompts, as one that is slow has."""
    replicas, policy = replicas_with(0, 30), cache_aware()
    for number in range(200):
        policy.index.insert(text_of(number, 6), replicas[number % 50 == 0])
    got = Counter(choose(policy, replicas, RoutedRequest(text_of(1_000 + n, 6)), LOOK_CACHE) for n in range(50))
    assert got[0] == 50, (
        f"50 prompts that no replica knows, 0 and 30 unfinished requests: expected all at replica 0, got "
        f"{[got[0], got[1]]}. How much a replica knows of other prompts must not matter. {LOOK_CACHE}"
    )


def test_no_death_spiral() -> None:
    """A replica that has just started knows the least. If it got all new prompts for that, it would be overloaded."""
    replicas, policy = replicas_with(0, 0), cache_aware()
    for number in range(200):
        policy.index.insert(text_of(number, 6), replicas[0])
    got = Counter(choose(policy, replicas, RoutedRequest(text_of(1_000 + n, 6)), LOOK_CACHE) for n in range(200))
    assert min(got[0], got[1]) > 60, (
        f"200 prompts that no replica knows, two idle replicas, one of which has just started: expected about 100 "
        f"each, got {[got[0], got[1]]}. Load decides, and ties go to any: how much a replica knows of other prompts "
        f"must not matter. {LOOK_CACHE}"
    )


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_name(name: PolicyName) -> None:
    """It chooses among those that it is given, also after it was told to forget one."""
    replicas, policy = replicas_with(0, 0), make_policy(name, 1_000)
    assert choose(policy, replicas) in (0, 1), LOOK
    policy.forget(replicas[0])
    assert choose(policy, replicas[1:]) == 0, f"{name}: only one replica is left. {LOOK}"
