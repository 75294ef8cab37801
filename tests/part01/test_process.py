"""Part 1 as a user starts it: processes, sockets, exit statuses. A start takes seconds, so each serves many checks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

import common
import part01_simple_server
from common.checkpoint import MODELS_DIR
from part01_simple_server.config import EngineConfig

PART = "part01_simple_server"
PART_DIR = Path(part01_simple_server.__file__).parent
COMMON_DIR = Path(common.__file__).parent
LOOK = 'Look at __main__.py; README "Bad input".'
TIMEOUT_S = 300  # until a process that does not do as it should is killed; busy machines are slow
READY = re.compile(r"serving (\S+) on http://(\S+):(\d+) \(\w+, \d+ tokens of context\)\n")


def environment(*python_path: Path) -> dict[str, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    return env | ({"PYTHONPATH": os.pathsep.join(map(str, python_path))} if python_path else {})


HERE = environment(PART_DIR.parent, COMMON_DIR.parent)


@dataclass
class Server:
    process: subprocess.Popen
    first_lines: list[str]  # up to and with the one that says it is ready
    stderr: Path
    model: str
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, body: bytes | dict) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/generate", content=content, timeout=TIMEOUT_S, trust_env=False)


@contextlib.contextmanager
def serve(command: list[str], cwd: Path, env: dict[str, str], stderr: Path) -> Iterator[Server]:
    """Starts a server, waits until it says that it is ready, and leaves no process behind."""
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not (ready := READY.fullmatch(lines[-1] if lines else "")):
            line = process.stdout.readline()
            assert line, f"{command} ended before it served. It wrote {lines} and {stderr.read_text()!r}. {LOOK}"
            lines.append(line)
        model, host, port = ready.groups()
        yield Server(process, lines, stderr, model, host, int(port))
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m part01_simple_server --port 0`, run by a copy of the part, common/ and models/ elsewhere."""
    root = tmp_path_factory.mktemp("copy")
    for source in (PART_DIR, COMMON_DIR):
        shutil.copytree(source, root / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "models" / "tiny").mkdir(parents=True)
    for path in (MODELS_DIR / "tiny").iterdir():
        (root / "models" / "tiny" / path.name).symlink_to(path)
    code = (
        "import json, runpy, sys, common.checkpoint, part01_simple_server as part\n"
        "print(json.dumps([part.__file__, common.__file__, str(common.checkpoint.MODELS_DIR)]), flush=True)\n"
        f"sys.argv = [{PART!r}, '--port', '0']\n"
        f"runpy.run_module({PART!r}, run_name='__main__', alter_sys=True)\n"
    )
    with serve(["-c", code], root, environment(), root / "stderr") as server:
        yield server


def test_a_copy_of_the_part_uses_nothing_outside_of_it(server: Server) -> None:
    root = server.stderr.parent.resolve()
    for found in json.loads(server.first_lines[0]):
        assert Path(found).resolve().is_relative_to(root), f"the copy in {root} uses {found}"


def test_defaults(server: Server) -> None:
    assert (server.model, server.host) == ("tiny", "127.0.0.1"), f"got {server.first_lines[-1]!r}. {LOOK}"
    if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", server.port), timeout=TIMEOUT_S).close()
    health = httpx.get(f"{server.url}/health", timeout=TIMEOUT_S, trust_env=False)
    assert health.json() == {"status": "ok", "model": "tiny"}, health.text


def test_serves_over_a_socket_whatever_clients_do(server: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = server.post(body)
    assert answer.status_code == 200 and len(answer.json()["token_ids"]) == 4, answer.text
    for bad, status in ((b"\xff", 400), (b'{"prompt": "Hi"}' + b" " * 1_000_000, 413)):
        refused = server.post(bad)
        assert refused.status_code == status, f"expected {status}, got {refused.status_code}: {refused.text}. {LOOK}"
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.sendall(b"POST /generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")  # and goes away
    with socket.create_connection(("127.0.0.1", server.port)):  # says nothing, and must not be waited for too long
        check_port_in_use(server.port)
        again = server.post(body)
    assert again.json() == answer.json(), f"the same request later: {again.text} against {answer.text}"


def check_port_in_use(port: int) -> None:
    """A second server on the port ends in one line. (What else can be wrong is tested below, at less cost.)"""
    command = [sys.executable, "-m", PART, "--port", str(port)]
    done = subprocess.run(command, cwd=PART_DIR.parent, env=HERE, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (2, ""), f"port in use: expected status 2 and silence, got {done}. {LOOK}"
    expected = rf"{PART}: error: cannot listen on 127.0.0.1 port {port}: .*in use.*\n"
    assert re.fullmatch(expected, done.stderr), f"port in use: expected one line on stderr, got {done.stderr!r}. {LOOK}"


def test_sigterm_ends_it(server: Server) -> None:
    """The last test of this server."""
    server.process.send_signal(signal.SIGTERM)
    try:
        status = server.process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"SIGTERM did not end the server in {TIMEOUT_S} s. {LOOK}")
    errors = server.stderr.read_text()
    assert status == 0, f"SIGTERM: expected exit status 0, got {status}; stderr: {errors!r}. {LOOK}"
    assert "Traceback" not in errors, f"the server wrote a traceback: {errors}. {LOOK}"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S).close()


# One interpreter runs all of these command lines in turn, as `python -m` would, each with a standard error of its own.
RUN_ALL = f"""
import contextlib, io, json, os, runpy, sys, tempfile, traceback
results = []
for argv in json.load(sys.stdin):
    sys.argv, output = [{PART!r}, *argv], io.StringIO()
    with tempfile.TemporaryFile("w+") as errors:
        stderr = os.dup(2)
        os.dup2(errors.fileno(), 2)
        try:
            with contextlib.redirect_stdout(output):
                runpy.run_module({PART!r}, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        errors.seek(0)
        results.append([status, output.getvalue(), errors.read()])
json.dump(results, sys.stdout)
"""


def run_all(command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of each."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(command_lines),
        cwd=PART_DIR.parent, env=HERE, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"the runs of {command_lines} ended with {done.returncode}: {done.stderr}"
    return [tuple(result) for result in json.loads(done.stdout)]


def copy_of_tiny(directory: Path, **replaced: bytes | None) -> Path:
    """A model directory in which some files, named without their ending, have another content or are missing."""
    directory.mkdir()
    for path in (MODELS_DIR / "tiny").iterdir():
        content = replaced.get(path.stem, b"")
        if content:
            (directory / path.name).write_bytes(content)
        elif content is not None:
            (directory / path.name).symlink_to(path)
    return directory


def broken_models(tmp_path: Path) -> dict[str, tuple[Path, list[str]]]:
    """What is wrong with each: the directory, and words that the error must have."""
    weights = (MODELS_DIR / "tiny" / "model.safetensors").read_bytes()
    models = {
        "no weights": (copy_of_tiny(tmp_path / "weightless", model=None), ["no *.safetensors"]),
        "no config": (copy_of_tiny(tmp_path / "configless", config=None), ["no config.json"]),
        "bad config": (copy_of_tiny(tmp_path / "misconfigured", config=b"{"), ["config.json", "cannot be read"]),
        "bad generation config": (
            copy_of_tiny(tmp_path / "misgenerating", generation_config=b"[1]"),
            ["generation_config.json", "cannot be read"],
        ),
        "bad tokenizer": (copy_of_tiny(tmp_path / "speechless", tokenizer=b'{"version": "1.0"}'), ["bad tokenizer"]),
        "weights are no safetensors": (copy_of_tiny(tmp_path / "garbage", model=b"\x80" * 5000), ["corrupt"]),
        "weights cut short": (copy_of_tiny(tmp_path / "short", model=weights[:-1]), ["model.safetensors", "corrupt"]),
    }
    tensors = load_file(MODELS_DIR / "tiny" / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    models["a tensor is missing"] = (copy_of_tiny(tmp_path / "less", model=None), ["lacks", "model.norm.weight"])
    save_file(tensors, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    models["a tensor of another shape"] = (copy_of_tiny(tmp_path / "other", model=None), ["model.norm.weight"])
    tensors["model.norm.weight"] = norm[:7].clone()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    return models


def check_help(status: int, output: str, errors: str) -> None:
    assert (status, errors) == (0, ""), f"--help: expected status 0, got {status}, stderr {errors!r}. {LOOK}"
    for field in dataclasses.fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        assert f"  {flag} " in output, f"--help does not explain {flag}: {output}. {LOOK}"


def test_help_and_bad_command_lines_and_broken_models(tmp_path: Path) -> None:
    cases: dict[str, tuple[list[str], list[str]]] = {
        "unknown flag": (["--modle", "tiny"], ["--modle"]),
        "abbreviated flag": (["--por", "0"], ["--por"]),
        "stray word": (["tiny"], ["tiny"]),
        "port is a word": (["--port", "http"], ["--port", "'http'"]),
        "port too high": (["--port", "65536"], ["--port", "65535", "65536"]),
        "negative port": (["--port", "-1"], ["--port", "-1"]),
        "context of one token": (["--max-model-len", "1"], ["--max-model-len", "at least 2", "1"]),
        "unknown dtype": (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        "unknown device": (["--device", "abacus"], ["--device", "'abacus'"]),
        "unknown host": (["--host", "256.256.256.256", "--port", "0"], ["cannot listen", "256.256.256.256"]),
        "unknown model": (["--port", "0", "--model", "tinny"], ["model", "'tinny'", "tiny"]),
        "missing directory": (["--port", "0", "--model", str(tmp_path / "none")], ["model", "none", "directory"]),
        "unknown preset": (["--port", "0", "--model", "random:gpt-9"], ["model", "'gpt-9'", "random:", "qwen3-0.6b"]),
    }
    for name, (directory, words) in broken_models(tmp_path).items():
        cases[name] = (["--port", "0", "--model", str(directory)], ["model", *words])
    help_result, *results = run_all([["--help"], *(argv for argv, _ in cases.values())])
    check_help(*help_result)
    for (name, (argv, words)), (status, output, errors) in zip(cases.items(), results, strict=True):
        got = f"{name}, {' '.join(argv)}: got status {status}, stdout {output!r}, stderr {errors!r}. {LOOK}"
        assert status == 2, f"expected exit status 2. {got}"
        assert "Traceback" not in errors and errors.count("\n") == 1, f"expected one line on stderr. {got}"
        assert errors.startswith(f"{PART}: error: ") and output == "", f"expected '{PART}: error: …' only. {got}"
        for word in words:
            assert word in errors, f"expected {word!r} in the error. {got}"
