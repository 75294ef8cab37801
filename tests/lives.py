"""How the parts' state machines are run: the same lives every time, and a failure that can be read."""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_lives(machine: type[RuleBasedStateMachine], max_examples: int, stateful_step_count: int) -> None:
    """Raises what the first life that goes wrong raises. To shrink it takes minutes, and its script fills screens: the
    error says what was wrong, and a debugger can stop there."""
    try:
        run_state_machine_as_test(
            machine,  # type: ignore[arg-type]
            settings=settings(
                deadline=None,
                derandomize=True,
                database=None,
                max_examples=max_examples,
                stateful_step_count=stateful_step_count,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                print_blob=False,
            ),
        )
    except Exception as error:
        error.__notes__ = []  # the script
        raise
