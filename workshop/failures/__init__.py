"""The failure lab: break a running engine, and check how it recovers."""

from __future__ import annotations

import sys

import httpx
from rich.console import Console

from workshop import COMMAND
from workshop.course import WorkshopError
from workshop.failures import corrupt_transfer, cut_client, fill_pool, kill_decode_worker, poison_block, slow_rank
from workshop.failures.checks import CheckFailed
from workshop.failures.lab import Lab
from workshop.failures.scenario import Scenario
from workshop.report import Report

SCENARIOS: dict[str, Scenario] = {
    module.SCENARIO.name: module.SCENARIO
    for module in (fill_pool, cut_client, slow_rank, poison_block, kill_decode_worker, corrupt_transfer)
}


def main(name: str | None, *, is_auto: bool, prediction: str | None, report: Report) -> int:
    """Run a scenario; without a name, list all. is_auto: break it as well, and ask for no prediction.

    Returns the exit status: 0 if the engine recovered, 1 if a check failed, 2 for wrong usage.
    """
    if name is None:
        show_list(report)
        return 0
    try:
        scenario = find(name)
        run(scenario, is_auto, check_letter(scenario, prediction), report)
    except WorkshopError as error:
        Report(Console(stderr=True, highlight=False)).error(error)
        return 2
    except CheckFailed as error:
        show_failure(scenario, error, report)
        return 1
    return 0


def find(name: str) -> Scenario:
    """Raises WorkshopError for an unknown name, and for a scenario that can't run here."""
    if (scenario := SCENARIOS.get(name)) is None:
        raise WorkshopError(f"there is no failure {name!r}: expected {', '.join(SCENARIOS)}")
    if scenario.needs_linux and sys.platform != "linux":
        raise WorkshopError(f"{name} looks at processes in /proc, so it needs Linux; this is {sys.platform}")
    return scenario


def check_letter(scenario: Scenario, prediction: str | None) -> str | None:
    """The letter in lower case. Raises WorkshopError if it is no choice."""
    if prediction is None or prediction.lower() in scenario.choices:
        return prediction if prediction is None else prediction.lower()
    raise WorkshopError(f"--predict: expected one of {', '.join(scenario.choices)}, got {prediction!r}")


def run(scenario: Scenario, is_auto: bool, prediction: str | None, report: Report) -> None:
    """Raises CheckFailed, and WorkshopError if nobody answers the question."""
    report.say(f"{scenario.name}: {scenario.about} (part {scenario.part})", "bold")
    with Lab(scenario, report, is_auto, prediction) as lab:
        try:
            scenario.run(lab)
        except httpx.HTTPError as error:
            raise CheckFailed("a request", "an answer", f"{type(error).__name__}: {error}{last_words(lab)}") from error
    explain(scenario, lab.prediction, report)


def last_words(lab: Lab) -> str:
    """Of the servers that have ended."""
    return "".join(f"\n{server.name} has ended: {server.said()[-500:]}" for server in lab.servers if server.has_ended)


def show_list(report: Report) -> None:
    width = max(map(len, SCENARIOS))
    for scenario in SCENARIOS.values():
        report.say(f"{scenario.name:<{width}}  part {scenario.part:>2}  {scenario.minutes:>2} min  {scenario.about}")
    report.say(f"\nTo begin: {COMMAND} failure {next(iter(SCENARIOS))}; with --auto, it breaks the engine for you.")


def show_failure(scenario: Scenario, error: CheckFailed, report: Report) -> None:
    report.say()
    report.say(f"The check failed: {error.what}", "bold red")
    report.say(f"expected  {error.expected}", indent=2)
    report.say(f"found     {error.found}", indent=2)
    for place, what in scenario.look.items():
        report.say(f"look at   {place}: {what}", indent=2)


def explain(scenario: Scenario, prediction: str | None, report: Report) -> None:
    """Whether the prediction was right, why each choice is right or wrong, and where the recovery is."""
    report.say()
    if prediction is not None:
        verdict = "right" if prediction == scenario.answer else f"not right; it is {scenario.answer}"
        style = "green" if prediction == scenario.answer else "yellow"
        report.say(f"Your prediction, {prediction}, was {verdict}.", f"bold {style}")
    else:
        report.say(f"The answer: {scenario.answer}.", "bold")
    for letter, choice in scenario.choices.items():
        is_right = letter == scenario.answer
        report.say(f"{letter}  {choice.text}", "green" if is_right else None, indent=2)
        report.say(f"{'Right' if is_right else 'Wrong'}: {choice.why}", "dim", indent=5)
    report.say("\nWhere it happens", "bold")
    for place, what in scenario.look.items():
        report.say(f"{place}: {what}", indent=2)
    report.say(f"vLLM: {scenario.vllm}", indent=2)
