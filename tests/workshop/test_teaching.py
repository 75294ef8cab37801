"""TEACHING.md names exercises, traces and commands that exist."""

from __future__ import annotations

import re

from common.trace import StepTrace, read_trace
from workshop.__main__ import ROOT

PAGE = (ROOT / "workshop" / "TEACHING.md").read_text("utf-8")
SECTION = re.compile(r"^### Part (\d+): .*?$(.*?)(?=^###? )", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (\d+) \|(?:[^|]*\|){2}([^|]*)\|", re.MULTILINE)


def exercises_of(part: int) -> set[str]:
    [page] = ROOT.glob(f"part{part:02}_*/exercises.md")
    return set(re.findall(r"^## (\w+)$", page.read_text("utf-8"), re.MULTILINE))


def test_every_part_has_a_section_with_its_exercises() -> None:
    named: dict[int, set[str]] = {}
    for number, text in SECTION.findall(PAGE):
        [line] = re.findall(r"^\*\*Exercises\.\*\* (.*)$", text, re.MULTILINE)
        named[int(number)] = set(re.findall(r"\w+(?=[*,. (]|$)", re.sub(r"\([^)]*\)", "", line)))
    for number, exercises in ROW.findall(PAGE):
        named[int(number)] = set(re.findall(r"\*\*(\w+)\*\*", exercises))
    assert set(named) == set(range(1, 16)), f"parts without a section: {set(range(1, 16)) - set(named)}"
    for number, exercises in named.items():
        assert exercises and exercises <= exercises_of(number), (
            f"part {number}: TEACHING.md names {exercises - exercises_of(number)}, exercises.md doesn't"
        )


def test_the_traces_exist() -> None:
    for name in re.findall(r"`(\w+\.jsonl)`", PAGE):
        assert (ROOT / "results" / "traces" / name).is_file(), f"results/traces has no {name}"


def test_the_traces_show_what_the_page_says() -> None:
    """It names steps, which differ when the traces are recorded again."""

    def steps_of(name: str) -> list[StepTrace]:
        return read_trace(ROOT / "results" / "traces" / f"{name}.jsonl").steps

    static, continuous = steps_of("part03_static_batches"), steps_of("part04_continuous_batching")
    assert f"{len(static)} steps against {len(continuous)}, for the same answers" in PAGE
    assert static[65].preempted == continuous[49].preempted == ["10"], "steps 66 and 50"
    assert "10" in {each.id for each in static[80].requests} and "10" not in {each.id for each in static[79].requests}
    assert "6" in {each.id for each in continuous[8].requests} and continuous[7].finished == ["3"], "step 9"
    assert "6" in {each.id for each in static[40].requests} and "6" not in {each.id for each in static[39].requests}
    chunks = [each.num_scheduled for step in steps_of("part06_chunked_prefill")[:4] for each in step.requests]
    assert chunks[9:] == [17, 1, 1, 1, 1, 1, 43, 1, 1, 1, 1, 1, 42], "request 5 needs three steps"
    cached = [each.num_cached for each in steps_of("part07_prefix_caching")[40].requests if each.num_cached]
    assert cached == [96, 80, 80], "step 41"
    drafted = steps_of("part08_speculative_decoding")[1].requests
    assert sorted(len(each.token_ids) for each in drafted) == [1, 1, 1, 1, 5, 5], "step 2"
    assert (
        f"{len(steps_of('part08_speculative_decoding'))} steps against {len(steps_of('part07_prefix_caching'))}" in PAGE
    )
    hits = [sum(bool(each.num_cached) for step in steps_of(f"part10_{name}") for each in step.requests)
            for name in ("round_robin", "cache_aware")]  # fmt: skip
    assert hits == [2, 4], "twice, and four times"
    offloading = steps_of("part12_cpu_offloading")
    assert offloading[43].preempted and {each.kind for each in offloading[43].transfers} == {"save"}, "step 44"
    assert [each.num_tokens for each in offloading[57].transfers if each.kind == "load"] == [48], "step 58"
    assert [each.num_scheduled for each in offloading[58].requests if each.num_cached] == [3], "step 59"
    assert [each.kind for each in steps_of("part13_decode")[11].transfers] == ["fetch"] * 3, "step 12"


def test_the_commands_name_exercises_that_exist() -> None:
    commands = re.findall(r"workshop (?:hint|catch-up) (\d+) (\w+)`", PAGE)
    assert len(commands) >= 2
    for number, exercise in commands:
        assert exercise in exercises_of(int(number)), f"part {number} has no exercise {exercise}"
