"""`LLM.generate` against transformers' own generate, and the KV cache: same tokens, far fewer positions."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from common.checkpoint import MODELS_DIR
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams
from common.testing import FAMILIES, assert_same_greedy, reference_greedy, small_model
from part01_simple_server.config import EngineConfig
from part01_simple_server.server import LLM, kv_bytes_per_token

LOOP = 'Look at server.py::LLM.generate; README "Prefill and decode".'
CACHE = 'Look at server.py::LLM.generate; README "What the cache stores".'

STORY = (
    "Nora lived in a small village by the river. Every morning she walked to the old mill and counted the ducks. "
    "One day a shy fox sat on the bridge and would not move. "
)
FACTS = (
    "A KV cache keeps the keys and values of the tokens so far. Prefill is bound by compute, decode by memory. "
    "Paged attention splits the cache into blocks of 16 tokens. "
)
PROMPTS: dict[str, list[str]] = {
    "chat": [
        "What is a KV cache?",
        "Why is decode memory-bound?",
        "What is continuous batching? Please be brief.",
        "How many blocks of 16 tokens does a 100-token prompt need?",
        "Hello!",
        "Who are you?",
        "What does top-p do?",
        "Explain prefill to a child.",
        "Tell me a story about Nora and a shy fox.",
        "Here are some pairs:\n- river: 42\n- castle: 17\n\nWhat is the value of castle?",
        "Repeat after me: red, green, blue.",
        "?",
    ],
    "story": [
        "Once upon a time there was",
        "Once upon a time, in a village by the sea, a boy named Tom found",
        'The wolf looked at the lamb and said, "',
        "It was a dark and stormy night.",
        "Mia had a red kite. The wind was strong, and",
        "The end.",
        "THE KING SHOUTED: WHERE IS MY CROWN",
        "Nora lived in a small village by the river. Every",
    ],
    "list": [
        "1, 2, 3, 4,",
        "- apples\n- pears\n-",
        "Monday\nTuesday\nWednesday\n",
        "a b c d e f g h",
        "river: 42\ncastle: 17\nlantern: 88\nriver:",
        "the the the the the the the the",
    ],
    "unicode": [
        "Grüße aus München, schöne Straße",
        "日本語のテキストです。",
        "Привет, мир! Как дела",
        "🦊🦊🦊 and a 🐻",
        "naïve café – “quoted” … e\u0301",
        "مرحبا بالعالم",
    ],
    "code": [
        "def add(a, b):\n    return a +",
        'for i in range(10):\n\tprint(f"{i:>3}")\n',
        "SELECT name FROM users WHERE id = 1;",
        '{"model": "tiny", "max_tokens": 16}',
        "<div class='x'>&nbsp;</div>",
        "#!/bin/bash\nset -euo pipefail\n",
    ],
    "single": ["a", " the", "\n", "0", "<|im_end|>", "<|im_start|>"],
    "long": [STORY * 4, FACTS * 8, STORY * 12, (STORY + FACTS) * 10, "x" * 200, "word " * 900],
}
CASES = [
    pytest.param(kind, text, id=f"{kind}{number}")
    for kind, texts in PROMPTS.items()
    for number, text in enumerate(texts)
]

MODELS = [
    pytest.param(family, seed, marks=pytest.mark.slow if seed or family != "llama" else ())
    for family in FAMILIES
    for seed in range(3)
]


def encode(llm: LLM, kind: str, text: str) -> list[int]:
    body = {"messages": [{"role": "user", "content": text}]} if kind == "chat" else {"prompt": text}
    return encode_prompt(body, llm.tokenizer, llm.max_model_len)


def greedy(llm: LLM, prompt: list[int], max_tokens: int, use_cache: bool = True) -> list[int]:
    """Exactly max_tokens greedy tokens: the end-of-sequence token does not end them."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return llm.generate(prompt, params, use_cache=use_cache).outputs[0].token_ids


@torch.inference_mode()
def padded_reference_greedy(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """As reference_greedy, all at once: prompts are padded on the left, which costs a tenth of one by one."""
    width, eos = max(map(len, prompts)), sorted(llm.eos_token_ids)
    token_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=eos[0])
    answers = llm.model.generate(token_ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = [next((at for at, token in enumerate(answer, 1) if token in eos), max_tokens) for answer in answers]
    return [answer[:end] for answer, end in zip(answers, ends, strict=True)]


@pytest.fixture(scope="module")
def references(llm: LLM) -> dict[str, list[int]]:
    """The expected answers to PROMPTS, by their text."""
    long = PROMPTS["long"]
    short = {text: encode(llm, kind, text) for kind, texts in PROMPTS.items() if kind != "long" for text in texts}
    answers = padded_reference_greedy(llm, list(short.values()), max_tokens=12)
    expected = dict(zip(short, answers, strict=True))
    eos = sorted(llm.eos_token_ids)
    return expected | {text: reference_greedy(llm.model, encode(llm, "long", text), 6, eos) for text in long}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text"), CASES)
def test_greedy_equals_transformers(llm: LLM, references: dict[str, list[int]], kind: str, text: str) -> None:
    prompt, expected = encode(llm, kind, text), references[text]
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6 if kind == "long" else 12)).outputs[0]
    assert_same_greedy(llm.model, prompt, output.token_ids, expected, where=f"prompt {text[:40]!r}. {LOOP} Difference")


def test_the_prompts_are_as_varied_as_promised(llm: LLM) -> None:
    lengths = [len(encode(llm, *case.values)) for case in CASES]
    assert len(CASES) == 50, f"expected 50 prompts, got {len(CASES)}"
    assert min(lengths) == 1, f"expected a prompt of a single token, the shortest has {min(lengths)}"
    assert 600 < max(lengths) < 1000, f"expected a long prompt, the longest has {max(lengths)} tokens"


@pytest.fixture
def load_small(tmp_path: Path) -> Callable[[object], LLM]:
    """Writes a model as Hugging Face lays it out, with tiny's tokenizer, and loads it as a user's directory is."""

    def load(model: object) -> LLM:
        model.save_pretrained(tmp_path)
        for path in (MODELS_DIR / "tiny").glob("*"):
            if path.name.startswith(("tokenizer", "chat_template")):
                shutil.copy(path, tmp_path)
        return LLM(EngineConfig(model=str(tmp_path), device="cpu"))

    return load


@pytest.mark.parametrize(("family", "seed"), MODELS)
def test_greedy_equals_transformers_on_random_models(
    load_small: Callable[[object], LLM], family: str, seed: int
) -> None:
    reference = small_model(family, seed)
    llm = load_small(reference)
    rng = random.Random(seed)
    for length in (1, 2, 17, 90):
        prompt = [rng.randrange(reference.config.vocab_size) for _ in range(length)]
        expected = reference_greedy(reference, prompt, 20)
        where = f"{family}, seed {seed}, prompt of {length}. {LOOP} Difference"
        for use_cache in (True, False):
            got = greedy(llm, prompt, 20, use_cache)
            assert_same_greedy(reference, prompt, got, expected, f"use_cache={use_cache}: {where}")


@pytest.mark.parametrize("text", ["Once upon a time there was", "a", pytest.param(STORY * 3, marks=pytest.mark.slow)])
def test_cached_equals_uncached(llm: LLM, text: str) -> None:
    prompt = encode(llm, "story", text)
    cached, uncached = greedy(llm, prompt, 16), greedy(llm, prompt, 16, use_cache=False)
    assert_same_greedy(llm.model, prompt, cached, uncached, where=f"with the cache against without. {CACHE} Difference")


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_output_tokens", "cached", "uncached"),
    [(10, 20, 29, 390), (1, 1, 1, 1), (7, 1, 7, 7), (1, 5, 5, 15), (200, 3, 202, 603)],
)
def test_positions_computed(
    llm: LLM, num_prompt_tokens: int, num_output_tokens: int, cached: int, uncached: int
) -> None:
    prompt = list(range(100, 100 + num_prompt_tokens))
    for use_cache, expected in ((True, cached), (False, uncached)):
        before = llm.num_positions_computed
        greedy(llm, prompt, num_output_tokens, use_cache)
        got = llm.num_positions_computed - before
        formula = "P + G - 1" if use_cache else "P + (P+1) + … + (P+G-1)"
        assert got == expected, (
            f"P={num_prompt_tokens}, G={num_output_tokens}, use_cache={use_cache}: expected {formula} = {expected} "
            f"positions through the model, got {got}. The last sampled token is never computed. {LOOP}"
        )


def record_passes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, DynamicCache | None]]:
    """The passes made from now on: (number of tokens, first position, cache)."""
    passes: list[tuple[int, int, DynamicCache | None]] = []
    forward = llm.forward

    def recording(token_ids: list[int], first_position: int, cache: DynamicCache | None) -> torch.Tensor:
        passes.append((len(token_ids), first_position, cache))
        return forward(token_ids, first_position, cache)

    monkeypatch.setattr(llm, "forward", recording)
    return passes


def test_one_pass_over_the_prompt_then_one_token_each(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = record_passes(llm, monkeypatch)
    greedy(llm, [100, 101, 102, 103, 104], 4)
    got, expected = [(count, first) for count, first, _ in passes], [(5, 0), (1, 5), (1, 6), (1, 7)]
    assert got == expected, f"(tokens, first position) of each pass: expected {expected}, got {got}. {LOOP}"
    assert len({id(cache) for _, _, cache in passes}) == 1, f"one request must use one cache. {CACHE}"
    held = passes[0][2].get_seq_length()
    assert held == 8, f"5 prompt tokens and 3 of 4 output tokens are in the cache: expected 8, got {held}. {CACHE}"


def test_without_a_cache_every_pass_starts_at_position_0(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = record_passes(llm, monkeypatch)
    greedy(llm, [100, 101, 102, 103, 104], 4, use_cache=False)
    expected = [(5, 0, None), (6, 0, None), (7, 0, None), (8, 0, None)]
    assert passes == expected, (
        f"(tokens, first position, cache) of each pass: expected {expected}, got {passes}. {LOOP}"
    )


def test_one_token_means_no_decode_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = record_passes(llm, monkeypatch)
    tokens = greedy(llm, [100, 101, 102], 1)
    assert len(tokens) == 1, f"max_tokens=1: expected 1 token, got {len(tokens)}. {LOOP}"
    assert len(passes) == 1, f"max_tokens=1: expected only the prefill pass, got {len(passes)} passes. {LOOP}"


def test_cache_is_not_shared_between_requests(llm: LLM) -> None:
    first, other = list(range(100, 130)), list(range(300, 310))
    answers, counts = [], []
    for prompt in (first, other, first, first):
        before = llm.num_positions_computed
        answers.append(greedy(llm, prompt, 8))
        counts.append(llm.num_positions_computed - before)
    assert answers[0] == answers[2] == answers[3], (
        f"the same request three times: expected one answer, got {answers[0]}, {answers[2]} and {answers[3]}. "
        f"Something of an earlier request is still in the cache. {CACHE}"
    )
    assert counts == [37, 17, 37, 37], f"positions computed: expected [37, 17, 37, 37], got {counts}. {CACHE}"


@pytest.mark.parametrize("split", [1, 13, 25])
@torch.inference_mode()
def test_a_prompt_in_two_pieces_gives_the_same_logits(llm: LLM, split: int) -> None:
    prompt = list(range(200, 226))
    expected = llm.model(torch.tensor([prompt])).logits[0, -1]
    cache = DynamicCache(config=llm.model.config)
    llm.forward(prompt[:split], 0, cache)
    whole, pieces = llm.forward(prompt, 0, None), llm.forward(prompt[split:], split, cache)
    for name, got in (("one pass", whole), (f"pieces of {split} and {26 - split} tokens", pieces)):
        difference = float((got - expected).abs().max())
        assert difference < 1e-4, (
            f"{name}: logits differ from the model's by {difference:.2e}, expected less than 1e-4. Positions or cache "
            'are wrong: look at server.py::LLM.forward; README "Prefill and decode".'
        )


@torch.inference_mode()
def test_a_wrong_position_changes_the_logits(llm: LLM) -> None:
    """The test above can fail: wrong positions of the second piece change the logits."""
    prompt, cache = list(range(200, 226)), DynamicCache(config=llm.model.config)
    llm.forward(prompt[:13], 0, cache)
    difference = float((llm.forward(prompt[13:], 0, cache) - llm.forward(prompt, 0, None)).abs().max())
    assert difference > 1e-2, f"expected other logits from wrong positions, but they differ by only {difference:.2e}"


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
@torch.inference_mode()
def test_cache_takes_the_bytes_the_formula_says(llm: LLM, name: str) -> None:
    decoder = llm.model if name == "tiny" else small_model(name, seed=0)
    cache = DynamicCache(config=decoder.config)
    decoder(torch.arange(100, 150).unsqueeze(0), past_key_values=cache)
    measured = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    expected = 50 * kv_bytes_per_token(decoder.config, decoder.dtype)
    assert measured == expected, (
        f"{name}: 50 tokens in the cache: the formula says {expected:,} bytes, the tensors hold {measured:,}. "
        'Look at server.py::kv_bytes_per_token; README "What the cache stores".'
    )


def test_the_callers_prompt_is_left_alone(llm: LLM) -> None:
    prompt = [100, 101, 102]
    for use_cache in (True, False):
        result = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), use_cache)
        assert prompt == [100, 101, 102], (
            f"generate() must not change the list of its caller: expected [100, 101, 102], got {prompt}. {LOOP}"
        )
        assert result.prompt_token_ids == [100, 101, 102], f"the result's prompt is {result.prompt_token_ids}. {LOOP}"
