"""How the parts' state machines are run: the same lives every time, and a failure that can be read."""

from __future__ import annotations

import hypothesis
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_lives(
    machine: type[RuleBasedStateMachine], max_examples: int, stateful_step_count: int, seed: int | None = None
) -> None:
    """Raises what the first life that goes wrong raises. To shrink it takes minutes, and its script fills screens: the
    error says what was wrong, and a debugger can stop there.

    seed: of all draws. Without one they change with every letter of the machine's source, and with them how often
    something rare happens.
    """
    if seed is not None:
        hypothesis.seed(seed)(machine)
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
