"""worker/sampler.py: from the token buffer's rows, for a whole batch, and without reading anything back from the device."""  # noqa: E501

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.outputs import Logprob
from common.sampling_params import SamplingParams
from part05_async_scheduling.worker import sampler as sampler_module
from part05_async_scheduling.worker.sampler import (
    LogprobsTensors,
    Sampler,
    SamplerOutput,
    SamplingState,
    apply_penalties,
    draw,
    probabilities,
    top_logprobs,
)
from tests.part05.no_reads import reads_of

LESSON = 'README "Tokens that nobody has seen yet"'
LOOK_PENALTIES = 'Look at worker/sampler.py::apply_penalties; README "One step ahead".'
LOOK_CHANGE = 'Look at worker/sampler.py::Sampler._change_logits; README "One step ahead".'
LOOK_CHOOSE = "Look at worker/sampler.py::Sampler._choose and draw."
LOOK_LOGPROBS = f"Look at worker/sampler.py::top_logprobs and LogprobsTensors.of; {LESSON}."
LOOK_READS = f"Look at worker/sampler.py::Sampler.sample and what it calls; {LESSON}."
VOCAB_SIZE = 50
EOS = frozenset({2, 3})
MAX_LEN = 40
OTHERS = 49  # what stands in the rest of the buffer: what others left there


class Rows:
    """A token buffer's data, with a row for each request, in another order than they are in the batch."""

    def __init__(self, num_rows: int = 8) -> None:
        self.data = torch.full((num_rows, MAX_LEN), OTHERS)
        self.free = list(reversed(range(num_rows)))
        self.free[0], self.free[-1] = self.free[-1], self.free[0]

    def state(self, prompt: Sequence[int] = (7,), output: Sequence[int] = (), **fields: Any) -> SamplingState:
        params, tokens, row = SamplingParams(**fields), [*prompt, *output], self.free.pop()
        generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
        self.data[row, : len(tokens)] = torch.tensor(tokens)
        return SamplingState(params, generator, row, len(prompt), len(tokens))


def random_logits(num_rows: int, seed: int) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


# Penalties


def penalised(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """The definition, token by token: repetition, then frequency and presence."""
    values = list(logits)
    for token_id in range(len(values)):
        if token_id in prompt or token_id in output:
            penalty = params.repetition_penalty
            values[token_id] = values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
        count = output.count(token_id)
        values[token_id] -= params.frequency_penalty * count
        if count:
            values[token_id] -= params.presence_penalty
    return values


PENALTIES: list[dict[str, Any]] = [
    dict(repetition_penalty=1.5),
    dict(repetition_penalty=0.5),
    dict(presence_penalty=1.5),
    dict(presence_penalty=-2.0),
    dict(frequency_penalty=0.7),
    dict(frequency_penalty=-1.0),
    dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
]
TEXTS = {
    "both": ([5, 11, 5, 20], [11, 30, 30, 30, 40]),
    "no output yet": ([5, 11, 5], []),
    "same token": ([7], [7, 7]),
    "edges": ([0], [49]),
}


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_apply_penalties_by_the_definition(text: str, fields: dict[str, Any]) -> None:
    """Repetition counts the prompt and the output, presence and frequency the output alone."""
    (prompt, output), params = TEXTS[text], SamplingParams(**fields)
    for seed in range(3):
        logits = random_logits(1, seed)[0]
        expected, before = penalised(logits.tolist(), prompt, output, params), logits.tolist()
        apply_penalties(logits, params, torch.tensor(prompt + output), torch.tensor(output, dtype=torch.int64))
        got = logits.tolist()
        wrong = [i for i in range(VOCAB_SIZE) if got[i] != pytest.approx(expected[i], abs=1e-4)]
        assert not wrong, (
            f"{fields}, prompt {prompt}, output {output}: token {wrong[0]} with logit {before[wrong[0]]:.3f} "
            f"expected {expected[wrong[0]]:.3f}, got {got[wrong[0]]:.3f}; wrong are {wrong}. {LOOK_PENALTIES}"
        )


def test_apply_penalties_changes_the_row_it_is_given_and_nothing_else() -> None:
    logits, tokens = random_logits(3, 1), torch.tensor([5, 6, 6, 7])
    before = logits.clone()
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=1.0, presence_penalty=0.5)
    assert apply_penalties(logits[1], params, tokens, tokens[2:]) is None  # type: ignore[func-returns-value]
    rows = [row for row in range(3) if not torch.equal(logits[row], before[row])]
    assert rows == [1], f"expected row 1 to change, in place, got {rows}. {LOOK_PENALTIES}"
    changed = (logits[1] != before[1]).nonzero().flatten().tolist()
    assert changed == [5, 6, 7], f"expected tokens 5, 6 and 7 to change, got {changed}. {LOOK_PENALTIES}"
    assert tokens.tolist() == [5, 6, 6, 7], f"the tokens became {tokens}. {LOOK_PENALTIES}"


def test_apply_penalties_reads_nothing_back() -> None:
    logits, tokens = random_logits(1, 1)[0], torch.tensor([5, 6, 6, 7])
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=1.0, presence_penalty=0.5)
    found = reads_of(lambda: apply_penalties(logits, params, tokens, tokens[2:]))
    assert not found, (
        f"{found} ask a tensor for its values: on a GPU the launch then waits for the step before. {LOOK_PENALTIES}"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_penalties_read_a_request_s_own_row_up_to_its_own_length(text: str) -> None:
    """What others left behind it, and in other rows, is not its text. The batch's order is not the buffer's."""
    (prompt, output), rows = TEXTS[text], Rows()
    states = [
        rows.state([1, 2], [3], temperature=0),
        rows.state(prompt, output, temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
        rows.state([40, 41], [42, 42], temperature=0, frequency_penalty=1.0),
    ]
    logits = random_logits(3, 3)
    texts = [([1, 2], [3]), (prompt, output), ([40, 41], [42, 42])]
    expected = [
        penalised(row, *each, state.params) for row, each, state in zip(logits.tolist(), texts, states, strict=True)
    ]
    buffer = rows.data.clone()
    Sampler(EOS).sample(logits, states, rows.data)
    for number, (got, wanted) in enumerate(zip(logits.tolist(), expected, strict=True)):
        wrong = [i for i in range(VOCAB_SIZE) if got[i] != pytest.approx(wanted[i], abs=1e-4)]
        assert not wrong, f"{text}, request {number} of 3: tokens {wrong} are wrong. {LOOK_CHANGE}"
    assert torch.equal(rows.data, buffer), f"the sampler changed the token buffer. {LOOK_CHANGE}"


def test_only_the_rows_that_ask_are_changed() -> None:
    rows, logits = Rows(), random_logits(4, 0)
    before = logits.clone()
    states = [
        rows.state([5], [6], temperature=0),
        rows.state([5], [6], temperature=0, repetition_penalty=2.0, logit_bias={9: 1.0}),
        rows.state([5], [6]),
        rows.state([5], [6], temperature=0, min_tokens=5),
    ]
    Sampler(EOS).sample(logits, states, rows.data)
    changed = [row for row in range(4) if not torch.equal(logits[row], before[row])]
    assert changed == [1, 3], f"rows 1 and 3 ask for changes: expected them to change, got {changed}. {LOOK_CHANGE}"
    assert float(logits[1, 9] - before[1, 9]) == pytest.approx(1.0), f"a bias of 1 on token 9. {LOOK_CHANGE}"


def test_the_bias_comes_before_the_penalties() -> None:
    rows, logits = Rows(), torch.zeros(1, VOCAB_SIZE)
    states = [rows.state([5], [6], temperature=0, repetition_penalty=2.0, logit_bias={6: 3.0})]
    Sampler(EOS).sample(logits, states, rows.data)
    assert float(logits[0, 6]) == 1.5, f"a bias of 3, halved: expected 1.5, got {float(logits[0, 6])}. {LOOK_CHANGE}"


@pytest.mark.parametrize(
    ("num_output", "fields", "expected"),
    [
        (0, {"min_tokens": 3}, [2, 3]),
        (2, {"min_tokens": 3}, [2, 3]),
        (3, {"min_tokens": 3}, []),
        (0, {}, []),
        (2, {"min_tokens": 3, "stop_token_ids": [9, 8]}, [2, 3, 8, 9]),
        (2, {"min_tokens": 3, "ignore_eos": True}, []),
        (2, {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [9, 2]}, [2, 9]),
        (2, {"min_tokens": 3, "logit_bias": {2: 100.0}}, [2, 3]),
    ],
    ids=str,
)
def test_min_tokens(num_output: int, fields: dict[str, Any], expected: list[int]) -> None:
    """num_tokens of the state counts the token that is in flight, so min_tokens does as well."""
    rows, logits = Rows(), random_logits(1, 4)
    states = [rows.state([7, 8, 9], [5] * num_output, temperature=0, **fields)]
    Sampler(EOS).sample(logits, states, rows.data)
    held_back = [token_id for token_id, value in enumerate(logits[0].tolist()) if value == -math.inf]
    assert held_back == expected, (
        f"{fields}, end-of-sequence tokens 2 and 3, {num_output} tokens are out: expected {expected} held back, got "
        f"{held_back}. {LOOK_CHANGE}"
    )


# The choice


def definition(logits: list[float], params: SamplingParams) -> list[float]:
    """Probabilities of one row after temperature, top-k and top-p, in plain Python; not normalised after top-p."""
    scaled = [value / params.temperature for value in logits]
    kth = sorted(scaled, reverse=True)[min(params.top_k or len(scaled), len(scaled)) - 1]
    weights = [math.exp(value - max(scaled)) if value >= kth else 0.0 for value in scaled]
    probs = [weight / sum(weights) for weight in weights]
    kept, mass = [0.0] * len(probs), 0.0
    for token_id in sorted(range(len(probs)), key=lambda token_id: -probs[token_id]):
        if mass < params.top_p or params.top_p == 1:
            kept[token_id] = probs[token_id]
        mass += probs[token_id]
    return kept


CHOICES: list[dict[str, Any]] = [
    *({}, {"temperature": 0.5}, {"temperature": 5.0}, {"top_k": 1}, {"top_k": 5}, {"top_k": 1_000}),
    *({"top_p": 0.9}, {"top_p": 0.5}, {"top_p": 1e-9}, {"top_k": 5, "top_p": 0.7}, {"temperature": 0.3, "top_p": 0.95}),
]


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_each_row_by_the_definition(seed: int) -> None:
    logits, rows = random_logits(len(CHOICES), seed), Rows(len(CHOICES))
    states, before = [rows.state(**fields) for fields in CHOICES], logits.clone()
    batch = probabilities(logits, states)
    for row, fields in enumerate(CHOICES):
        expected = torch.tensor(definition(logits[row].tolist(), states[row].params))
        alone = probabilities(logits[row : row + 1], states[row : row + 1])[0]
        for got, what in ((batch[row], f"in row {row} of a mixed batch"), (alone, "alone")):
            assert torch.allclose(got, expected, atol=1e-5), (
                f"{fields} {what}: expected {expected}, got {got}. Look at worker/sampler.py::probabilities."
            )
    assert torch.equal(logits, before), "probabilities() changed the logits it was given. Look at worker/sampler.py."


def test_greedy_and_drawn_rows() -> None:
    fields: list[dict[str, Any]] = [
        *(dict(temperature=0), dict(seed=1), dict(temperature=0, top_k=3), dict(top_k=1, seed=2), dict(seed=3))
    ]
    logits, rows = random_logits(5, 1), Rows()
    best = logits.argmax(dim=-1).tolist()
    drawn: list[set[int]] = [set() for _ in fields]
    states = [rows.state(**each) for each in fields]
    for _ in range(30):
        token_ids = Sampler(EOS).sample(logits.clone(), states, rows.data).token_ids
        assert token_ids.dtype is torch.int64 and token_ids.shape == (5,), f"got {token_ids}. {LOOK_CHOOSE}"
        for row, token_id in enumerate(token_ids.tolist()):
            drawn[row].add(token_id)
    for row in (0, 2, 3):
        assert drawn[row] == {best[row]}, f"{fields[row]}: expected always {best[row]}, got {drawn[row]}. {LOOK_CHOOSE}"
    for row in (1, 4):
        assert len(drawn[row]) > 3, f"{fields[row]}: 30 draws gave only {drawn[row]}. {LOOK_CHOOSE}"


def test_a_batch_that_is_all_greedy_draws_nothing() -> None:
    before, rows, logits = torch.get_rng_state(), Rows(), random_logits(4, 2)
    got = Sampler(EOS).sample(logits.clone(), [rows.state(temperature=0) for _ in range(4)], rows.data).token_ids
    assert torch.equal(got, logits.argmax(dim=-1)), f"expected the likeliest tokens, got {got}. {LOOK_CHOOSE}"
    assert torch.equal(torch.get_rng_state(), before), f"greedy requests moved torch's global generator. {LOOK_CHOOSE}"


def test_a_seed_draws_the_same_whatever_shares_the_batch() -> None:
    def draws(neighbours: list[dict[str, Any]], row: int, seed: int = 7) -> list[int]:
        rows = Rows()
        others = [rows.state(**fields) for fields in neighbours]
        states = [*others[:row], rows.state(seed=seed, temperature=1.3, top_p=0.95), *others[row:]]
        drawn = []
        for step in range(25):
            logits = random_logits(len(states), 1_000 + step)
            logits[row] = random_logits(1, step)[0]
            drawn.append(int(Sampler(EOS).sample(logits, states, rows.data).token_ids[row]))
        return drawn

    alone = draws([], 0)
    crowds: list[tuple[list[dict[str, Any]], int]] = [
        ([{}], 0),
        ([{}], 1),
        ([{"temperature": 0}, {"seed": 7}, {"seed": 8}], 2),
        ([{"top_k": 3}, {"top_p": 0.5}, {"seed": 1, "temperature": 3.0}, {}], 4),
    ]
    for neighbours, row in crowds:
        got = draws(neighbours, row)
        assert got == alone, f"seed 7 in row {row} beside {neighbours}: expected {alone}, got {got}. {LOOK_CHOOSE}"
    assert draws([], 0, seed=8) != alone, f"seeds 7 and 8 draw the same. {LOOK_CHOOSE}"


def test_draws_are_distributed_as_they_should() -> None:
    """Chi-square over 20,000 draws with a fixed seed; 33.7 is passed by chance once in 10,000 times."""
    num_draws, logits = 20_000, torch.tensor([1.0, 2.0, 0.5, -1.0, 2.5, 0.0, 1.5, -0.5, 1.2, 0.7])
    for seed in (None, 5):
        state = Rows().state(seed=seed)
        probs = probabilities(logits.unsqueeze(0), [state]).expand(num_draws, -1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            counts = torch.bincount(draw(probs, [state] * num_draws), minlength=10).tolist()
        expected = logits.softmax(dim=-1).tolist()
        pairs = zip(counts, expected, strict=True)
        got = sum((count - num_draws * p) ** 2 / (num_draws * p) for count, p in pairs)
        assert got < 33.7, f"seed {seed}: {num_draws} draws of {expected} gave {counts}, {got:.1f}. {LOOK_CHOOSE}"


# Log-probabilities


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_the_raw_models(num_top: int) -> None:
    """Whatever temperature, bias and penalties do to the choice; and as many as each request has asked for."""
    fields: list[dict[str, Any]] = [
        dict(temperature=0),
        dict(temperature=3.0, seed=1, top_k=40),
        dict(temperature=0, logit_bias={31: 50.0}),
        dict(temperature=0, presence_penalty=2.0, repetition_penalty=2.0),
    ]
    rows, logits = Rows(), random_logits(5, 5)
    states = [rows.state([7], [8], logprobs=num_top, **each) for each in fields]
    states.append(rows.state(temperature=0, logprobs=7))  # a neighbour that wants another number
    raw = logits.log_softmax(dim=-1).tolist()
    output = Sampler(EOS).sample(logits, states, rows.data)
    assert output.logprobs is not None, f"they were asked for. {LOOK_LOGPROBS}"
    for row, (each, expected) in enumerate(zip(fields, raw, strict=False)):
        entry, token_id = output.logprobs.of(row, num_top), int(output.token_ids[row])
        where, ranked = f"{each}, logprobs={num_top}", sorted(range(VOCAB_SIZE), key=lambda i: -expected[i])
        wanted = [token_id, *(i for i in ranked[:num_top] if i != token_id)]
        assert list(entry) == wanted, f"{where}: expected tokens {wanted}, got {list(entry)}. {LOOK_LOGPROBS}"
        for i, logprob in entry.items():
            assert type(logprob.logprob) is float and logprob.logprob == pytest.approx(expected[i], abs=1e-4), (
                f"{where}: token {i} expected {expected[i]:.4f} (raw logits), got {logprob}. {LOOK_LOGPROBS}"
            )
            rank = ranked.index(i) + 1
            assert type(logprob.rank) is int and logprob.rank == rank, (
                f"{where}: rank {rank}, {logprob}. {LOOK_LOGPROBS}"
            )
    assert int(output.token_ids[2]) == 31, f"a bias of 50 on token 31, got {output.token_ids}. {LOOK_CHANGE}"


def test_logprobs_of_one_row_by_hand() -> None:
    ids = torch.tensor([[9, 4, 9, 1], [3, 3, 5, 6]])
    values = torch.tensor([[-1.5, -0.5, -1.5, -2.5], [-0.25, -0.25, -3.0, -4.0]])
    tensors = LogprobsTensors(ids, values, torch.tensor([2, 1]))
    cases = {
        (0, 3): {9: Logprob(-1.5, 2), 4: Logprob(-0.5, 1), 1: Logprob(-2.5, 3)},
        (0, 1): {9: Logprob(-1.5, 2), 4: Logprob(-0.5, 1)},
        (0, 0): {9: Logprob(-1.5, 2)},
        (1, 2): {3: Logprob(-0.25, 1), 5: Logprob(-3.0, 2)},
    }
    for (row, num_top), expected in cases.items():
        got = tensors.of(row, num_top)
        assert list(got.items()) == list(expected.items()), (
            f"row {row}, the {num_top} likeliest: expected {expected}, got {got}. {LOOK_LOGPROBS}"
        )


def test_top_logprobs_are_what_is_copied() -> None:
    logprobs = random_logits(3, 7).log_softmax(dim=-1)
    tensors = top_logprobs(logprobs, torch.tensor([4, 5, 6]), 2)
    shapes = (tensors.token_ids.shape, tensors.logprobs.shape, tensors.ranks.shape)
    assert shapes == ((3, 3), (3, 3), (3,)), f"sampled and two likeliest, for three requests: got {shapes}."
    assert tensors.token_ids[:, 0].tolist() == [4, 5, 6], f"the sampled ones come first: {tensors}. {LOOK_LOGPROBS}"


def test_without_a_request_for_them_there_are_no_logprobs() -> None:
    rows = Rows()
    states = [rows.state(temperature=0)]
    assert Sampler(EOS).sample(random_logits(1, 0), states, rows.data).logprobs is None, (
        f"nobody asked. {LOOK_LOGPROBS}"
    )
    states = [replace(states[0], params=SamplingParams(temperature=0, logprobs=0))]
    assert Sampler(EOS).sample(random_logits(1, 0), states, rows.data).logprobs is not None, "0 is not None"


def test_to_cpu_keeps_everything() -> None:
    ids, values = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]])
    output = SamplerOutput(torch.tensor([1]), LogprobsTensors(ids, values, torch.tensor([3]))).to_cpu()
    assert output.token_ids.tolist() == [1] and output.logprobs is not None, f"got {output}"
    got = (output.logprobs.token_ids, output.logprobs.logprobs, output.logprobs.ranks)
    assert [each.tolist() for each in got] == [[[1, 2]], [[0.5, 0.25]], [3]], f"got {got}. Look at SamplerOutput.to_cpu"
    assert SamplerOutput(torch.tensor([1]), None).to_cpu().logprobs is None


def test_sampling_reads_nothing_back() -> None:
    """All that can be asked for at once. On a GPU a value that is read back waits for all that was launched before."""
    rows, logits = Rows(), random_logits(6, 1)
    states = [
        rows.state(temperature=0),
        rows.state(),
        rows.state([5, 6], [6, 7], seed=3, top_k=5, top_p=0.9, repetition_penalty=1.3, logprobs=2),
        rows.state([5], [6], temperature=0, presence_penalty=1.0, frequency_penalty=1.0, logit_bias={5: 1.0}),
        rows.state([5], [], temperature=0, min_tokens=3, stop_token_ids=[9]),
        rows.state(temperature=2.0, top_k=3, seed=8),
    ]
    found = reads_of(lambda: Sampler(EOS).sample(logits, states, rows.data))
    assert not found, f"{found} ask a tensor for its values. {LOOK_READS}"
    for name in (".item(", ".tolist(", ".nonzero(", ".cpu("):  # what a mode of torch cannot see
        where = inspect.getsource(sampler_module).replace(inspect.getsource(LogprobsTensors), "")
        assert name not in where, f"worker/sampler.py has a {name}…) outside of LogprobsTensors.of. {LOOK_READS}"


def test_the_watch_for_reads_sees_them() -> None:
    """Else the test above would prove nothing."""
    tensor = torch.tensor([1.0, 2.0])
    for work in (
        lambda: tensor[0].item(),
        lambda: tensor.tolist(),
        lambda: bool(tensor.sum()),
        lambda: tensor.nonzero(),
        lambda: tensor[tensor > 1],
        lambda: int(tensor[0]),
        lambda: tensor.to("cpu"),
        lambda: torch.where(tensor > 1),
        lambda: tensor.__setitem__(tensor > 1, 0),
    ):
        assert reads_of(work), f"{inspect.getsource(work).strip()} reads a value, and is not noticed"
