"""Exercises in CUDA C++ on a made-up part: blanked, lent, checked, compared and filled in like those in Python."""

from __future__ import annotations

import difflib
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.workshop.conftest import write
from workshop import workspace
from workshop.__main__ import main
from workshop.bodies import blank_bodies, find_bodies
from workshop.check import Checker
from workshop.course import Part, WorkshopError, find_part
from workshop.doctor import find_compiler
from workshop.explain import Locator, explain
from workshop.report import Report
from workshop.results import Failure, Result
from workshop.runner import Runner
from workshop.saves import Saves
from workshop.wrong import digest, read_wrong_solutions, signature

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "worker/kernels/cuda"
BUILD = "part15_full_architecture/worker/kernels/build.py"  # the real one
COMMON = """\
#pragma once
static const char* message = "";
#define EXERCISE(text) throw text
extern "C" inline __attribute__((used)) const char* kernel_error() { return message; }
"""
TWICE = """\
// Two times x.
inline int twice(int x) {
    // exercise: twice
    return 2 * x;
    // exercise: end
}
"""
SUMS = """\
#include "common.cuh"
#include "twice.cuh"

// The sum of a and b.
static int add(int a, int b) {
    // exercise: add
    int result = a;
    result += b;
    return result;
    // exercise: end
}

// Two times the sum of all values.
static int total(const int* values, int size) {
    int result = 0;
    // exercise: total
    for (int i = 0; i < size; i++) result = add(result, values[i]);
    // exercise: end
    return twice(result);
}

extern "C" int launch_total(const int* values, int size, int* output) {
    try {
        *output = total(values, size);
    } catch (const char* text) {
        message = text;
        return 1;
    }
    return 0;
}
"""
LIBRARY = """\
import ctypes

from ..build import SOURCES, Target, build


class KernelError(RuntimeError): ...


def total(values):
    library, output = ctypes.CDLL(str(build(SOURCES / "sums.cu", Target("cpu")))), ctypes.c_int()
    if library.launch_total((ctypes.c_int * len(values))(*values), len(values), ctypes.byref(output)):
        library.kernel_error.restype = ctypes.c_char_p
        raise KernelError(f"launch_total: block (0,0,0) thread (3,0,0): {library.kernel_error().decode()}")
    return output.value
"""
ENGINE = '''\
from .worker.kernels.cuda.library import total


def mean(values):
    """The mean."""
    # exercise: mean
    return total(values) / 2 / len(values)
    # exercise: end
'''
EXERCISE = """
## {name}
Write {name} in "C++".
File: {file}::{name}
Test: tests/part01/test_{name}.py
Lesson: Sums
Difficulty: easy
Time: 5 minutes
Hint 1: A.
Hint 2: B.
Hint 3: C.
"""
FILES = {"add": f"{KERNELS}/sums.cu", "total": f"{KERNELS}/sums.cu", "twice": f"{KERNELS}/twice.cuh"}
FILES["mean"] = "engine.py"
SUM_TEST = """\
from part01_kernels.{module} import {function}


def test_{name}():
    got = {function}([1, 2, 3])
    assert got == {expected}, f"1, 2, 3: expected {expected}, got {{got}}. See {file}::{name}; README, \\"Sums\\""
"""


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """A part whose kernels are built by part 15's build.py, as C++, into a cache of their own."""
    folder = "part01_kernels"
    for name, text in {"sums.cu": SUMS, "twice.cuh": TWICE, "common.cuh": COMMON, "library.py": LIBRARY}.items():
        write(tmp_path, f"{folder}/{KERNELS}/{name}", text)
    for path in (folder, f"{folder}/worker", f"{folder}/worker/kernels", f"{folder}/{KERNELS}"):
        write(tmp_path, f"{path}/__init__.py", "")
    shutil.copyfile(ROOT / BUILD, tmp_path / folder / "worker" / "kernels" / "build.py")
    write(tmp_path, f"{folder}/engine.py", ENGINE)
    exercises = [EXERCISE.format(name=name, file=file) for name, file in FILES.items()]
    write(tmp_path, f"{folder}/exercises.md", "".join(exercises))
    for name, file in FILES.items():
        module, function, expected = (
            ("engine", "mean", 2.0) if name == "mean" else (f"{KERNELS}/library".replace("/", "."), "total", 12)
        )
        text = SUM_TEST.format(module=module, function=function, name=name, expected=expected, file=file)
        write(tmp_path, f"tests/part01/test_{name}.py", text)
    for stem, name, old, new in (
        ("add-minus", "it subtracts", "result += b", "result -= b"),
        ("add-first", "it ignores b", "result += b", "result += 0"),
    ):
        texts = [text.splitlines(keepends=True) for text in (SUMS, SUMS.replace(old, new))]
        diff = "".join(difflib.unified_diff(*texts, *(f"{side}/{folder}/{KERNELS}/sums.cu" for side in "ab")))
        header = f"Name: {name}\nCaught by: tests/part01/test_add.py\nExplanation: The body is wrong.\n\n"
        write(tmp_path, f"tests/part01/wrong/{stem}.patch", header + diff)
    monkeypatch.setenv("LLM_COURSE_KERNEL_CACHE", str(tmp_path / "built"))
    part = find_part(tmp_path, 1)
    workspace.start(part)
    return part


@pytest.fixture
def runner(part: Part) -> Iterator[Runner]:
    if find_compiler("g++", "clang++") is None:
        pytest.skip("there is no C++ compiler: install g++ or clang++")
    with Runner(part, limit_s=60) as runner:
        yield runner


def solve(part: Part, name: str, body: str) -> None:
    """Write a body into the learner's copy. No body: no lines at all."""
    path = part.copy / FILES[name]
    start, end = ("# exercise: ", "# exercise: end") if path.suffix == ".py" else ("// exercise: ", "// exercise: end")
    before, marker, rest = path.read_text().partition(f"    {start}{name}\n")
    _, end, after = rest.partition(f"    {end}\n")
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    path.write_text(before + marker + indented + end + after)


def line_of(part: Part, name: str, text: str) -> int:
    """Where a text is in the learner's file of an exercise, from 1."""
    lines = (part.copy / FILES[name]).read_text().split("\n")
    return 1 + next(index for index, line in enumerate(lines) if text in line)


def run(runner: Runner, name: str) -> Result:
    (exercise,) = runner.part.select([name])
    result = runner.run_exercise(exercise)
    assert result is not None, "nothing cancelled this run"
    return result


def check(part: Part, runner: Runner, *names: str) -> str:
    """The output of `check`."""
    console = Console(record=True, force_terminal=False, file=io.StringIO())
    Checker(part, list(names), runner, Report(console)).check()
    return console.export_text()


def built(part: Part) -> set[str]:
    return {path.name for path in (part.root / "built").glob("*.so")}


# --- without a compiler


def test_each_language_has_its_own_markers() -> None:
    for marker, file in (("//", "f.cu"), ("//", "f.cuh"), ("#", "f.py")):
        found = find_bodies(f"{marker} exercise: x\n{marker} exercise: end\n", file)
        assert list(found) == ["x"], f"{marker} begins a marker in {file}: got {found}. See bodies.py::LANGUAGES"
    for marker, file in (("#", "f.cu"), ("#", "f.cuh"), ("//", "f.py")):
        found = find_bodies(f"{marker} exercise: x\n{marker} exercise: end\n", file)
        assert found == {}, f"{marker} begins no marker in {file}: got {found}. See bodies.py::LANGUAGES"
    with pytest.raises(WorkshopError, match="f.cu:1: `// exercise: x` has no `// exercise: end`"):
        find_bodies("// exercise: x\n", "f.cu")
    with pytest.raises(WorkshopError, match="f.h: an exercise must be in a file that ends with .py or .cu or .cuh"):
        find_bodies("", "f.h")


def test_a_blank_body_is_one_line(part: Part) -> None:
    bodies = find_bodies((part.copy / FILES["add"]).read_text(), "sums.cu")
    expected = ('    EXERCISE("part01 add: Write add in \\"C++\\".");',)
    assert bodies["add"].lines == expected, f"expected {expected}, got {bodies['add'].lines}"
    assert not any(workspace.is_started(part, exercise) for exercise in part.exercises), "all of them are blank"
    solve(part, "add", "return a + b;")
    solve(part, "twice", 'raise NotImplementedError("part01 twice: ")')
    started = [exercise.name for exercise in part.exercises if workspace.is_started(part, exercise)]
    assert started == ["add", "twice"], f"a blank of Python is no blank of C++: got {started}"


def test_an_undescribed_exercise_is_refused() -> None:
    with pytest.raises(WorkshopError, match="exercise x is not described in exercises.md"):
        blank_bodies("// exercise: x\n// exercise: end\n", [], "f.cu")


def test_a_change_concerns_the_exercise_whose_body_it_is_in(part: Part) -> None:
    before = workspace.fingerprints(part)
    for name, body in (("twice", "return x + x;"), ("add", "return a + b;")):
        solve(part, name, body)
        after = workspace.fingerprints(part)
        changed = [each for each in after if after[each] != before[each]]
        assert changed == [name], f"a change in the body of {name} concerns it alone, got {changed}"
        before = after
    write(part.copy, f"{KERNELS}/common.cuh", "// changed\n" + COMMON)
    after = workspace.fingerprints(part)
    changed = [each for each in after if after[each] != before[each]]
    assert changed == list(FILES), f"a change outside of the bodies concerns all, got {changed}"


def test_diff_and_catch_up(part: Part) -> None:
    assert workspace.diff(part, []) == [], "with nothing written there is nothing to compare"
    solve(part, "add", "return a + b;")
    lines = workspace.diff(part, [])
    assert lines[:2] == [f"--- yours/{FILES['add']}", f"+++ reference/{FILES['add']}"], f"got {lines}"
    assert "-    return a + b;" in lines and "+    result += b;" in lines, f"got {lines}"
    assert not any("2 * x" in line or "size; i++" in line for line in lines), f"blank ones stay hidden: {lines}"
    workspace.catch_up(part, part.select(["twice"]))
    text = (part.copy / FILES["twice"]).read_text()
    assert text == TWICE, f"expected the reference's body of twice, got {text}"
    assert "return a + b;" in (part.copy / FILES["add"]).read_text(), "the learner's add must stay"
    solve(part, "twice", "return x + x;")
    (part.copy / FILES["twice"]).write_text(TWICE.replace("// exercise: twice\n", "").replace("// exercise: end\n", ""))
    with pytest.raises(WorkshopError, match="no longer has the line `// exercise: twice`"):
        workspace.catch_up(part, part.select(["twice"]))


def test_known_mistakes_are_run_again_if_a_source_changes(part: Part) -> None:
    (wrong, _) = read_wrong_solutions(part, part.exercises[0])
    before = digest(part, wrong)
    for file in ("sums.cu", "twice.cuh"):
        write(part.path, f"{KERNELS}/{file}", "// changed\n")
        after = digest(part, wrong)
        assert after != before, f"their failures depend on {file}. See wrong.py::digest"
        before = after


def test_which_thread_notices_a_mistake_first_does_not_matter() -> None:
    messages = [f"f: block ({n},0,0) thread (0,{n},0): __syncthreads at sums.cu:7" for n in range(2)]
    one, other = (signature(Result(1, 0, (Failure("test_f", message),))) for message in messages)
    assert one == other, f"these are the same failure: {one}, {other}. See wrong.py::VARYING"
    assert "sums.cu:7" in one["test_f"], f"but the line matters: {one}"


def test_saves_are_noticed(part: Part) -> None:
    deadline = time.monotonic() + 30
    with Saves(part) as saves:
        while not saves.any():  # the watching may begin a moment later
            assert time.monotonic() < deadline, "a save of a .cuh file was not noticed. See saves.py::Saves"
            solve(part, "twice", "return x + x;")
            time.sleep(0.1)


GCC_ERROR = """sums.cu:7:12: error: ‘c’ was not declared in this scope
    7 |     return c;
      |            ^"""
GCC = f"""sums.cu for cpu: g++ failed:
In file included from sums.cu:2:
common.cuh:1:1: warning: something minor
sums.cu: In function ‘int add(int, int)’:
{GCC_ERROR}
twice.cuh:2:1: error: another one
"""
NVCC_ERROR = """sums.cu(7): error: identifier "c" is undefined
      return c;
             ^"""
NVCC = f"""sums.cu for sm_90: nvcc failed:
{NVCC_ERROR}

1 error detected in the compilation of "sums.cu".
"""
INSTANCE = """sums.cu for cpu: g++ failed:
common.cuh: In instantiation of ‘int f() [with T = int]’:
sums.cu:7:12:   required from here
common.cuh:2:30: error: no match
"""
LENT = """sums.cu for cpu: g++ failed:
In file included from sums.cu:6:
lent/add.cuh:1:5: error: ‘a’ is not declared
"""
BARRIER = "f: block (0,0,0) thread (3,0,0): __syncthreads at sums.cu:7: others wait"


class CompileError(RuntimeError): ...


class KernelError(RuntimeError): ...


@pytest.mark.parametrize(
    ("error", "message", "raised_at", "called_from"),
    [
        (CompileError(GCC), f"CompileError: {GCC_ERROR}", "sums.cu:7", "sums.cu:7"),
        (CompileError(NVCC), f"CompileError: {NVCC_ERROR}", "sums.cu:7", "sums.cu:7"),
        (CompileError(INSTANCE), "CompileError: common.cuh:2:30: error: no match", "common.cuh:2", "sums.cu:7"),
        (CompileError(LENT), "CompileError: lent/add.cuh:1:5: error: ‘a’ is not declared", "sums.cu:6", "sums.cu:6"),
        (CompileError("sums.cu for cpu: ld failed"), "CompileError: sums.cu for cpu: ld failed", None, None),
        (KernelError(BARRIER), f"KernelError: {BARRIER}", "sums.cu:7", "sums.cu:7"),
        (KernelError("f: thread (3,0,0): part01 add: Write it."), "part01 add: Write it.", None, None),
    ],
    ids=["g++", "nvcc", "template", "lent", "linker", "kernel", "blank"],
)
def test_an_error_names_the_learners_line(
    part: Part, error: Exception, message: str, raised_at: str | None, called_from: str | None
) -> None:
    solve(part, "add", "return a + b;")
    assert explain(error) == message, f"expected {message!r}, got {explain(error)!r}. See explain.py::explain"
    expected = tuple(place and f"{KERNELS}/{place}" for place in (raised_at, called_from))
    got = Locator(part.copy, ["total", "twice"]).locate(error)
    assert got == expected, f"expected {expected}, got {got}. See explain.py::Locator.locate_in_kernels"


def test_a_line_of_another_copy_is_not_the_learners(part: Part) -> None:
    error = CompileError(f"failed:\n{part.path / KERNELS}/sums.cu:7:1: error: no")
    assert Locator(part.copy, []).locate(error) == (None, None), "expected no line for an error in the reference"


def test_start_shows_how_the_markers_look(part: Part, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "1", "--force"], part.root) == 0
    out = capsys.readouterr().out
    expected = f"open workspace/part01_kernels/{KERNELS}/sums.cu, look for `// exercise:`"
    assert expected in out, f"expected {expected!r}, got {out}"


# --- with a compiler


def test_a_blank_body_says_which_exercise_it_is(part: Part, runner: Runner) -> None:
    for name in FILES:
        result = run(runner, name)
        messages = [failure.message for failure in result.failures]
        expected = f'part01 {name}: Write {name} in "C++".'
        assert messages == [expected], f"expected {expected!r} alone, got {messages}. See explain.py::explain"


def test_each_exercise_is_checked_with_the_reference_around_it(part: Part, runner: Runner) -> None:
    for name, body in {
        "add": "return a + b;",
        "total": "while (size--) result = add(result, values[size]);",
        "twice": "return x + x;",
        "mean": "return total(values) / len(values) / 2",
    }.items():
        solve(part, name, body)
        result = run(runner, name)
        assert result.passes, f"{name} is right, and the other bodies are lent: got {result.failures}"
        solve(part, name, "this is no code")  # from now on it must be lent to the others


def test_everything_of_the_learner_is_used_at_the_end(part: Part, runner: Runner) -> None:
    for exercise in part.exercises:
        body = workspace.reference_bodies(part)[exercise.name].lines
        solve(part, exercise.name, "\n".join(line[4:] for line in body))
    report = check(part, runner)
    assert "all of part 1  passes: 4 of 4 tests pass" in report, f"got {report}"
    solve(part, "twice", "return 3 * x;")
    result = runner.run_rest(list(FILES), lambda: False)
    assert result is not None and not result.passes, "its own twice must be used when all are the learner's"


@pytest.mark.parametrize("add", ["", "return a + b;", "// " + "one\n// " * 8 + "nine\nreturn a + b;"])
def test_a_compilers_message_has_the_learners_line(part: Part, runner: Runner, add: str) -> None:
    """add is lent, and shorter or longer than the learner's own."""
    solve(part, "add", add)
    solve(part, "total", "result = add(unknown_name, 1);")
    (failure,) = run(runner, "total").failures
    line = line_of(part, "total", "unknown_name")
    assert failure.raised_at == f"{KERNELS}/sums.cu:{line}", f"expected line {line}, got {failure}"
    assert failure.called_from == failure.raised_at, f"the learner wrote this line: got {failure}"
    for text in ("CompileError: sums.cu", "error: ", "unknown_name", "result = add(unknown_name, 1);"):
        assert text in failure.message, f"expected the compiler's words, with {text!r}, got {failure.message}"
    assert str(Path(runner.folder.name)) not in failure.traceback, f"no path of a temporary folder: {failure.traceback}"
    report = check(part, runner, "total")
    where = f"at {KERNELS}/sums.cu:{line}\n    test"
    assert where in report and "had returned by then" not in report, f"got {report}"
    assert f"Look at  workspace/part01_kernels/{KERNELS}/sums.cu:{line - 1}, total" in report, f"got {report}"


def test_the_reference_never_replaces_a_missing_file(part: Part, runner: Runner) -> None:
    solve(part, "add", "return a + b;")
    assert run(runner, "add").passes, "all files are there"
    (part.copy / FILES["twice"]).unlink()
    (failure,) = run(runner, "add").failures
    assert "twice.cuh: No such file" in failure.message or "'twice.cuh' file not found" in failure.message, (
        f"neither the reference's file nor that of an earlier check may be compiled: got {failure}"
    )


def test_a_lent_body_that_does_not_compile_is_located_at_its_marker(part: Part, runner: Runner) -> None:
    path = part.copy / FILES["add"]
    path.write_text(path.read_text().replace("add(int a, int b)", "add(int c, int d)"))
    solve(part, "total", "result = add(1, 2);")
    (failure,) = run(runner, "total").failures
    line = line_of(part, "add", "// exercise: add")
    assert failure.raised_at == f"{KERNELS}/sums.cu:{line}", f"expected the marker's line {line}, got {failure}"
    assert "lent/add.cuh:1" in failure.message, f"and the message says that it is lent: got {failure.message}"


def test_a_kernel_that_crashes(part: Part, runner: Runner) -> None:
    solve(part, "twice", "return *(volatile int*)nullptr;")
    (failure,) = run(runner, "twice").failures
    expected = "pytest ended early, by the signal SIGSEGV: is an index outside of its array?"
    assert failure.message == expected, f"expected {expected!r}, got {failure}"
    assert "test_twice" in failure.test, f"the test that ran: got {failure.test}"
    solve(part, "twice", "return 2 * x;")
    assert run(runner, "twice").passes, "the next run must not be affected"


def test_an_endless_loop_is_stopped(part: Part, runner: Runner) -> None:
    solve(part, "twice", "for (volatile int i = 0;; i = i + 1) {}")
    runner.limit_s = 3
    (failure,) = run(runner, "twice").failures
    expected = ("still running after 3 s", "still waiting")  # the second on a machine that is very busy
    assert failure.message.startswith(expected), f"got {failure}"
    assert failure.raised_at is not None and "library.py" in failure.raised_at, f"where it was called: {failure}"


def test_only_what_has_changed_is_compiled(part: Part, runner: Runner) -> None:
    solve(part, "add", "return a + b;")
    solve(part, "twice", "return 2 * x;")
    run(runner, "add")
    before = built(part)
    assert len(before) == 1, f"one source, one library: got {before}"
    run(runner, "add")
    assert built(part) == before, "nothing has changed"
    solve(part, "mean", "return 2")
    run(runner, "mean")
    num = len(built(part))
    solve(part, "twice", "return x + x;")
    run(runner, "mean")
    assert len(built(part)) == num, "twice is lent to mean, so the learner's own body does not matter"
    run(runner, "twice")
    assert len(built(part)) == num + 1, "a header that the source includes has changed"
    write(part.copy, f"{KERNELS}/unused.cuh", "// no source includes this\n")
    run(runner, "twice")
    assert len(built(part)) == num + 1, "a header that no source includes does not matter. See build.py::with_headers"
    with Runner(part, limit_s=60) as other:
        run(other, "twice")
    assert len(built(part)) == num + 1, "the next `check` finds it, too: the temporary folder must not matter"


def test_check_names_the_known_mistake(part: Part, runner: Runner) -> None:
    solve(part, "add", "const int c = a - b;\nreturn c;")
    report = check(part, runner)
    assert "This looks like a known mistake: it subtracts." in report, f"got {report}"
    assert "it ignores b" not in report, f"that one gives another result: {report}"
    assert "expected  12\n    got       -12" in report, f"got {report}"
    assert "See " not in report, f"where to look is said once: {report}"


def test_every_test_is_skipped(part: Part, runner: Runner) -> None:
    """As on a machine without a compiler."""
    skip = 'import pytest\n\npytest.skip("no C++ compiler: install g++", allow_module_level=True)\n'
    marked = "import pytest\n\n\n@pytest.mark.skip('no g++')\ndef test(): ...\n"
    for name, text in (("add", skip), ("total", marked)):
        write(part.root, f"tests/part01/test_{name}.py", text)
        solve(part, name, "return 0;")
        (failure,) = run(runner, name).failures
        assert failure.message.startswith("every test was skipped: no "), f"the reason must be told: got {failure}"
