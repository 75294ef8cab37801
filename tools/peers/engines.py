"""Which engines are measured, and how each is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
VARIABLE = "PEERS_ENVIRONMENTS"  # a directory with the environments that `make peers` sets up
BASELINE = "transformers, one by one"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine. environment: the name of one that `make peers` sets up, None for the course's. not_run: dtypes that it
    can't compute in on a CPU, and why. slow_alone: it answers one request after the other, so its rate doesn't depend
    on how many there are, and only the first NUM_SLOW of them are timed."""

    name: str
    module: str
    environment: str | None
    arguments: tuple[str, ...] = ()
    not_run: tuple[tuple[str, str], ...] = ()
    slow_alone: bool = False

    def reason_not_run(self, dtype: str) -> str | None:
        return dict(self.not_run).get(dtype)

    def command(self, model: Path, dtype: str, files: Path) -> list[str]:
        """Raises OSError if the engine's environment is missing."""
        worker = ["-m", f"tools.peers.workers.{self.module}", str(model), dtype, str(files), *self.arguments]
        if self.environment is None:
            return [sys.executable, *worker]
        folder = Path(os.environ.get(VARIABLE, ROOT / ".venv-peers")) / self.environment
        python = folder / "bin" / "python"
        if not python.exists():
            raise OSError(f"{folder} is missing: make peers sets it up, or {VARIABLE} names the directory")
        return [str(python), *worker]


PEERS: Sequence[Peer] = (
    Peer(BASELINE, "hf_transformers", None, ("one_by_one",), slow_alone=True),
    Peer("transformers, padded", "hf_transformers", None, ("padded",)),
    Peer("transformers, continuous", "hf_transformers", None, ("continuous",)),
    Peer(
        "CTranslate2",
        "ctranslate2_cpu",
        "other",
        not_run=(("bfloat16", "its CPU backend computes in float32 and int8 only"),),
    ),
    Peer("llama.cpp", "llama_cpp_batches", "other"),
    Peer("OpenVINO GenAI", "openvino_genai_cpu", "other"),
    Peer("vLLM", "vllm_cpu", "vllm"),
    Peer("part 15", "part15", None),
)
