"""Engines of parts 3 and later over small random models, driven step by step: what the tests of the border share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from transformers import AutoConfig, AutoTokenizer

from common.checkpoint import MODELS_DIR
from common.sampling_params import SamplingParams
from common.testing import reference_greedy, small_model
from tests.local_ranks import LocalExecutor

VOCAB_SIZE = 320
DEFAULTS: dict[str, Any] = {"device": "cpu", "num_threads": 1, "block_size": 4, "num_kv_blocks": 400}
LOOKUP: dict[str, Any] = {"speculative_method": "ngram", "prompt_lookup_min": 1}
ROOT = Path(__file__).parents[2]
GROUP_SIZE = 8  # of quantized models: it divides what each of two ranks has
MAX_STEPS = 1_000  # far more than any of these tests needs
read_config = functools.cache(AutoConfig.from_pretrained)
read_tokenizer = functools.cache(AutoTokenizer.from_pretrained)


class SmallModels:
    """Two random models with the same vocabulary, on disk: a target, and a draft model that seldom agrees with it."""

    def __init__(self, directory: Path, family: str = "llama", num_layers: int = 2, quantization: str = "") -> None:
        self.directory, self.family = directory, family
        self.reference = small_model(family, seed=1, vocab_size=VOCAB_SIZE, num_layers=num_layers)
        if quantization:
            round_weights(self.reference, *{"int4": (7, GROUP_SIZE), "int8": (127, None)}[quantization])
        self._answers: dict[tuple[int, ...], list[int]] = {}
        self._decoders: list[tuple[str, Any, Any]] = []
        self.target, self.draft = str(directory / "target"), str(directory / "draft")
        self.reference.save_pretrained(self.target)
        small_model("llama", seed=2, vocab_size=VOCAB_SIZE).save_pretrained(self.draft)
        self._others: dict[str, SmallModels] = {}
        for path in (MODELS_DIR / "tiny").iterdir():
            if path.name.startswith(("tokenizer", "chat_template")):
                for folder in (self.target, self.draft):
                    shutil.copy(path, folder)

    def of(self, flags: dict[str, Any]) -> SmallModels:
        """Those that an engine with these flags is to have: mixtures of experts, if ranks share experts; more layers,
        if some of them are offloaded; weights that quantization doesn't change, if they are quantized."""
        kind = {"enable_expert_parallel": "qwen3_moe", "cpu_offload_gb": "deep"}
        name = next((kind[flag] for flag in kind if flags.get(flag)), "")
        quantization = flags.get("quantization", "")
        if not name and not quantization:
            return self
        key = f"{name} {quantization}".strip()
        if key not in self._others:
            family, num_layers = {"deep": ("llama", 5), "": ("llama", 2)}.get(name, (name, 2))
            self._others[key] = SmallModels(self.directory / key, family, num_layers, quantization)
        return self._others[key]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What transformers answers; it is asked once."""
        known = self._answers.get(tuple(prompt), [])
        if len(known) < num_tokens:
            known = self._answers[tuple(prompt)] = reference_greedy(self.reference, prompt, num_tokens)
        return known[:num_tokens]

    @contextlib.contextmanager
    def loaded_once(self, part: str) -> Iterator[None]:
        """Inside, engines of the part share what computes a model, and config and tokenizer: nothing changes them."""
        worker = importlib.import_module(f"{part}.worker.worker")
        load_decoder = worker.load_decoder

        def load(checkpoint: Any, *rest: Any, **named: Any) -> Any:
            key = (checkpoint, *rest, named)
            for name, known, decoder in self._decoders:
                if name == part and known == key:
                    return decoder
            self._decoders.append((part, key, load_decoder(checkpoint, *rest, **named)))
            return self._decoders[-1][2]

        known = {"AutoConfig": SimpleNamespace(from_pretrained=read_config)}
        known["AutoTokenizer"] = SimpleNamespace(from_pretrained=read_tokenizer)
        with mock.patch.object(worker, "load_decoder", load), mock.patch.multiple("common.checkpoint", **known):
            yield


def round_weights(model: Any, largest: int, group_size: int | None) -> None:
    """Make all weights of the layers integers up to `largest` times a scale for each group of columns of a row (None:
    for each row). The largest of each group is positive, so that all ways to choose a scale give this one."""
    for name, parameter in model.model.layers.named_parameters():
        if parameter.ndim < 2 or name.endswith("gate.weight"):
            continue
        groups = parameter.data.unflatten(-1, (-1, group_size or parameter.shape[-1]))
        found = groups.abs().max(dim=-1, keepdim=True)
        groups *= groups.gather(-1, found.indices).sign()
        scale = found.values / largest
        groups.copy_((groups / scale).round() * scale)


@dataclass
class Answer:
    """What one request got. ends: its finish reasons and errors; there must be exactly one in the end.

    prompt_logprobs: as often as they came.
    """

    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    num_cached_tokens: int | None = None
    prompt_logprobs: list[Any] = field(default_factory=list)


class SmallEngine:
    """One part's LLMEngine over a small model, and what it has answered so far."""

    def __init__(self, part: str, models: SmallModels, **flags: Any) -> None:
        self.part, models = part, models.of(flags)
        self.config = self.module("config").EngineConfig(**{**DEFAULTS, "model": models.target, **flags})
        with models.loaded_once(part), self.ranks_in_threads():
            self.core = self.module("core.engine").LLMEngine(self.config)
        self.answers: dict[str, Answer] = {}
        self.preempted = set[str]()  # ids of the requests that were preempted at some time

    @contextlib.contextmanager
    def ranks_in_threads(self) -> Iterator[None]:
        """Inside, an engine of several ranks has them in threads, where the tests can reach them."""
        if number_of(self.part) < 9 or self.config.num_ranks == 1:
            yield
            return
        make = functools.partial(LocalExecutor, self.part)
        with mock.patch.object(self.module("core.engine"), "make_executor", make):
            yield

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.part}.{name}")

    @property
    def queues(self) -> Any:
        """What has `running`, `waiting`, `free_rows` and `num_preemptions`: part 3's engine has no scheduler."""
        return getattr(self.core, "scheduler", self.core)

    @property
    def worker(self) -> Any:
        return self.core.executor.worker

    def add(self, request_id: str, prompt: list[int], **fields: Any) -> None:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})
        self.answers[request_id] = Answer()
        self.core.add_request(request_id, prompt, params)

    def step(self) -> list[Any]:
        outputs = self.core.step()
        self.note(outputs)
        self.preempted |= {each.request_id for each in self.queues.waiting if each.status.name == "PREEMPTED"}
        return outputs

    def note(self, outputs: Iterable[Any]) -> None:
        for output in outputs:
            answer = self.answers[output.request_id]
            assert not answer.ends, f"{self.part}: request {output.request_id} has ended, {answer}, and gets {output}"
            answer.token_ids += output.token_ids
            answer.ends += [end for end in (output.finish_reason, output.error) if end is not None]
            if getattr(output, "num_cached_tokens", None) is not None:
                answer.num_cached_tokens = output.num_cached_tokens
            if output.prompt_logprobs is not None:
                answer.prompt_logprobs.append(output.prompt_logprobs)

    def finish(self, on_step: Callable[[int], object] = lambda number: None) -> dict[str, Answer]:
        """Step until nothing is left. on_step(number) is called before each step; True: a request is to come."""
        number = 0
        while on_step(number) or self.core.has_unfinished_requests:
            self.step()
            number += 1
            assert number < MAX_STEPS, f"{self.part}: {number} steps, and {self.queues.running} still run"
        return self.answers

    def generate(self, prompt: list[int], **fields: Any) -> list[int]:
        """The answer to a request that is alone."""
        name = f"alone {len(self.answers)}"
        self.add(name, prompt, **fields)
        return self.finish()[name].token_ids

    def check_empty(self, look: str) -> None:
        """No request is left, and nothing is held."""
        blocks, queues = self.core.blocks, self.queues
        assert not queues.running and not queues.waiting, f"{self.part}: {queues.running}, {queues.waiting}. {look}"
        assert not getattr(self.core, "in_flight", None), (
            f"{self.part}: steps are in flight: {self.core.in_flight}. {look}"
        )
        assert (blocks.num_used_blocks, blocks.num_free_blocks) == (0, blocks.num_blocks - 1), (
            f"{self.part}: {blocks.num_used_blocks} blocks used, {blocks.num_free_blocks} of {blocks.num_blocks - 1} "
            f"free. {look}"
        )
        assert sorted(queues.free_rows) == list(range(self.config.max_num_seqs)), (
            f"{self.part}: free rows {queues.free_rows} of {self.config.max_num_seqs}. {look}"
        )


def number_of(part: str) -> int:
    return int(part[4:6])


def kinds_of(part: str, models: SmallModels, *, with_ranks: bool = True) -> dict[str, dict[str, Any]]:
    """Ways to run a part's engine: their names → flags. with_ranks: on several ranks too.

    The newest part is run in all of them. An earlier one has its defaults, and what it has introduced.
    """
    drafted = {"speculative_method": "draft_model", "speculative_model": models.draft}
    small, two = {"max_num_batched_tokens": 8}, {"tensor_parallel_size": 2}
    ep = {**two, "enable_expert_parallel": True}
    offload = {"kv_offload_gib": 0.001}
    int4 = {"quantization": "int4", "quantization_group_size": GROUP_SIZE}
    draft_int8, graphs = {"speculative_quantization": "int8"}, {"cudagraph_capture_sizes": "1,2,4,8,16"}
    since: list[tuple[int, str, dict[str, Any]]] = [
        (5, "async", {}),
        (5, "sync", {"async_scheduling": False}),
        (6, "async, small chunks", small),
        (6, "whole prompts", {"enable_chunked_prefill": False}),
        (7, "no prefix caching", {"enable_prefix_caching": False}),
        (8, "n-gram lookup", LOOKUP),
        (8, "a draft model", drafted),
        (8, "a draft model that is right", {**drafted, "speculative_model": models.target}),
        (8, "a draft model, small chunks", {**drafted, **small}),
        (9, "tp 2", two),
        (9, "tp 2, a draft model, small chunks", {**drafted, **small, **two}),
        (9, "2 stages", {"pipeline_parallel_size": 2}),
        (9, "2 stages, n-gram lookup", {**LOOKUP, "pipeline_parallel_size": 2}),
        (9, "tp 2, 2 stages, small chunks", {**small, **two, "pipeline_parallel_size": 2}),
        (11, "ep 2", ep),
        (11, "ep 2, 2 stages, n-gram lookup, small chunks", {**ep, **small, **LOOKUP, "pipeline_parallel_size": 2}),
        (12, "offload", offload),
        (12, "offload, sync", {**offload, "async_scheduling": False}),
        (12, "offload, a draft model, small chunks", {**offload, **drafted, **small}),
        (12, "offload, n-gram lookup", {**offload, **LOOKUP}),
        (12, "offload, tp 2", {**offload, **two}),
        (12, "offload, 2 stages, small chunks", {**offload, **small, "pipeline_parallel_size": 2}),
        (12, "weight offload", {"cpu_offload_gb": 1.0}),
        (12, "weight offload, n-gram lookup, small chunks", {"cpu_offload_gb": 1.0, **LOOKUP, **small}),
        (14, "int4", int4),
        (14, "int4, tp 2, a draft model in int8, small chunks", {**int4, **two, **drafted, **small, **draft_int8}),
        (14, "int8, ep 2, small chunks", {"quantization": "int8", **ep, **small}),
        (14, "int4, offload, n-gram lookup, 2 stages", {**int4, **offload, **LOOKUP, "pipeline_parallel_size": 2}),
        (14, "int8, weight offload", {"quantization": "int8", "cpu_offload_gb": 1.0}),
        (15, "the references", {"kernels": "torch"}),
        (15, "padded steps", graphs),
        (15, "padded steps, tp 2, a draft model, small chunks", {**graphs, **two, **drafted, **small}),
        (15, "padded steps, int4, offload, n-gram lookup", {**graphs, **int4, **offload, **LOOKUP}),
    ]
    number = number_of(part)
    newest = max(number_of(path.name) for path in ROOT.glob("part[0-9][0-9]_*") if (path / "__init__.py").is_file())
    kinds = {
        name: flags
        for first, name, flags in since
        if first == number or (first < number and (number == newest or not flags))
        if with_ranks or first < 9
    }
    return kinds or {"": {}}


def prompts_of(count: int, seed: int = 0, longest: int = 20) -> Iterator[list[int]]:
    """Random prompts; two thirds begin with one of two shared prefixes of two blocks."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(8)] for _ in range(2)]
    for number in range(count):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))]
        yield own if number % 3 == 2 else [*prefixes[number % 3], *own[: longest - 8]]
