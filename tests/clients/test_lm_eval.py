"""lm-eval's local-completions: the log-likelihoods that it reads from the server are transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.conftest import ROOT

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-clients")

MODEL = ROOT / "models" / "tiny"
QUESTIONS = [
    ("Once upon a time there was a little", ["girl", "engine", "seventeen"]),
    ("The fox went to the", ["river", "because", "house"]),
]
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    """For each question, the log-likelihood of each of its choices."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def log_likelihood(question: str, choice: str) -> float:
        num_given, token_ids = len(tokenizer.encode(question)), tokenizer.encode(f"{question} {choice}")
        with torch.inference_mode():
            logprobs = model(torch.tensor([token_ids])).logits[0].float().log_softmax(dim=-1)
        places = range(num_given, len(token_ids))
        return sum(float(logprobs[place - 1, token_ids[place]]) for place in places)

    return [[log_likelihood(question, choice) for choice in choices] for question, choices in QUESTIONS]


def write_task(directory: Path, answers: list[int]) -> None:
    """A multiple-choice task with two questions and these answers, in files of its own."""
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer}) + "\n"
        for (question, choices), answer in zip(QUESTIONS, answers, strict=True)
    ]
    data = directory / "two_lines.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    task = {
        "task": "two_lines",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "two_lines.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.mark.parametrize("tokenized_requests", [True, False], ids=["token ids", "text"])
def test_log_likelihoods(
    server_url: str, run_client: Callable[..., str], tmp_path: Path, expected: list[list[float]],
    tokenized_requests: bool,
) -> None:  # fmt: skip
    likeliest = [max(range(len(values)), key=values.__getitem__) for values in expected]
    write_task(tmp_path, [likeliest[0], (likeliest[1] + 1) % len(expected[1])])  # so one of the two answers is right
    arguments = {
        "model": "tiny",
        "base_url": f"{server_url}/v1/completions",
        "tokenizer": str(MODEL),
        "tokenized_requests": tokenized_requests,
        "max_retries": 1,
    }
    run_client(
        "lm_eval", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", "two_lines", "--include_path", str(tmp_path), "--batch_size", "2",
        "--output_path", str(tmp_path / "out"), "--log_samples",
    )  # fmt: skip
    [samples] = (tmp_path / "out").rglob("samples_two_lines_*.jsonl")
    docs = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda doc: doc["doc_id"])
    got = [[float(response[0]) for response in doc["filtered_resps"]] for doc in docs]
    assert [len(values) for values in got] == [len(values) for values in expected], f"got {docs}"
    for (question, choices), values, references in zip(QUESTIONS, got, expected, strict=True):
        for choice, value, reference in zip(choices, values, references, strict=True):
            assert abs(value - reference) < TOLERANCE, f"{question!r} {choice!r}: expected {reference}, got {value}"
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text(encoding="utf-8"))["results"]["two_lines"]["acc,none"] == 0.5
