"""The engine with prompts in chunks: the same answers at any budget, and chunks bring no output."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR
from common.outputs import CompletionOutput, Logprob
from common.sampling_params import SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy
from common.trace import Phase, read_trace, step_phases
from part06_chunked_prefill.config import EngineConfig
from part06_chunked_prefill.core.engine import LLMEngine
from part06_chunked_prefill.core.request import Request
from part06_chunked_prefill.core.scheduler import SchedulerOutput
from part06_chunked_prefill.llm import LLM
from part06_chunked_prefill.messages import EngineCoreOutput
from part06_chunked_prefill.worker.model_runner import Batch
from tests.part06.scripted import check_engine, run_dry, scripted_engine, take_step, watch
from tests.scripted import END, answer_alone, executor_of, ids, params_for
from tests.shipped_model import check_ranks

LOOK_PREPARE = 'Look at worker/model_runner.py::ModelRunner.prepare; README "Chunks that sample no token".'
LOOK_METADATA = 'Look at worker/model_runner.py::ModelRunner._metadata; README "The causal mask of a chunk".'
LOOK_CHUNK = 'Look at core/engine.py::LLMEngine._update; README "Chunks that sample no token".'
LOOK_FAIL = 'Look at core/engine.py::LLMEngine.fail and core/scheduler.py::Scheduler.reset; README of part 5, "When a process dies".'  # noqa: E501
LOOK_TRACE = 'Look at core/step_tracer.py::StepTracer; README "Chunks that sample no token".'
LOOK_LLM = 'Look at llm.py::LLM.generate; README "Chunks that sample no token".'
BOTH = pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])

MakeLLM = Callable[..., LLM]
MakeEngine = Callable[..., LLMEngine]
PromptOf = Callable[..., list[int]]


def greedy(num_tokens: int, **fields: Any) -> SamplingParams:
    """Exactly num_tokens greedy tokens."""
    return SamplingParams(**{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **fields})


def count_half_way(engine: LLMEngine) -> list[str]:
    """The requests that are preempted in the middle of a prompt, as it happens."""
    names, preempt = list[str](), engine.scheduler.preempt

    def note(request: Request) -> None:
        names.extend([request.request_id] * (request.num_new_tokens > 1))
        preempt(request)

    engine.scheduler.preempt = note  # type: ignore[method-assign]
    return names


def same(what: str, got: Any, expected: Any, look: str = LOOK_PREPARE) -> None:
    assert got == expected, f"{what}: expected {expected}, got {got}. {look}"


# The tensors of a step


def prepare(engine: LLMEngine) -> tuple[SchedulerOutput, Batch]:
    """The next step's batch. It does not run."""
    scheduled = engine.scheduler.schedule()
    return scheduled, engine.executor.worker.runner.prepare(scheduled.step)


def rows_of(engine: LLMEngine) -> dict[str, Any]:
    return {request.request_id: request.row for request in engine.scheduler.running}


def test_a_chunk_is_computed_and_not_sampled_from(make_engine: MakeEngine) -> None:
    """Budget 8, prompts of 3, 12 and 2: a whole prompt and a chunk; a decode and a chunk; two decodes and a prompt."""
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=100, block_size=4)
    prompts = {"0": [50, 51, 52], "1": list(range(60, 72)), "2": [80, 81]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(5, seed=3))
    _, first = prepare(engine)
    rows = rows_of(engine)
    at = {name: 100 * row for name, row in rows.items()}
    same("first step, new_rows", first.new_rows, [(rows["0"], prompts["0"]), (rows["1"], prompts["1"])])
    same("first step, positions", first.positions.tolist(), [0, 1, 2, 0, 1, 2, 3, 4])
    inputs = [at["0"] + p for p in range(3)] + [at["1"] + p for p in range(5)]
    same("first step, input_indices", first.input_indices.tolist(), inputs)
    same("first step, logits_indices: of 0, and not of 1's chunk", first.logits_indices.tolist(), [2])
    same("first step, output_indices", first.output_indices.tolist(), [at["0"] + 3])
    same("first step, sampling: rows", [state.row for state in first.sampling], [rows["0"]])

    _, second = prepare(engine)
    same("second step, new_rows: 1 has its row already", second.new_rows, [])
    same("second step, positions: a decode, then 1's last 7", second.positions.tolist(), [3, *range(5, 12)])
    inputs = [at["0"] + 3, *(at["1"] + p for p in range(5, 12))]
    same("second step, input_indices", second.input_indices.tolist(), inputs)
    same("second step, logits_indices: of both", second.logits_indices.tolist(), [0, 7])
    same("second step, output_indices", second.output_indices.tolist(), [at["0"] + 4, at["1"] + 12])
    states = [(state.row, state.num_prompt_tokens, state.num_tokens) for state in second.sampling]
    same("second step, sampling: (row, prompt, tokens)", states, [(rows["0"], 3, 4), (rows["1"], 12, 12)])

    _, third = prepare(engine)
    rows = rows_of(engine)
    same("third step, new_rows", third.new_rows, [(rows["2"], prompts["2"])])
    same("third step, logits_indices: two decodes, a whole prompt", third.logits_indices.tolist(), [0, 1, 3])
    states = [(state.row, state.num_prompt_tokens, state.num_tokens) for state in third.sampling]
    same("third step, sampling", states, [(rows["0"], 3, 5), (rows["1"], 12, 13), (rows["2"], 2, 2)])
    tensors = (third.positions, third.logits_indices, third.output_indices, third.input_indices)
    same("dtypes", {tensor.dtype for tensor in tensors}, {torch.int64})


def test_a_step_of_chunks_only_samples_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=4, max_model_len=64)
    engine.add_request("0", list(range(60, 72)), greedy(2))
    _, batch = prepare(engine)
    got = (batch.logits_indices.tolist(), batch.output_indices.tolist(), batch.sampling)
    same("a chunk of 4 of 12 tokens: (logits_indices, output_indices, sampling)", got, ([], [], []))
    same("dtypes", {batch.logits_indices.dtype, batch.output_indices.dtype}, {torch.int64})
    sampled = engine.executor.worker.runner.run(batch)
    same("tokens sampled", sampled.token_ids.tolist(), [], "Look at worker/model_runner.py::ModelRunner.run.")


def test_rows_of_requests_that_were_aborted_half_way_are_reused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=4)
    for number in range(3):
        engine.add_request(str(number), [60 + number] * 9, greedy(2))
        for start in (0, 4):
            _, batch = prepare(engine)
            expected = [(0, [60 + number] * 9)] if start == 0 else []
            same(f"request {number}, from position {start}, new_rows", batch.new_rows, expected)
        engine.abort_requests([str(number)])


def test_the_metadata_of_a_mixed_step(make_engine: MakeEngine) -> None:
    """Decodes, a later chunk, and a last chunk of one token, which comes first like a decode."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=8, block_size=4, long_prefill_token_threshold=3)
    lengths = {"0": 3, "1": 9, "2": 5}
    for name, length in lengths.items():
        engine.add_request(name, [60 + int(name)] * length, greedy(9))
    steps = [prepare(engine) for _ in range(3)]
    expected = [  # requests, query_start_loc, context_lens, max_query_len
        ("012", [0, 3, 6, 8], [3, 3, 2], 3),
        ("012", [0, 1, 4, 7], [4, 6, 5], 3),
        ("021", [0, 1, 2, 5], [5, 6, 9], 3),
    ]
    for number, ((scheduled, batch), (names, *wanted)) in enumerate(zip(steps, expected, strict=True)):
        same(f"step {number}, requests", "".join(ids(scheduled.requests)), names, "")
        metadata = batch.metadata
        got = [metadata.query_start_loc.tolist(), metadata.context_lens.tolist(), metadata.max_query_len]
        same(f"step {number}: [query_start_loc, context_lens, max_query_len]", got, wanted, LOOK_METADATA)
    metadata, tables = steps[2][1].metadata, [engine.blocks.block_tables[name] for name in "021"]
    assert metadata.block_tables.shape[1] == max(map(len, tables)), f"got {metadata.block_tables}. {LOOK_METADATA}"
    for number, table in enumerate(tables):  # what is behind it is padding
        got = metadata.block_tables[number, : len(table)].tolist()
        same(f"step 2, block table of sequence {number}", got, table, LOOK_METADATA)
    slots = [
        table[position // 4] * 4 + position % 4
        for table, positions in zip(tables, ([4], [5], [6, 7, 8]), strict=True)
        for position in positions
    ]
    same("step 2, slot_mapping", metadata.slot_mapping.tolist(), slots, LOOK_METADATA)
    int32 = (metadata.block_tables, metadata.query_start_loc, metadata.context_lens)
    same("step 2, dtypes", {tensor.dtype for tensor in int32}, {torch.int32}, LOOK_METADATA)


# The oracle

NUM_REQUESTS = 32


def mixed_cases(vocab_size: int = 320) -> list[tuple[list[int], int, int]]:
    """(prompt, tokens to generate, the step at which it arrives)."""
    rng = random.Random(0)
    lengths = [17, 1, 2, 60, 15, 16, 33, 1] * 4
    return [
        ([rng.randrange(vocab_size) for _ in range(length)], rng.randint(1, 10), number * 2 // 3)
        for number, length in enumerate(lengths)
    ]


def serve(engine: LLMEngine, cases: list[tuple[list[int], int, int]]) -> dict[str, EngineCoreOutput]:
    def arrive(step: int) -> bool:
        for number, (prompt, count, at) in enumerate(cases):
            if at == step:
                engine.add_request(str(number), prompt, greedy(count))
        return step < max(at for *_, at in cases)

    return run_dry(engine, arrive)


@pytest.fixture(scope="module")
def small_engine(tmp_path_factory: pytest.TempPathFactory, small_reference: Callable[[str], Any]) -> MakeEngine:
    """An engine over a small random model. Its logits are far apart, so a wrong token or slot changes the answer."""
    directories: dict[str, Path] = {}

    def make(family: str, **flags: Any) -> LLMEngine:
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family)
            small_reference(family).save_pretrained(directories[family])
            (directories[family] / "tokenizer.json").symlink_to(MODELS_DIR / "tiny" / "tokenizer.json")
        flags = {"model": str(directories[family]), "device": "cpu", "num_kv_blocks": 400, **flags}
        engine = LLMEngine(EngineConfig(**flags))
        watch(engine.scheduler)
        return engine

    return make


@pytest.fixture(scope="module")
def expected_of(small_reference: Callable[[str], Any]) -> Callable[[str], list[list[int]]]:
    """What transformers generates for each of mixed_cases alone."""
    answers: dict[str, list[list[int]]] = {}

    def compute(family: str) -> list[list[int]]:
        if family not in answers:
            model = small_reference(family)
            answers[family] = [reference_greedy(model, prompt, count) for prompt, count, _ in mixed_cases()]
        return answers[family]

    return compute


GRID: list[tuple[dict[str, Any], bool]] = [  # flags, and whether the pool is so small that requests are preempted
    (dict(max_num_seqs=4, max_num_batched_tokens=4), False),
    (dict(max_num_seqs=4, max_num_batched_tokens=7), False),
    (dict(max_num_seqs=4, max_num_batched_tokens=28), False),
    (dict(max_num_seqs=8, max_num_batched_tokens=28, long_prefill_token_threshold=5), False),
    (dict(max_num_seqs=32), False),
    (dict(max_num_seqs=8, enable_chunked_prefill=False), False),
    (dict(max_num_seqs=8, max_num_batched_tokens=8, block_size=4, num_kv_blocks=1 + 18), True),
    (dict(max_num_seqs=6, max_num_batched_tokens=11, block_size=1, num_kv_blocks=1 + 72), True),
    (
        dict(
            max_num_seqs=8,
            max_num_batched_tokens=40,
            block_size=4,
            num_kv_blocks=1 + 19,
            long_prefill_token_threshold=7,
        ),
        True,
    ),
    (dict(max_num_seqs=8, enable_chunked_prefill=False, block_size=4, num_kv_blocks=1 + 18), True),
]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(("flags", "is_small"), GRID, ids=str)
def test_greedy_equals_transformers_for_32_mixed_requests(
    small_engine: MakeEngine, small_reference: Callable[[str], Any], expected_of: Callable[[str], list[list[int]]],
    flags: dict[str, Any], is_small: bool, is_async: bool,
) -> None:  # fmt: skip
    engine = small_engine("qwen3", async_scheduling=is_async, **flags)
    got, cases = serve(engine, mixed_cases()), mixed_cases()
    assert len(got) == NUM_REQUESTS, f"{NUM_REQUESTS} requests, {len(got)} answers"
    for number, expected in enumerate(expected_of("qwen3")):
        prompt = cases[number][0]
        where = f"{flags}, async={is_async}, request {number} (prompt of {len(prompt)}). {LOOK_PREPARE} Difference"
        assert_same_greedy(small_reference("qwen3"), prompt, got[str(number)].token_ids, expected, where)
    num_preemptions = engine.scheduler.num_preemptions
    assert (num_preemptions > 0) is is_small, (
        f"{flags}: {num_preemptions} preemptions, expected {'some' if is_small else 'none'}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_chunks_of_7(
    family: str,
    small_engine: MakeEngine,
    small_reference: Callable[[str], Any],
    expected_of: Callable[[str], list[list[int]]],
) -> None:
    engine = small_engine(family, max_num_seqs=7, max_num_batched_tokens=7)
    got = serve(engine, mixed_cases())
    for number, (prompt, _, _) in enumerate(mixed_cases()):
        where = f"{family}, budget 7, request {number} (prompt of {len(prompt)}). {LOOK_PREPARE} Difference"
        expected = expected_of(family)[number]
        assert_same_greedy(small_reference(family), prompt, got[str(number)].token_ids, expected, where)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(max_num_seqs=8, max_num_batched_tokens=56),
        dict(max_num_seqs=4, max_num_batched_tokens=5, block_size=4, num_kv_blocks=1 + 30),
    ],
    ids=str,
)
def test_the_shipped_model(make_engine: MakeEngine, reference: Any, prompt_of: PromptOf, flags: dict[str, Any]) -> None:
    engine = make_engine(**flags)
    cases = [(prompt_of(length, number), 6, number) for number, length in enumerate([90, 3, 100, 41, 1, 64])]
    got = serve(engine, cases)
    for number, (prompt, count, _) in enumerate(cases):
        where = f"{flags}, request {number} (prompt of {len(prompt)}). {LOOK_PREPARE} Difference"
        expected = reference_greedy(reference, prompt, count)
        assert_same_greedy(reference, prompt, got[str(number)].token_ids, expected, where)


@BOTH
@pytest.mark.parametrize("budget", [1, 3, 8, 64])
def test_positions_and_steps(budget: int, is_async: bool) -> None:
    """No position is computed twice, and no step is empty: one prompt alone takes ⌈P / budget⌉ steps."""
    engine = scripted_engine(async_scheduling=is_async, max_num_seqs=1, max_num_batched_tokens=budget)
    engine.add_request("0", [5] * 20, params_for(4, ignore_eos=True))
    answer = run_dry(engine)["0"]
    expected = (20 + 4 - 1, -(-20 // budget) + 4 - 1, answer_alone([5] * 20, 4, ignore_eos=True))
    got = (executor_of(engine).num_tokens_computed, engine.num_steps, answer.token_ids)
    assert got == expected, (
        f"a prompt of 20, 4 tokens, budget {budget}: expected (positions, steps, answer) {expected}, got {got}. "
        f"{LOOK_CHUNK}"
    )


# What a request asks for × chunks × preemption

TEN_WORDS = {100 + number: 40.0 for number in range(10)}  # with so few words, answers repeat themselves
MIXED: list[dict[str, Any]] = [
    dict(logprobs=3),
    dict(temperature=1.0, seed=3),
    dict(repetition_penalty=1.5),
    dict(temperature=0.7, seed=4, top_k=5, top_p=0.9, repetition_penalty=1.2),
    dict(presence_penalty=1.5, frequency_penalty=1.0, logprobs=2),
    dict(temperature=1.0, seed=3, logprobs=1),
    dict(ignore_eos=False, min_tokens=5, logit_bias={**TEN_WORDS, 2: 60.0}),
    dict(stop_token_ids=[2], min_tokens=7, logit_bias={**TEN_WORDS, 2: 60.0}),
    dict(temperature=1.0, seed=5, ignore_eos=False, min_tokens=8, logit_bias={**TEN_WORDS, 2: 40.0}),
    dict(temperature=1.2, seed=6, logit_bias={}),
]
NUM_TOKENS = 10


def mixed(number: int) -> SamplingParams:
    return greedy(NUM_TOKENS, **{"logit_bias": TEN_WORDS, **MIXED[number]})


def mixed_prompt(prompt_of: PromptOf, number: int) -> list[int]:
    """Words of the bias are at its beginning and end, so that a penalty has to count all chunks."""
    return [102, *prompt_of(20 + 3 * number, number % 3), 101, 104]


@pytest.fixture(scope="module")
def mixed_alone(llm: LLM, prompt_of: PromptOf) -> list[CompletionOutput]:
    """Each request of MIXED alone, in a large pool, its prompt in one step."""
    prompts = [mixed_prompt(prompt_of, number) for number in range(len(MIXED))]
    return [llm.generate([prompt], mixed(number))[0].outputs[0] for number, prompt in enumerate(prompts)]


def check_logprobs(got: list[dict[int, Logprob]] | None, expected: list[dict[int, Logprob]], where: str) -> None:
    assert len(got or []) == len(expected), f"{where}: logprobs of {len(got or [])} tokens, expected {len(expected)}."
    for entry, wanted in zip(got or [], expected, strict=True):
        assert list(entry) == list(wanted), f"{where}: logprobs of {list(entry)}, expected {list(wanted)}."
        for token_id, logprob in entry.items():
            assert abs(logprob.logprob - wanted[token_id].logprob) < 1e-3, f"{where}: {entry}, expected {wanted}."


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(max_num_seqs=4, max_num_batched_tokens=4),
        dict(max_num_seqs=10, max_num_batched_tokens=23, long_prefill_token_threshold=9),
        dict(async_scheduling=False, max_num_seqs=3, max_num_batched_tokens=8),
        dict(block_size=4, num_kv_blocks=1 + 24, max_num_seqs=6, max_num_batched_tokens=9),
        dict(block_size=4, num_kv_blocks=1 + 24, max_num_seqs=6, max_num_batched_tokens=9, async_scheduling=False),
    ],
    ids=str,
)
def test_chunks_and_preemptions_change_no_answer(
    make_llm: MakeLLM, mixed_alone: list[CompletionOutput], reference: Any, prompt_of: PromptOf, flags: dict[str, Any]
) -> None:
    """Seeded draws stay the same, penalties count the whole prompt, and logprobs begin with the first token."""
    engine = make_llm(**flags).engine
    half_way = count_half_way(engine)
    for number in range(len(MIXED)):
        engine.add_request(str(number), mixed_prompt(prompt_of, number), mixed(number))
    got = run_dry(engine)
    for number, expected in enumerate(mixed_alone):
        answer, where = got[str(number)], f"{MIXED[number]} among others with {flags}"
        assert answer.token_ids == expected.token_ids, (
            f"{where}: expected what it gets alone, in one step, {expected.token_ids}, got {answer.token_ids}. "
            f"{LOOK_PREPARE}"
        )
        reasons = (answer.finish_reason, answer.stop_reason)
        assert reasons == (expected.finish_reason, expected.stop_reason), f"{where}: {reasons}. {LOOK_CHUNK}"
        check_logprobs(answer.logprobs, expected.logprobs or [], f"{where}. {LOOK_CHUNK}")
        check_ranks(reference, mixed_prompt(prompt_of, number), answer, f"{where}. {LOOK_CHUNK}")
    assert bool(half_way) is ("num_kv_blocks" in flags), f"{flags}: preempted in the middle of a prompt: {half_way}"


def test_a_chunk_writes_no_token(make_engine: MakeEngine, prompt_of: PromptOf) -> None:
    """A sampled token goes to the token buffer, behind the last token computed: there the rest of the prompt is."""
    engine, prompt = make_engine(max_num_seqs=2, max_num_batched_tokens=8, async_scheduling=False), prompt_of(30)
    engine.add_request("0", prompt, SamplingParams(temperature=1.0, seed=3, max_tokens=2))
    for number in range(3):
        outputs = take_step(engine)
        assert outputs == [], f"chunk {number} of 4: expected no token, got {outputs}. {LOOK_CHUNK}"
        got = engine.executor.worker.runner.tokens.data[rows_of(engine)["0"], :30].tolist()
        assert got == prompt, f"chunk {number} of 4 has changed the prompt {prompt} to {got}. {LOOK_PREPARE}"
    outputs = take_step(engine)
    assert len(outputs) == 1, f"the last chunk: expected one token, got {outputs}. {LOOK_CHUNK}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [dict(), dict(async_scheduling=False), dict(block_size=4, num_kv_blocks=1 + 24)], ids=str
)
def test_stop_strings(make_llm: MakeLLM, llm: LLM, prompt_of: PromptOf, flags: dict[str, Any]) -> None:
    small = make_llm(max_num_seqs=4, max_num_batched_tokens=9, **flags)
    prompts = [prompt_of(12 + 7 * number, number) for number in range(6)]
    whole = [result.outputs[0] for result in llm.generate(prompts, greedy(16))]
    stops = [each.text[6 + 3 * n :][:5] or "¤" for n, each in enumerate(whole)]
    got = small.generate(prompts, [greedy(16, stop=[stop]) for stop in stops])
    for number, (full, stop) in enumerate(zip(whole, stops, strict=True)):
        output, is_found = got[number].outputs[0], stop in full.text
        expected = (full.text[: full.text.find(stop)], "stop", stop) if is_found else (full.text, "length", None)
        actual = (output.text, output.finish_reason, output.stop_reason)
        assert actual == expected, f"request {number}, stop={stop!r}, {flags}: {expected}, got {actual}. {LOOK_LLM}"
    engine = small.engine
    assert not engine.has_unfinished_requests and not engine.blocks.num_used_blocks, (
        f"requests or blocks remain. {LOOK_LLM}"
    )


@pytest.mark.slow
def test_generate_answers_as_with_whole_prompts(make_llm: MakeLLM, llm: LLM, prompt_of: PromptOf) -> None:
    prompts = [prompt_of(length, number) for number, length in enumerate([50, 3, 77, 20])]
    expected = [result.outputs for result in llm.generate(prompts, greedy(7))]
    for flags in (dict(max_num_batched_tokens=6), dict(enable_chunked_prefill=False, async_scheduling=True)):
        got = [result.outputs for result in make_llm(max_num_seqs=6, **flags).generate(prompts, greedy(7))]
        assert got == expected, f"{flags}: expected {expected}, got {got}. {LOOK_LLM}"


# Chunks bring no output


@BOTH
def test_chunks_never_appear_in_the_outputs(is_async: bool) -> None:
    """No empty deltas: a request's first output is its first token. Others get theirs meanwhile."""
    engine = scripted_engine(100, async_scheduling=is_async, max_num_seqs=2, max_num_batched_tokens=5)
    engine.add_request("0", [5, 6], params_for(30, ignore_eos=True))
    take_step(engine)
    engine.add_request("1", [7] * 18, params_for(3, ignore_eos=True))
    outputs = [[(output.request_id, len(output.token_ids)) for output in take_step(engine)] for _ in range(8)]
    # 1 computes 4 tokens per step: 0–4, 4–8, 8–12, 12–16, 16–18
    brought = [[("0", 1)]] * 4 + [[("0", 1), ("1", 1)]] * 3
    expected = [[("0", 1)], *brought] if is_async else [*brought, [("0", 1)]]
    assert outputs == expected, (
        f"0 decodes, 1 has a prompt of 18, budget 5: expected steps to bring {expected}, got {outputs}. {LOOK_CHUNK}"
    )


@BOTH
def test_a_step_of_chunks_only_brings_nothing(is_async: bool) -> None:
    engine = scripted_engine(async_scheduling=is_async, max_num_seqs=1, max_num_batched_tokens=4)
    engine.add_request("0", [5] * 12, params_for(2, ignore_eos=True))
    counts = [len(take_step(engine)) for _ in range(4 + is_async)]
    expected = [0] * (2 + is_async) + [1, 1]
    assert counts == expected, (
        f"three chunks, two tokens: expected {expected} outputs per step, got {counts}. {LOOK_CHUNK}"
    )
    assert not engine.has_unfinished_requests, f"it has its two tokens. {LOOK_CHUNK}"


# Failures and aborts, half-way


def fail(engine: LLMEngine, num_steps: int, expected: list[str], where: str) -> None:
    """The next step that raises ends these requests with the cause, in any order, and the engine can be used."""
    with pytest.raises(ZeroDivisionError) as caught:
        for _ in range(num_steps):
            outputs = LLMEngine.step(engine)
            assert outputs == [], f"{where}: a chunk brings no token, got {outputs}. {LOOK_CHUNK}"
    outputs = engine.fail(caught.value)
    got = [(output.request_id, output.error) for output in outputs]
    wanted = [(name, "ZeroDivisionError: the cat sat on it") for name in expected]
    assert sorted(got) == sorted(wanted), f"{where}: expected {wanted}, got {got}. {LOOK_FAIL}"
    used = engine.blocks.num_used_blocks
    assert not engine.has_unfinished_requests and not used, f"{where}: {used} blocks are held. {LOOK_FAIL}"
    check_engine(engine, where)
    engine.add_request("next", [7] * 20, params_for(4, ignore_eos=True))
    answer, alone = run_dry(engine)["next"].token_ids, answer_alone([7] * 20, 4, ignore_eos=True)
    assert answer == alone, f"{where}, the next request: expected {alone}, got {answer}. {LOOK_FAIL}"


@BOTH
@pytest.mark.parametrize("where", ["launch_error", "result_error"])
def test_a_step_of_chunks_that_fails_ends_all_requests(where: str, is_async: bool) -> None:
    """0 and 1 are half-way; 2 and 3 wait."""
    engine = scripted_engine(
        async_scheduling=is_async, max_num_seqs=2, max_num_batched_tokens=8, long_prefill_token_threshold=4
    )
    for name in "0123":
        engine.add_request(name, [90 + int(name)] * 20, params_for(4, ignore_eos=True))
    take_step(engine)
    setattr(executor_of(engine), where, ZeroDivisionError("the cat sat on it"))
    fail(engine, 2, ["0", "1", "2", "3"], where)


def test_a_step_whose_requests_were_aborted_may_fail() -> None:
    """A chunk is in flight when its request is aborted: no request gets the error."""
    engine = scripted_engine(max_num_seqs=1, max_num_batched_tokens=4)
    engine.add_request("0", [5] * 20, params_for(6))
    executor_of(engine).result_error = ZeroDivisionError("the cat sat on it")
    take_step(engine)
    engine.abort_requests(["0"])
    fail(engine, 1, [], "aborted before its step failed")


def test_preempted_by_a_step_that_fails_at_its_launch() -> None:
    """1 is preempted in the middle of its prompt by the step that fails, and a chunk of it is in flight."""
    engine = scripted_engine(max_num_seqs=2, max_num_batched_tokens=3, block_size=2, num_kv_blocks=1 + 7)
    half_way = count_half_way(engine)
    engine.add_request("0", [5] * 3, params_for(9, ignore_eos=True))
    engine.add_request("1", [6] * 10, params_for(4, ignore_eos=True))
    executor_of(engine).preemption_error = ZeroDivisionError("the cat sat on it")
    with pytest.raises(ZeroDivisionError) as caught:
        for _ in range(20):
            LLMEngine.step(engine)
    assert half_way == ["1"], f"expected 1 to be preempted in the middle of its prompt, got {half_way}"
    got = ids(engine.fail(caught.value))
    assert got == ["0", "1"], f"0 runs, 1 was preempted: expected an error for both, got {got}. {LOOK_FAIL}"
    check_engine(engine, "after a step that preempted 1 and failed")


@BOTH
def test_an_abort_half_way(is_async: bool) -> None:
    """Its blocks and row can be reused at once, even while a chunk of it is in flight."""
    engine = scripted_engine(
        async_scheduling=is_async, max_num_seqs=2, max_num_batched_tokens=6, block_size=4, num_kv_blocks=1 + 9
    )
    engine.add_request("0", [5] * 2, params_for(20, ignore_eos=True))
    engine.add_request("1", [6] * 24, params_for(4, ignore_eos=True))
    engine.add_request("2", [7] * 12, params_for(4, ignore_eos=True))
    for _ in range(3):
        take_step(engine)
    [_, long] = engine.scheduler.running
    assert 0 < long.num_computed_tokens < 24, f"this test needs 1 to be half-way, got {long}"
    held = len(engine.blocks.block_tables["1"])
    free = engine.blocks.num_free_blocks
    engine.abort_requests(["1"])
    got = engine.blocks.num_free_blocks - free
    assert got == held == 6, f"1 held {held} blocks (6 hold its prompt), {got} are free now. {LOOK_CHUNK}"
    answers = run_dry(engine)
    assert "1" not in answers, f"1 was aborted half-way: expected no answer, got {answers.get('1')}. {LOOK_CHUNK}"
    for name, (prompt, count) in {"2": ([7] * 12, 4)}.items():
        expected, output = answer_alone(prompt, count, ignore_eos=True), answers[name].token_ids
        assert output == expected, f"request {name}: expected {expected}, got {output}. {LOOK_CHUNK}"


@BOTH
def test_preempted_half_way_and_resumed(is_async: bool) -> None:
    """0 decodes and gets blocks of 1's prompt. 1 starts again, and its answer is the same."""
    engine = scripted_engine(
        async_scheduling=is_async, max_num_seqs=2, max_num_batched_tokens=3, block_size=2, num_kv_blocks=1 + 7
    )
    half_way = count_half_way(engine)
    engine.add_request("0", [5] * 3, params_for(9, ignore_eos=True))
    engine.add_request("1", [6] * 10, params_for(4, ignore_eos=True))
    answers = run_dry(engine)
    assert half_way == ["1"], f"expected 1 to be preempted in the middle of its prompt, got {half_way}"
    for name, prompt, count in (("0", [5] * 3, 9), ("1", [6] * 10, 4)):
        expected, got = answer_alone(prompt, count, ignore_eos=True), answers[name].token_ids
        assert got == expected, f"request {name}: expected {expected}, got {got}. {LOOK_CHUNK}"


# The trace


def test_the_trace_shows_chunks(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    engine = scripted_engine(100, max_num_seqs=2, max_num_batched_tokens=5, trace=str(path))
    engine.add_request("0", [5, 6], params_for(6, ignore_eos=True))
    engine.add_request("1", [7] * 9, params_for(2, ignore_eos=True))
    run_dry(engine)
    engine.tracer.close()
    trace = read_trace(path)
    same("header", trace.header["part"], "part06_chunked_prefill", LOOK_TRACE)
    got = [[(r.id, r.num_computed, r.num_scheduled, r.num_sampled) for r in step.requests] for step in trace.steps]
    expected = [
        [("0", 0, 2, 1), ("1", 0, 3, 0)],
        [("0", 2, 1, 1), ("1", 3, 4, 0)],
        [("0", 3, 1, 1), ("1", 7, 2, 1)],
        [("0", 4, 1, 1), ("1", 9, 1, 1)],
        [("0", 5, 1, 1)],
        [("0", 6, 1, 1)],
    ]
    same("each step's (id, num_computed, num_scheduled, num_sampled)", got, expected, LOOK_TRACE)
    phases = [{name: phase.name for name, phase in step.items()} for step in step_phases(trace.steps)]
    decode, chunk, prefill = Phase.DECODE.name, Phase.CHUNK.name, Phase.PREFILL.name
    expected_phases = [
        {"0": prefill, "1": chunk}, {"0": decode, "1": chunk}, {"0": decode, "1": prefill},
        {"0": decode, "1": decode}, {"0": decode}, {"0": decode},
    ]  # fmt: skip
    same("phases", phases, expected_phases, LOOK_TRACE)
    same("discarded: a chunk brings no token", [step.discarded for step in trace.steps], [[]] * 6, LOOK_TRACE)
    same("finished", [step.finished for step in trace.steps], [[], [], [], ["1"], [], ["0"]], LOOK_TRACE)


def test_the_trace_shows_discarded_tokens(tmp_path: Path) -> None:
    """A token in flight when its request has ended is discarded. A chunk in flight at an abort has no token."""
    path = tmp_path / "trace"
    engine = scripted_engine(
        100, max_num_seqs=2, max_num_batched_tokens=5, trace=str(path), script=lambda tokens: END if 5 in tokens else 9
    )
    engine.add_request("0", [5, 6], params_for(6))
    engine.add_request("1", [7] * 30, params_for(2))
    take_step(engine)
    take_step(engine)
    engine.abort_requests(["1"])
    run_dry(engine)
    engine.tracer.close()
    steps = read_trace(path).steps
    got = [([r.id for r in step.requests], step.discarded, step.finished, step.aborted) for step in steps]
    expected = [(["0", "1"], [], ["0"], []), (["0", "1"], ["0"], [], ["1"])]
    same("(requests, discarded, finished, aborted)", got, expected, LOOK_TRACE)
