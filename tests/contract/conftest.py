"""The contract suite runs on every part folder found on disk, from the part that introduces what a test checks.

A test takes the fixture `part` (a folder's name), or `engine` (that part's engine), and says `@pytest.mark.since(3)`,
or `since(3, unless=...)` with a function that says of which parts it has nothing to say.
`pytest tests/contract --part 3` keeps to one part.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS_DIR, load_model, load_tokenizer, resolve_checkpoint
from common.outputs import RequestOutput
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams
from common.testing import reference_greedy
from tests.contract.engines import SmallModels, number_of

ROOT = Path(__file__).parents[2]
PARTS = sorted(path.name for path in ROOT.glob("part[0-9][0-9]_*") if (path / "__init__.py").is_file())

torch.set_num_threads(1)  # for models this small a second thread only waits; on a busy machine it waits long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", type=int, default=None, help="the contract suite on this part alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("since")
    if mark is None or len(mark.args) != 1:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} needs @pytest.mark.since(<the first part it holds for>)")
    unless = mark.kwargs.get("unless", lambda part: False)
    parts = [part for part in PARTS if number_of(part) >= mark.args[0] and not unless(part)]
    metafunc.parametrize("part", parts, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = config.getoption("--part", default=None)
    if only is None:
        return
    if only not in map(number_of, PARTS):
        raise pytest.UsageError(f"--part {only}: there is no such part; the parts so far: {', '.join(PARTS)}")
    here = [item for item in items if Path(__file__).parent in item.path.parents and hasattr(item, "callspec")]
    others = {item for item in here if number_of(item.callspec.params.get("part", f"part{only:02d}")) != only}
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=list(others))


class Engine:
    """One part's engine behind one interface: a list of prompts in, a list of RequestOutputs out.

    Parts 1 and 2 take one prompt at a time, and their LLM is in server.py; from part 3 on it takes a list.
    """

    def __init__(self, part: str, model: str, **flags: Any) -> None:
        self.part, self.takes_lists = part, number_of(part) >= 3
        config = importlib.import_module(f"{part}.config").EngineConfig(model=model, device="cpu", **flags)
        module = "llm" if (ROOT / part / "llm.py").is_file() else "server"
        self.llm = importlib.import_module(f"{part}.{module}").LLM(config)

    def generate(self, prompts: list[list[int]], **fields: Any) -> list[RequestOutput]:
        params = SamplingParams(**{"temperature": 0, **fields})
        if self.takes_lists:
            return self.llm.generate(prompts, params)
        return [self.llm.generate(prompt, params) for prompt in prompts]


class Reference:
    """The shipped model in transformers' own hands, and a copy of it on disk that ends on one more token.

    free_run: 16 greedy tokens after stop_prompt. In the copy the token at free_run[end] ends a sequence too, so that
    the tests of the stop rules do not depend on what the model has learned. (Chat models have several such tokens.)
    """

    stop_prompt = [980, 899, 414, 14, 1115, 469, 288, 265, 1321, 274]  # "One fine day, Nora went to the market and"

    def __init__(self, directory: Path) -> None:
        checkpoint = resolve_checkpoint("tiny")
        self.model = load_model(checkpoint, torch.float32, "cpu")
        self.tokenizer = load_tokenizer(checkpoint)
        self.max_model_len = checkpoint.max_model_len
        self._answers: dict[tuple[Any, ...], list[int]] = {}
        self.free_run = self.greedy(self.stop_prompt, 16)
        new = [i for i, token in enumerate(self.free_run) if token not in self.free_run[:i] and self.decode([token])]
        assert new and new[-1] >= 2, f"the model repeats itself at once, {self.free_run}: choose another stop_prompt"
        self.end = new[-1]
        self.eos_token_ids = sorted(checkpoint.eos_token_ids | {self.free_run[self.end]})
        self.directory = directory
        for path in (MODELS_DIR / "tiny").iterdir():
            if path.name != "generation_config.json":
                (directory / path.name).symlink_to(path)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": self.eos_token_ids}))

    def greedy(self, prompt: list[int], max_tokens: int, eos_token_ids: list[int] | None = None) -> list[int]:
        """What transformers answers; it is asked once."""
        asked = (*prompt, None, max_tokens, *(eos_token_ids or []))
        if asked not in self._answers:
            self._answers[asked] = reference_greedy(self.model, prompt, max_tokens, eos_token_ids or [])
        return list(self._answers[asked])

    def encode(self, text: str, chat: bool = False) -> list[int]:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return encode_prompt(body, self.tokenizer, self.max_model_len)

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engine(part: str, reference: Reference) -> Iterator[Engine]:
    """The part's engine on the copy of the shipped model."""
    yield Engine(part, str(reference.directory))


@pytest.fixture(scope="session")
def short_engine(part: str, reference: Reference) -> Iterator[Engine]:
    """The same with a context of 16 tokens."""
    yield Engine(part, str(reference.directory), max_model_len=16)


@pytest.fixture
def load_engine(part: str, reference: Reference) -> Callable[..., Engine]:
    """Makes the part's engine on the same model with flags of the test's choice."""
    return partial(Engine, part, str(reference.directory))


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def part_dir(part: str) -> Path:
    return ROOT / part
