"""Part 3 as a user starts it: how it loads, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from part03_paged_attention import config
from tests.process_checks import TIMEOUT_S, check_loading_starts_no_helpers, course_environment, serve

PART_DIR = Path(config.__file__).parent
COMPLETIONS = "/v1/completions"
READY = r"serving tiny on http://127\.0\.0\.1:(?P<port>\d+) \(cpu, context of 300 tokens, 40 KV blocks of 8 tokens\)\n"
LOOK = "Look at __main__.py::serve, api/async_engine.py::AsyncLLM._step and common/serve.py::serve_app."
FLAGS = ["--port", "0", "--device", "cpu", "--max-model-len", "300", "--block-size", "8", "--num-kv-blocks", "41"]
FAILING_STEPS = f"""
import sys
from {PART_DIR.name}.core.executor import Executor

num_steps, execute = 0, Executor.execute

def fail(self, step):
    global num_steps
    num_steps += 1
    if num_steps in (2, 4):
        return execute(self, step)
    raise ZeroDivisionError("the cat sat on step " + str(num_steps))

Executor.execute = fail
from {PART_DIR.name}.__main__ import main
sys.argv = ["{PART_DIR.name}", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_loading_leaves_the_processor_to_the_engines_thread() -> None:
    check_loading_starts_no_helpers(PART_DIR, "Look at __main__.py::serve and common/serve.py::single_threaded.")


def test_two_failed_steps_in_a_row_end_the_process_with_status_1(tmp_path: Path) -> None:
    """Failed steps with a good one between them don't."""
    errors = tmp_path / "stderr"
    command = ["-c", FAILING_STEPS, *FLAGS]
    with serve(command, READY, errors, PART_DIR.parent, course_environment(PART_DIR), LOOK) as server:
        body = {"prompt": [5] * 7, "max_tokens": 1}
        got = [server.post(COMPLETIONS, body).status_code for _ in range(5)]
        assert got == [500, 200, 500, 200, 500], f"steps 1, 3 and 5 fail: got the statuses {got}. {LOOK}"
        assert server.get("/health").status_code == 200, f"no two failed steps in a row yet. {LOOK}"
        answer = server.post(COMPLETIONS, body).text
        assert "the cat sat on step 6" in answer, f"expected the cause, got {answer}. {LOOK}"
        status = server.process.wait(TIMEOUT_S)
    assert status == 1, f"two failed steps in a row: expected exit status 1, got {status}. {LOOK}"
    last = errors.read_text().splitlines()[-1:]
    expected = "error: two steps in a row failed, the second with ZeroDivisionError: the cat sat on step 6"
    assert last == [expected], f"the last line on stderr: expected {expected!r}, got {errors.read_text()!r}. {LOOK}"
