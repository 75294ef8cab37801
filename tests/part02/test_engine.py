"""`LLM.stream`: part 1's answers, token by token; the text that is shown; and no unrequested work."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from common.checkpoint import MODELS_DIR
from common.errors import FieldError
from common.outputs import CompletionOutput
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy, small_model
from part02_streaming.config import EngineConfig
from part02_streaming.engine import LLM, check_stop, join_outputs, sample

STREAM = 'Look at engine.py::LLM.stream; README "The loop becomes a generator".'
SHOWN = 'Look at the detokenizer in engine.py::LLM.stream; README "Stop strings".'
PROMPT = [980, 899, 414, 14, 1115, 469, 288, 265, 1321, 274]  # "One fine day, Nora went to the market and"
EOS = frozenset({2, 3})


def stream(llm: LLM, prompt: list[int] = PROMPT, **fields: Any) -> list[CompletionOutput]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 16, **fields})
    outputs = list(islice(llm.stream(prompt, params), params.max_tokens + 1))
    assert len(outputs) <= params.max_tokens, f"{fields}: the stream goes on after {params.max_tokens} tokens. {STREAM}"
    return outputs


def run(llm: LLM, prompt: list[int] = PROMPT, **fields: Any) -> CompletionOutput:
    return join_outputs(stream(llm, prompt, **fields))


def decode(llm: LLM, token_ids: Sequence[int]) -> str:
    return llm.tokenizer.decode(token_ids, skip_special_tokens=True)


def scripted(llm: LLM, token_ids: Sequence[int]) -> LLM:
    """The same engine over a model that outputs these tokens, whatever its input."""
    fake, script = copy.copy(llm), iter(token_ids)

    def forward(new_token_ids: list[int], first_position: int, cache: DynamicCache) -> torch.Tensor:
        fake.num_positions_computed += len(new_token_ids)
        return torch.nn.functional.one_hot(torch.tensor(next(script)), llm.model.config.vocab_size).float()

    fake.forward = forward  # type: ignore[method-assign]
    return fake


# The tokens


@pytest.mark.parametrize("text", ["Why is decode memory-bound?", "Who are you?"])
def test_greedy_equals_transformers_for_a_chat(llm: LLM, text: str) -> None:
    body = {"messages": [{"role": "user", "content": text}]}
    check_greedy(llm, encode_prompt(body, llm.tokenizer, llm.max_model_len))


@pytest.mark.parametrize("text", ["<|im_end|>", "Mia had a red kite. The wind", "🦊🦊 and a 🐻", "word " * 500])
def test_greedy_equals_transformers_for_a_text(llm: LLM, text: str) -> None:
    check_greedy(llm, llm.tokenizer.encode(text))


def check_greedy(llm: LLM, prompt: list[int]) -> None:
    got = run(llm, prompt, max_tokens=10).token_ids
    expected = reference_greedy(llm.model, prompt, 10, sorted(llm.eos_token_ids))
    assert_same_greedy(llm.model, prompt, got, expected, where=f"prompt {prompt[:8]}…. {STREAM} Difference")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_on_random_models(tmp_path: Path, family: str) -> None:
    reference = small_model(family, seed=1)
    reference.save_pretrained(tmp_path)
    for path in (MODELS_DIR / "tiny").glob("*"):
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, tmp_path)
    llm = LLM(EngineConfig(model=str(tmp_path), device="cpu"))
    rng = random.Random(1)
    for length in (1, 2, 90):
        prompt = [rng.randrange(reference.config.vocab_size) for _ in range(length)]
        got = run(llm, prompt, max_tokens=20, ignore_eos=True).token_ids
        expected = reference_greedy(reference, prompt, 20)
        assert_same_greedy(reference, prompt, got, expected, f"{family}, prompt of {length}. {STREAM} Difference")


def test_a_seed_makes_an_answer_reproducible(llm: LLM) -> None:
    fields = {"temperature": 5.0, "top_k": 500, "top_p": 0.99, "max_tokens": 12, "ignore_eos": True}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, other = (run(llm, seed=seed, **fields) for seed in (7, 8))
    look = f"Look at the generator. {STREAM}"
    assert torch.equal(torch.get_rng_state(), before), f"seeded requests moved torch's global generator. {look}"
    unseeded = [run(llm, **fields).token_ids for _ in range(2)]
    again = run(llm, seed=7, **fields)
    assert again == first, f"seed 7 twice: {first.token_ids} and {again.token_ids}. {look}"
    assert first.token_ids != other.token_ids, f"seeds 7 and 8 gave one answer at temperature 5. {look}"
    assert unseeded[0] != unseeded[1], f"two unseeded requests at temperature 5 gave one answer. {look}"


def test_two_streams_in_turns_are_two_answers(llm: LLM) -> None:
    """Each generator has its own state: a cache, a detokenizer and a seed."""
    fields = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    prompts = [PROMPT, [100, 101, 102]]
    alone = [run(llm, prompt, seed=seed, **fields) for seed, prompt in enumerate(prompts)]
    streams = [llm.stream(prompt, SamplingParams(seed=seed, **fields)) for seed, prompt in enumerate(prompts)]
    pairs = list(zip(*streams, strict=True))
    for number, expected in enumerate(alone):
        got = join_outputs([pair[number] for pair in pairs])
        assert got == expected, (
            f"a stream that runs at the same time as another: expected {expected}, got {got}. {STREAM}"
        )


# The pieces


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"max_tokens": 1}, {"max_tokens": 60, "seed": 3}], ids=str)
def test_each_output_is_one_token_and_its_text(llm: LLM, fields: dict[str, Any]) -> None:
    outputs = stream(llm, **{"temperature": 1.0, "seed": 0, **fields})
    counts = [len(output.token_ids) for output in outputs]
    assert set(counts) == {1}, f"{fields}: each output holds one new token, got {counts} tokens. {STREAM}"
    reasons = [output.finish_reason for output in outputs]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1]), (
        f"{fields}: the last output and no other has a finish_reason, got {reasons}. {STREAM}"
    )
    assert {output.index for output in outputs} == {0}, f"{fields}: there is one answer, number 0, got {outputs}"
    answer = join_outputs(outputs)
    shown = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
    assert answer.text == decode(llm, shown), (
        f"{fields}: the texts joined are {answer.text!r}, the tokens decode to {decode(llm, shown)!r}. {SHOWN}"
    )


def test_generate_is_the_stream_joined(llm: LLM) -> None:
    prompt = list(PROMPT)
    for fields in ({}, {"max_tokens": 1}, {"stop": " ", "temperature": 1.0, "seed": 1}):
        params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **fields})
        result, expected = llm.generate(prompt, params), join_outputs(list(llm.stream(prompt, params)))
        assert result.outputs == [expected], f"{fields}: expected {expected}, got {result.outputs}. {STREAM}"
        assert result.finished and result.prompt_token_ids == prompt == PROMPT, f"{fields}: got {result}. {STREAM}"
        assert result.usage["completion_tokens"] == len(expected.token_ids), f"{fields}: got {result.usage}. {STREAM}"


def test_join_outputs() -> None:
    pieces = [CompletionOutput(0, "", [5], None, None), CompletionOutput(0, "ab ", [7], None, None)]
    last = CompletionOutput(0, "c", [9], "stop", "END")
    got = join_outputs([*pieces, last])
    expected = CompletionOutput(0, "ab c", [5, 7, 9], "stop", "END")
    assert got == expected, f"expected {expected}, got {got}. Look at engine.py::join_outputs."


@pytest.mark.parametrize(("count", "expected"), [(2, "a\ufffd"), (4, "a\ufffd"), (5, "a🦊"), (6, "a🦊b")])
def test_half_a_character_at_the_end(llm: LLM, count: int, expected: str) -> None:
    """By length, or before the end-of-sequence token: what cannot become a character is shown as U+FFFD."""
    script = llm.tokenizer.encode("a🦊b", add_special_tokens=False)
    assert len(script) == 6, "this test counts on four tokens for 🦊"
    [eos] = llm.eos_token_ids
    for tokens, max_tokens in ((script, count), ([*script[:count], eos], 16)):
        outputs = stream(scripted(llm, tokens), max_tokens=max_tokens)
        got = [output.text for output in outputs]
        assert "".join(got) == expected, (
            f"tokens {tokens}, max_tokens={max_tokens}: expected {expected!r}, got {got}. {SHOWN}"
        )
        assert count <= 4 or got[1:4] == ["", "", ""], f"half of 🦊 was shown: got {got}. {SHOWN}"


def test_special_tokens_are_not_shown(llm: LLM) -> None:
    [eos], words = llm.eos_token_ids, llm.tokenizer.encode("Hi there", add_special_tokens=False)
    outputs = stream(scripted(llm, [words[0], eos, *words[1:]]), ignore_eos=True, max_tokens=len(words) + 1)
    got = [output.text for output in outputs]
    assert "".join(got) == "Hi there", f"an ignored end-of-sequence token in the middle was shown: {got}. {SHOWN}"


# When it ends


@pytest.fixture(scope="module")
def free_run(llm: LLM) -> list[int]:
    """16 greedy tokens that nothing stopped."""
    return run(llm, ignore_eos=True).token_ids


@pytest.fixture(scope="module")
def end(llm: LLM, free_run: list[int]) -> int:
    """A late position in the free run whose token is new there and visible in the text."""
    new = [i for i, token in enumerate(free_run) if token not in free_run[:i] and decode(llm, [token])]
    assert new and new[-1] >= 2, f"the model repeats itself at once, {free_run}: choose another prompt for this test"
    return new[-1]


@pytest.mark.parametrize("kind", ["EOS", "stop_token_ids"])
def test_a_stop_token_is_never_shown(
    llm: LLM, free_run: list[int], end: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = free_run[end]
    if kind == "EOS":
        monkeypatch.setattr(llm, "eos_token_ids", frozenset({token}))
    ids = [] if kind == "EOS" else [token]
    # The stop string would be complete with the stop token, which is not text; so it does not count.
    outputs = stream(llm, stop_token_ids=ids, ignore_eos=kind != "EOS", stop=decode(llm, [token]), max_tokens=end + 1)
    got, expected = join_outputs(outputs), decode(llm, free_run[:end])
    assert got.text == expected, f"{kind} {token}: expected the text {expected!r}, got {got.text!r}. {SHOWN}"
    assert got.token_ids == free_run[: end + 1], (
        f"{kind}: expected {free_run[: end + 1]}, got {got.token_ids}. {STREAM}"
    )
    reasons = ("stop", None if kind == "EOS" else token)
    assert (got.finish_reason, got.stop_reason) == reasons, f"{kind}: expected {reasons}, got {got}. {STREAM}"


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("max_tokens", ["plenty", "just enough"])
def test_a_stop_string_ends_the_answer(llm: LLM, free_run: list[int], end: int, max_tokens: str, cut: int) -> None:
    text = decode(llm, free_run[: end + 1])
    stop = text[len(decode(llm, free_run[: end - 1])) + cut :]  # the last two tokens, or all but their first character
    assert text.find(stop) == len(text) - len(stop), f"choose another prompt: {stop!r} also appears earlier in {text!r}"
    before = llm.num_positions_computed
    outputs = stream(llm, stop=["no such text", stop], max_tokens=50 if max_tokens == "plenty" else end + 1)
    num_positions, got, where = llm.num_positions_computed - before, join_outputs(outputs), f"stop string {stop!r}"
    assert got.text == text[: -len(stop)], f"{where}: expected {text[: -len(stop)]!r}, got {got.text!r}. {SHOWN}"
    assert (got.finish_reason, got.stop_reason) == ("stop", stop), (
        f"{where}, max_tokens {max_tokens}: expected 'stop' and the string as stop_reason, got {got}. {STREAM}"
    )
    assert got.token_ids == free_run[: end + 1], (
        f"{where} is complete with token {end + 1}: expected {free_run[: end + 1]}, got {got.token_ids}. {STREAM}"
    )
    assert num_positions == len(PROMPT) + end, (
        f"{where}: expected {len(PROMPT) + end} positions computed, got {num_positions}. {STREAM}"
    )


def test_an_incomplete_stop_string(llm: LLM, free_run: list[int]) -> None:
    text = decode(llm, free_run)
    got = run(llm, stop=[text[-9:] + "#", text[3:9] + "#"], ignore_eos=True)
    assert (got.text, got.finish_reason, got.stop_reason) == (text, "length", None), (
        f"what was held back is shown in the end: expected {text!r} and 'length', got {got}. {SHOWN}"
    )


def test_stop_strings_anywhere_in_an_answer(llm: LLM) -> None:
    """Answers of mixed tokens, also pieces of characters: each ends with the token that completes a stop string."""
    rng = random.Random(0)
    for _ in range(60):
        tokens = [rng.choice([rng.randrange(4096), rng.randrange(3, 300)]) for _ in range(20)]
        text = decode(llm, tokens)
        starts = [rng.randrange(len(text)) for _ in range(rng.randint(1, 4))]
        stop = [text[start : start + rng.randint(1, 8)] for start in starts]
        expected = min((text.find(string) + len(string), text.find(string)) for string in stop)[1]
        got = run(scripted(llm, tokens), stop=stop, max_tokens=20, ignore_eos=True)
        where = f"tokens {tokens}, stop strings {stop}"
        assert got.text == text[:expected], f"{where}: expected {text[:expected]!r}, got {got.text!r}. {SHOWN}"
        assert got.stop_reason in stop, (
            f"{where}: expected one of them as stop_reason, got {got.stop_reason!r}. {STREAM}"
        )


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3, 4, 5])
def test_min_tokens_ignores_early_stop_strings(llm: LLM, min_tokens: int) -> None:
    tokens = llm.tokenizer.encode("a b a b a b", add_special_tokens=False)
    assert len(tokens) == 6, "this test counts on one token for each letter"
    got = run(scripted(llm, tokens), stop=[" b"], min_tokens=min_tokens, max_tokens=6)
    ends = next(count for count in (2, 4, 6) if count > min_tokens)
    expected = ("a b a b a"[: 2 * ends - 3], "stop", " b", ends)
    actual = (got.text, got.finish_reason, got.stop_reason, len(got.token_ids))
    assert actual == expected, (
        f"'a b a b a b' with the stop string ' b' and min_tokens={min_tokens}: expected (text, reasons, tokens) "
        f'{expected}, got {actual}. Look at min_tokens in detokenizer.py; README "Stop strings".'
    )


@pytest.mark.parametrize("kind", ["EOS", "stop_token_ids"])
def test_min_tokens_masks_stop_tokens(
    llm: LLM, free_run: list[int], end: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = free_run[end]
    if kind == "EOS":
        monkeypatch.setattr(llm, "eos_token_ids", frozenset({token}))
    ids = [] if kind == "EOS" else [token]
    got = run(llm, stop_token_ids=ids, ignore_eos=kind != "EOS", min_tokens=end + 3, max_tokens=24).token_ids
    assert got[:end] == free_run[:end], f"before the stop token nothing changes: {got} against {free_run}. {STREAM}"
    assert token not in got[: end + 3] and len(got) >= end + 3, (
        f"min_tokens={end + 3}, but {got} has the stop token {token} earlier, or is shorter: until min_tokens are out "
        f"its logit must be -inf. {STREAM}"
    )


def test_min_tokens_allows_a_stop_token_once_reached(llm: LLM, free_run: list[int], end: int) -> None:
    got = run(llm, min_tokens=end, stop_token_ids=[free_run[end]], ignore_eos=True)
    assert (got.token_ids, got.finish_reason) == (free_run[: end + 1], "stop"), (
        f"min_tokens={end} are generated before the stop token, number {end + 1}: expected {free_run[: end + 1]} and "
        f"'stop', got {got}. {STREAM}"
    )


@pytest.mark.parametrize(("max_model_len", "count"), [(16, 6), (11, 1)])
def test_the_end_of_the_context(llm: LLM, free_run: list[int], max_model_len: int, count: int) -> None:
    short = copy.copy(llm)
    short.max_model_len = max_model_len
    got = run(short, ignore_eos=True, min_tokens=16)
    assert (got.token_ids, got.finish_reason) == (free_run[:count], "length"), (
        f"a prompt of 10 in a context of {max_model_len}: expected {free_run[:count]} and 'length', got {got}. {STREAM}"
    )


# The work


@pytest.mark.parametrize(("num_prompt_tokens", "num_output_tokens"), [(10, 20), (1, 1), (7, 1), (1, 5)])
def test_positions_computed(llm: LLM, num_prompt_tokens: int, num_output_tokens: int) -> None:
    before = llm.num_positions_computed
    stream(llm, list(range(100, 100 + num_prompt_tokens)), max_tokens=num_output_tokens, ignore_eos=True)
    got, expected = llm.num_positions_computed - before, num_prompt_tokens + num_output_tokens - 1
    assert got == expected, (
        f"P={num_prompt_tokens}, G={num_output_tokens}: expected P + G - 1 = {expected} positions, got {got}. {STREAM}"
    )


def test_a_token_is_computed_only_on_demand(llm: LLM) -> None:
    before = llm.num_positions_computed
    outputs = llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    for number in range(4):
        got, expected = llm.num_positions_computed - before, len(PROMPT) + number - 1 if number else 0
        assert got == expected, (
            f"asked for {number} tokens: expected {expected} positions computed, got {got}; the next token must wait "
            f"until it is requested. {STREAM}"
        )
        next(outputs)


@pytest.mark.parametrize("how", ["break", "close", "throw"])
def test_stopping_the_iteration_stops_the_work(llm: LLM, how: str) -> None:
    before = llm.num_positions_computed
    outputs = llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))
    for _ in islice(outputs, 3):
        pass
    if how == "close":
        outputs.close()  # type: ignore[attr-defined]
    elif how == "throw":
        with pytest.raises(ZeroDivisionError):
            outputs.throw(ZeroDivisionError())  # type: ignore[attr-defined]
    del outputs
    got, expected = llm.num_positions_computed - before, len(PROMPT) + 2
    assert got == expected, f"3 tokens, then {how}: expected {expected} positions computed, got {got}. {STREAM}"


def test_gradients_are_off_inside_and_on_outside(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must not keep data for gradients; the caller's code between two tokens may need gradients."""
    forward, recorded = llm.forward, []

    def recording(*args: Any) -> torch.Tensor:
        recorded.append(torch.is_grad_enabled())
        return forward(*args)

    monkeypatch.setattr(llm, "forward", recording)
    for _ in llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)):
        assert torch.is_grad_enabled(), f"inference mode leaks out of the generator. {STREAM}"
    assert recorded == [False] * 3, (
        f"gradients enabled in each of three passes: expected none, got {recorded}. {STREAM}"
    )


def test_a_bad_request_computes_nothing(llm: LLM) -> None:
    before = llm.num_positions_computed
    for ask in (lambda params: next(llm.stream(PROMPT, params)), lambda params: llm.generate(PROMPT, params)):
        with pytest.raises(FieldError, match=r"^stop_token_ids: expected ids below 4096 \(the vocabulary\), got 4096$"):
            ask(SamplingParams(stop_token_ids=(4096,)))
    got = llm.num_positions_computed - before
    assert got == 0, f"a request is refused before the model runs, but it computed {got} positions. {STREAM}"


def test_the_callers_prompt_is_left_alone(llm: LLM) -> None:
    prompt = [100, 101, 102]
    outputs = stream(llm, prompt, max_tokens=3, ignore_eos=True)
    assert prompt == [100, 101, 102], f"stream() changed the caller's list to {prompt}. {STREAM}"
    outputs[0].token_ids.append(7)
    assert outputs[1].token_ids != outputs[0].token_ids, f"two outputs share one list. {STREAM}"


# sample and check_stop, as in part 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0}, {3}),
        ({"top_k": 2}, {3, 2}),
        ({"top_k": 1}, {3}),
        ({"top_p": 0.3}, {3}),
        ({"top_p": 0.7}, {3, 2}),
        ({"top_k": 2, "top_p": 0.59}, {3}),
        ({"temperature": 0.2, "top_p": 0.8}, {3}),
    ],
    ids=str,
)
def test_sample(fields: dict[str, Any], expected: set[int]) -> None:
    logits, generator = torch.tensor([0.1, 0.15, 0.3, 0.45]).log(), torch.Generator().manual_seed(0)
    before = logits.clone()
    got = {sample(logits, SamplingParams(**fields), generator) for _ in range(300)}
    look = 'Look at engine.py::sample; README of part 1, "Choosing a token".'
    assert got == expected, f"probabilities .1 .15 .3 .45, {fields}: expected draws {expected}, got {got}. {look}"
    assert torch.equal(logits, before), f"sample() changed the caller's logits to {logits.tolist()}. {look}"


@pytest.mark.parametrize(
    ("output", "fields", "expected"),
    [
        ([10, 11], {}, None),
        ([10, 11], {"max_tokens": 2}, ("length", None)),
        ([10, 2], {"max_tokens": 2}, ("stop", None)),
        ([10, 2], {"ignore_eos": True}, None),
        ([10, 50], {"stop_token_ids": [49, 50], "max_tokens": 2}, ("stop", 50)),
        ([10, 2], {"stop_token_ids": [2]}, ("stop", None)),
        ([2], {"min_tokens": 2}, None),
        ([10, 2], {"min_tokens": 2}, ("stop", None)),
        ([10] * 15, {}, ("length", None)),
        ([10] * 15, {"min_tokens": 100}, ("length", None)),
    ],
    ids=str,
)
def test_check_stop(output: list[int], fields: dict[str, Any], expected: tuple | None) -> None:
    got = check_stop(5, output, SamplingParams(**fields), EOS, max_model_len=20)
    assert got == expected, (
        f"5 prompt tokens, output {output} with {fields} in a context of 20: expected {expected}, got {got}. "
        'Look at engine.py::check_stop; README of part 1, "When to stop".'
    )
