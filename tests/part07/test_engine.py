"""The engine with prefix caching: the same answers with hits of any length, and every hit is computed once only."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import MODELS_DIR
from common.errors import FieldError
from common.outputs import CompletionOutput, Logprob
from common.sampling_params import SamplingParams, check_supported
from common.testing import assert_same_greedy, reference_greedy
from common.trace import read_trace
from part07_prefix_caching.config import EngineConfig
from part07_prefix_caching.core.engine import LLMEngine
from part07_prefix_caching.llm import LLM
from part07_prefix_caching.messages import EngineCoreOutput
from tests.part07.scripted import check_blocks, run_dry, scripted_engine, take_step, watch
from tests.scripted import answer_alone, executor_of, params_for

LOOK = 'Look at core/scheduler.py::Scheduler._schedule_waiting and worker/model_runner.py; README "A block\'s hash".'
LOOK_PREPARE = 'Look at worker/model_runner.py::ModelRunner.prepare; README "A block\'s hash".'
LOOK_COUNT = 'Look at core/engine.py::LLMEngine._append and api/output_processor.py; README "What a client sees".'
LOOK_RESET = 'Look at core/engine.py::LLMEngine.reset_prefix_cache; README "What a client sees".'
LOOK_SEED = 'Look at core/engine.py::LLMEngine.__init__ and core/block_manager.py; README "A block\'s hash".'
LOOK_TRACE = 'Look at core/step_tracer.py::StepTracer.launched; README "What a client sees".'
BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
FAMILY = "qwen3"

MakeLLM = Callable[..., LLM]
MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]


def greedy(num_tokens: int, **fields: Any) -> SamplingParams:
    """Exactly num_tokens greedy tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **fields})


@pytest.fixture(scope="module")
def small_engine(tmp_path_factory: pytest.TempPathFactory, small_reference: Callable[[str], Any]) -> MakeEngine:
    """An engine over a small random model. Its logits are far apart, so a wrong token or slot changes the answer."""
    directory = tmp_path_factory.mktemp(FAMILY)
    small_reference(FAMILY).save_pretrained(directory)
    (directory / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")

    def make(**flags: Any) -> LLMEngine:
        engine = LLMEngine(EngineConfig(**{"model": str(directory), "device": "cpu", "num_kv_blocks": 400, **flags}))
        watch(engine.scheduler)
        return engine

    return make


# The oracle

BASE = [random.Random(7).randrange(320) for _ in range(80)]


def cases() -> list[tuple[list[int], int, int]]:
    """(prompt, tokens to generate, the step at which it arrives): shared prefixes of 0 to 4 blocks of 16 with different
    ends, the same prompts again, and prompts with one different token."""
    rng = random.Random(1)
    found = [(BASE[: 16 * n] + [rng.randrange(320) for _ in range(rng.randint(1, 20))], 3 + n, 2 * n) for n in range(5)]
    found += [
        (BASE[:length], 4, at)
        for length, at in ((64, 1), (64, 3), (65, 3), (63, 4), (16, 5), (17, 9), (1, 9), (64, 12))
    ]
    return found + [(BASE[:30] + [5] + BASE[31:60], 5, 6), ([9] + BASE[1:50], 5, 6), (found[2][0], 6, 14)]


@pytest.fixture(scope="module")
def expected(small_reference: Callable[[str], Any]) -> list[list[int]]:
    """What transformers generates for each of cases() alone."""
    return [reference_greedy(small_reference(FAMILY), prompt, count) for prompt, count, _ in cases()]


def serve(engine: LLMEngine) -> dict[str, EngineCoreOutput]:
    def arrive(step: int) -> bool:
        for number, (prompt, count, at) in enumerate(cases()):
            if at == step:
                engine.add_request(str(number), prompt, greedy(count))
        return step < max(at for *_, at in cases())

    return run_dry(engine, arrive)


GRID: list[tuple[dict[str, Any], bool]] = [  # flags, and whether the pool is so small that requests are preempted
    (dict(max_num_seqs=32), False),
    (dict(max_num_seqs=4, max_num_batched_tokens=7), False),
    (dict(max_num_seqs=8, max_num_batched_tokens=30, long_prefill_token_threshold=11, block_size=4), False),
    (dict(max_num_seqs=8, enable_chunked_prefill=False, block_size=8), False),
    (dict(max_num_seqs=8, max_num_batched_tokens=24, block_size=4, num_kv_blocks=1 + 25), True),
    (dict(max_num_seqs=6, max_num_batched_tokens=11, block_size=1, num_kv_blocks=1 + 84), True),
]


@BOTH
@pytest.mark.parametrize(("flags", "is_small"), GRID, ids=str)
def test_greedy_equals_transformers(
    small_engine: MakeEngine, small_reference: Callable[[str], Any], expected: list[list[int]], flags: dict[str, Any],
    is_small: bool, is_async: bool,
) -> None:  # fmt: skip
    engine = small_engine(async_scheduling=is_async, **flags)
    got = serve(engine)
    for number, (prompt, _, _) in enumerate(cases()):
        where = f"{flags}, async={is_async}, request {number} (prompt of {len(prompt)}). {LOOK} Difference"
        assert_same_greedy(small_reference(FAMILY), prompt, got[str(number)].token_ids, expected[number], where)
    assert engine.scheduler.num_hit_tokens >= (16 if is_small else 100), (
        f"{flags}: a hit of {engine.scheduler.num_hit_tokens} tokens is too little for this test"
    )
    num_preemptions = engine.scheduler.num_preemptions
    assert (num_preemptions > 0) is is_small, (
        f"{flags}: {num_preemptions} preemptions, expected {'some' if is_small else 'none'}"
    )


@BOTH
def test_a_conversation(small_engine: MakeEngine, small_reference: Callable[[str], Any], is_async: bool) -> None:
    """Each turn sends the whole conversation. The answers' tokens are hits, as well as the prompts'."""
    engine, said = (
        small_engine(async_scheduling=is_async, block_size=4, max_num_seqs=2, max_num_batched_tokens=9),
        BASE[:10],
    )
    hits = []
    for turn in range(4):
        engine.add_request(str(turn), list(said), greedy(7))
        answer = run_dry(engine)[str(turn)]
        expected = reference_greedy(small_reference(FAMILY), said, 7)
        where = f"turn {turn}, async={is_async}. {LOOK} Difference"
        assert_same_greedy(small_reference(FAMILY), said, answer.token_ids, expected, where)
        hits.append((len(said), answer.num_cached_tokens))
        said = [*said, *answer.token_ids, 30 + turn, 40 + turn]
    wanted = [(10, 0), (19, 16), (28, 24), (37, 32)]  # of the turn before, all tokens but the last are computed
    assert hits == wanted, f"(prompt, hit) of each turn, block_size=4: expected {wanted}, got {hits}. {LOOK}"


@pytest.mark.parametrize(
    "flags",
    [
        dict(max_num_seqs=8, max_num_batched_tokens=56),
        dict(max_num_seqs=4, max_num_batched_tokens=5, block_size=4, num_kv_blocks=1 + 30, async_scheduling=False),
    ],
    ids=str,
)
def test_the_shipped_model(make_engine: MakeEngine, reference: Any, prompt_of: PromptOf, flags: dict[str, Any]) -> None:
    engine = make_engine(**flags)
    prompts = [
        prompt_of(64),
        prompt_of(64),
        prompt_of(33) + prompt_of(20, 1),
        prompt_of(50) + prompt_of(9, 2),
        prompt_of(65),
    ]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, greedy(5))
    got = run_dry(engine)
    for number, prompt in enumerate(prompts):
        where = f"{flags}, request {number} (prompt of {len(prompt)}). {LOOK} Difference"
        expected = reference_greedy(reference, prompt, 5)
        assert_same_greedy(reference, prompt, got[str(number)].token_ids, expected, where)
    assert engine.scheduler.num_hit_tokens >= 32, "this test needs hits"


# Sampling parameters, with hits of every length and without

TEN_WORDS = {100 + number: 40.0 for number in range(10)}  # with so few words, answers repeat themselves
SAMPLED: list[dict[str, Any]] = [
    dict(logprobs=3),
    dict(temperature=1.0, seed=3, logprobs=1),
    dict(repetition_penalty=1.5, logit_bias=TEN_WORDS),
    dict(temperature=0.7, seed=4, top_k=5, top_p=0.9),
    dict(presence_penalty=1.5, frequency_penalty=1.0, logprobs=2, logit_bias=TEN_WORDS),
    dict(temperature=1.2, seed=6, min_tokens=5, ignore_eos=False, logit_bias={**TEN_WORDS, 2: 40.0}),
]


def check_logprobs(got: list[dict[int, Logprob]] | None, expected: list[dict[int, Logprob]] | None, where: str) -> None:
    assert len(got or []) == len(expected or []), (
        f"{where}: logprobs of {len(got or [])} tokens, not {len(expected or [])}."
    )
    for entry, wanted in zip(got or [], expected or [], strict=True):
        assert list(entry) == list(wanted), f"{where}: logprobs of {list(entry)}, expected {list(wanted)}."
        apart = max(abs(entry[token_id].logprob - wanted[token_id].logprob) for token_id in wanted)
        assert apart < 1e-4, f"{where}: {entry}, expected {wanted}, {apart:.1e} apart."


@pytest.fixture(scope="module")
def sampled(make_llm: MakeLLM, prompt_of: PromptOf) -> list[tuple[list[int], SamplingParams, CompletionOutput]]:
    """Prompts, sampling parameters, and the answers without caching."""
    common, off = [102, *prompt_of(40), 101, 104], make_llm(enable_prefix_caching=False)
    found = []
    for number, fields in enumerate(SAMPLED):
        prompt = common[: len(common) - 6 * number] + prompt_of(4 + number, number)
        found.append((prompt, greedy(6, **fields), off.generate([prompt], greedy(6, **fields))[0].outputs[0]))
    assert off.engine.scheduler.num_hit_tokens == 0, f"caching is off, and there were hits. {LOOK}"
    return found


@pytest.mark.parametrize(
    "flags",
    [
        dict(),
        dict(max_num_seqs=4, max_num_batched_tokens=6, block_size=4),
        dict(async_scheduling=False, block_size=4, num_kv_blocks=1 + 20),
    ],
    ids=str,
)
def test_hits_change_no_answer(
    make_llm: MakeLLM, sampled: list[tuple[list[int], SamplingParams, CompletionOutput]], flags: dict[str, Any]
) -> None:
    """Seeds, penalties (which count the whole prompt) and log probabilities."""
    llm = make_llm(**flags)
    for turn in range(2):  # the second time everything is cached, or what the pool can hold
        results = llm.generate([prompt for prompt, _, _ in sampled], [params for _, params, _ in sampled])
        for number, (result, (_, _, wanted)) in enumerate(zip(results, sampled, strict=True)):
            answer = result.outputs[0]
            where = f"{SAMPLED[number]} with {flags}, time {turn}, a hit of {answer.num_cached_tokens}"
            assert answer.token_ids == wanted.token_ids, (
                f"{where}: expected what it gets without caching, {wanted.token_ids}, got {answer.token_ids}. "
                f"{LOOK_PREPARE}"
            )
            assert (answer.text, answer.finish_reason) == (wanted.text, wanted.finish_reason), f"{where}: {answer}"
            check_logprobs(answer.logprobs, wanted.logprobs, f"{where}. {LOOK_PREPARE}")
    assert llm.engine.scheduler.num_hit_tokens > 0, "this test needs hits"


def test_the_engine_computes_what_is_not_cached(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    prompts = [prompt_of(64), prompt_of(64), prompt_of(64), prompt_of(33) + prompt_of(7, 3), prompt_of(20, 2)]
    whole = sum(len(prompt) + 4 - 1 for prompt in prompts)
    for flags in (dict(max_num_batched_tokens=20, max_num_seqs=3), dict(async_scheduling=False)):
        llm = make_llm(**flags)
        told = [llm.generate([prompt], greedy(4))[0].outputs[0].num_cached_tokens for prompt in prompts]
        assert told == [0, 48, 48, 32, 0], (
            f"{flags}: expected num_cached_tokens [0, 48, 48, 32, 0], got {told}. {LOOK_COUNT}"
        )
        got = llm.engine.executor.worker.runner.num_tokens_computed
        assert got == whole - 128, (
            f"{flags}: {whole} positions, 128 of them hits: expected {whole - 128} computed, got {got}. {LOOK}"
        )
        counts = (llm.engine.scheduler.num_queried_tokens, llm.engine.scheduler.num_hit_tokens)
        expected = (sum(map(len, prompts)), 128)
        assert counts == expected, f"{flags}: (queried, hit): expected {expected}, got {counts}. {LOOK}"


def test_salts_keep_requests_apart(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    llm = make_llm()
    told, texts = [], set()
    for salt in (None, "a", "a", "b", None, "b"):
        output = llm.generate([prompt_of(40)], greedy(3, cache_salt=salt))[0].outputs[0]
        told.append(output.num_cached_tokens)
        texts.add(output.text)
    assert told == [0, 0, 32, 0, 32, 32], (
        f"40 tokens with salts None, a, a, b, None, b: expected hits of [0, 0, 32, 0, 32, 32], got {told}. Look at "
        'core/block_manager.py::BlockManager.hash_blocks; README "A block\'s hash".'
    )
    assert len(texts) == 1, f"a salt changes no token, got {texts}"


def test_num_cached_tokens_comes_with_the_first_output_only() -> None:
    engine = scripted_engine(block_size=4)
    for name in "ab":
        engine.add_request(name, [50, 51, 52, 53, 54], params_for(4, ignore_eos=True))
    told: dict[str, list[int | None]] = {"a": [], "b": []}
    while engine.has_unfinished_requests:
        for output in take_step(engine):
            told[output.request_id].append(output.num_cached_tokens)
    expected = {"a": [0, None, None, None], "b": [4, None, None, None]}
    assert told == expected, f"num_cached_tokens of each output: expected {expected}, got {told}. {LOOK_COUNT}"


def test_num_cached_tokens_comes_with_a_stop_string_in_the_first_token(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    llm = make_llm()
    whole = llm.generate([prompt_of(40)], greedy(6))[0].outputs[0]
    output = llm.generate([prompt_of(40)], greedy(6, stop=[whole.text[:3]]))[0].outputs[0]
    got = (output.text, output.finish_reason, output.num_cached_tokens)
    assert got == ("", "stop", 32), f"stopped by the first token: expected ('', 'stop', 32), got {got}. {LOOK_COUNT}"


# Reset


def test_reset(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    llm = make_llm()
    engine = llm.engine

    def found() -> int | None:
        return llm.generate([prompt_of(40)], greedy(3))[0].outputs[0].num_cached_tokens

    assert (found(), found()) == (0, 32)
    assert engine.reset_prefix_cache() is True, f"no request is in the engine: expected True. {LOOK_RESET}"
    assert not engine.blocks.cached_blocks, (
        f"after a reset: expected no cached blocks, got {len(engine.blocks.cached_blocks)}. {LOOK_RESET}"
    )
    assert found() == 0, f"after a reset: expected no hit. {LOOK_RESET}"
    assert found() == 32
    check_blocks(engine.blocks, "after a reset")


@pytest.mark.parametrize("is_async", [True, False])
def test_no_reset_while_requests_are_in_the_engine(is_async: bool) -> None:
    """Waiting or running. If a step in flight holds no unfinished request, the reset waits for it."""
    engine = scripted_engine(block_size=4, async_scheduling=is_async)
    engine.add_request("a", [50] * 9, params_for(2, ignore_eos=True))
    assert engine.reset_prefix_cache() is False, f"a waits. {LOOK_RESET}"
    take_step(engine)
    num_cached = len(engine.blocks.cached_blocks)
    assert engine.reset_prefix_cache() is False, f"a runs. {LOOK_RESET}"
    assert len(engine.blocks.cached_blocks) == num_cached == 2, f"refused, and blocks were uncached. {LOOK_RESET}"
    engine.abort_requests(["a"])
    assert len(engine.in_flight) == is_async, "this test needs a step in flight"
    assert engine.reset_prefix_cache() is True, f"a was aborted: expected True. {LOOK_RESET}"
    assert not engine.in_flight and not engine.blocks.cached_blocks, f"in flight: {engine.in_flight}. {LOOK_RESET}"
    run_dry(engine)


def test_a_reset_waits_for_a_step_that_fails() -> None:
    """All its requests have ended. It counts as a failed step, and the engine goes on."""
    engine = scripted_engine(block_size=4)
    engine.add_request("a", [50] * 9, params_for(2, ignore_eos=True))
    executor_of(engine).result_error = ZeroDivisionError("the cat sat on it")
    take_step(engine)
    engine.abort_requests(["a"])
    try:
        assert engine.reset_prefix_cache() is True, f"a was aborted: expected True. {LOOK_RESET}"
    except ZeroDivisionError as error:
        pytest.fail(f"the step in flight failed, and its requests have ended: got {error!r}. {LOOK_RESET}")
    got = (len(engine.in_flight), len(engine.blocks.cached_blocks), engine.num_failures)
    assert got == (0, 0, 1), f"(steps in flight, cached blocks, failures): expected (0, 0, 1), got {got}. {LOOK_RESET}"
    engine.add_request("b", [50] * 9, params_for(4, ignore_eos=True))
    answer, expected = run_dry(engine)["b"], answer_alone([50] * 9, 4, ignore_eos=True)
    assert (answer.token_ids, answer.num_cached_tokens) == (expected, 0), (
        f"the next request: expected {expected} and no hit, got {answer}. {LOOK_RESET}"
    )


# Trace, flags and fields


def test_the_trace_shows_hits(tmp_path: Path) -> None:
    """In the step that admits a request, and in no other."""
    path = tmp_path / "trace"
    engine = scripted_engine(100, block_size=4, max_num_seqs=3, max_num_batched_tokens=6, trace=str(path))
    prompt = list(range(50, 63))
    engine.add_request("a", prompt, params_for(3, ignore_eos=True))
    run_dry(engine)
    engine.add_request("b", prompt[:9] + [99] * 8, params_for(3, ignore_eos=True))
    run_dry(engine)
    engine.tracer.close()
    trace = read_trace(path)
    assert trace.header["part"] == "part07_prefix_caching", f"got {trace.header}. {LOOK_TRACE}"
    got = [(r.id, r.num_computed, r.num_scheduled, r.num_cached) for step in trace.steps for r in step.requests]
    expected = [
        ("a", 0, 6, 0), ("a", 6, 6, 0), ("a", 12, 1, 0), ("a", 13, 1, 0), ("a", 14, 1, 0),
        ("b", 8, 6, 8), ("b", 14, 3, 0), ("b", 17, 1, 0), ("b", 18, 1, 0),
    ]  # fmt: skip
    assert got == expected, (
        f"(id, num_computed, num_scheduled, num_cached): expected {expected}, got {got}. {LOOK_TRACE}"
    )


def test_the_trace_shows_requests_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    engine = scripted_engine(block_size=4, trace=str(path), async_scheduling=False)
    for name in "ab":
        engine.add_request(name, [50] * 9, params_for(3, ignore_eos=True))
    executor_of(engine).result_error = ValueError("the cat sat on it")
    with pytest.raises(ValueError, match="the cat sat on it") as caught:
        LLMEngine.step(engine)
    engine.fail(caught.value)
    engine.add_request("c", [51] * 9, params_for(1))
    run_dry(engine)
    engine.tracer.close()
    got = [step.aborted for step in read_trace(path).steps]
    assert got == [["a", "b"]], f"a and b ended with the failed step: expected [['a', 'b']], got {got}. {LOOK_TRACE}"


def test_the_hash_seed_is_a_flag() -> None:
    """Engines with the same seed compute the same hashes; with another seed they have none in common."""
    found = []
    for flags in ({}, {"prefix_caching_hash_seed": 0}, {"prefix_caching_hash_seed": 5}):
        engine = scripted_engine(block_size=4, **flags)
        engine.add_request("a", [50] * 9, params_for(1))
        run_dry(engine)
        found.append(set(engine.blocks.cached_blocks))
    assert len(found[0]) == 2 and found[0] == found[1], (
        f"without the flag and with seed 0: expected the same 2 hashes, got {found[:2]}. {LOOK_SEED}"
    )
    assert not found[0] & found[2], f"seeds 0 and 5: expected no hash in common, got {found}. {LOOK_SEED}"


def test_a_salt_is_checked(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a", [5, 6], greedy(1, cache_salt="x"))
    run_dry(engine)
    with pytest.raises(FieldError, match="cache_salt"):
        SamplingParams(cache_salt="")


EARLIER = {
    "part01_simple_server.server", "part02_streaming.engine", "part03_paged_attention.core.validation",
    "part04_continuous_batching.core.validation", "part05_async_scheduling.core.validation",
    "part06_chunked_prefill.core.validation",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EARLIER))
def test_earlier_parts_refuse_a_salt(name: str) -> None:
    """They cache nothing, so there is nothing to keep apart. But a client that sends a salt must be told."""
    fields = importlib.import_module(name).SAMPLING_FIELDS
    with pytest.raises(FieldError, match="^cache_salt: not supported by this part, got 'x'"):
        check_supported(SamplingParams(cache_salt="x"), fields)


def test_without_caching_nothing_is_cached(make_llm: MakeLLM, prompt_of: PromptOf) -> None:
    llm = make_llm(enable_prefix_caching=False)
    for _ in range(2):
        llm.generate([prompt_of(40)] * 2, greedy(3))
    engine = llm.engine
    got = (
        engine.executor.worker.runner.num_tokens_computed,
        len(engine.blocks.cached_blocks),
        engine.scheduler.num_hit_tokens,
    )
    assert got == (4 * 42, 0, 0), (
        f"--no-enable-prefix-caching: expected (positions, cached blocks, hits) (168, 0, 0), got {got}. {LOOK}"
    )
