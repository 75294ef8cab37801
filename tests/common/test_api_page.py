"""docs/http_api.md names every endpoint and every field that the server knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from common.openai_app import create_app
from common.openai_app.fields import CHAT_FIELDS, COMPLETION_FIELDS, IGNORED, NEUTRAL
from common.prompts import NEUTRAL as OF_MESSAGES
from tests.common.openai_fakes import FakeEngine

PAGE = (Path(__file__).parents[2] / "docs" / "http_api.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"\n## (.+)\n((?:(?!\n## )[\s\S])*)", PAGE))


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("Fields that are read", CHAT_FIELDS | COMPLETION_FIELDS),
        ("Fields that are ignored", IGNORED | OF_MESSAGES.keys()),
        ("Fields that are refused, unless they change nothing", NEUTRAL.keys()),
    ],
)
def test_every_field_is_named(section: str, names: set[str]) -> None:
    missing = sorted(name for name in names if f"`{name}`" not in SECTIONS[section])
    assert not missing, f"docs/http_api.md, {section!r}, lacks {missing}"


def test_every_endpoint_is_named(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    paths = {"/", "/docs", "/openapi.json", *create_app(FakeEngine(tiny_tokenizer)).openapi()["paths"]}
    missing = sorted(path for path in paths if f"{path}`" not in SECTIONS["Endpoints"])
    assert not missing, f"docs/http_api.md lacks the endpoints {missing}"
