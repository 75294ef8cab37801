"""The flags of part 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.checkpoint import default_device
from common.cli import option
from common.errors import FieldError
from common.threads import check_num_threads


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises FieldError naming a flag that is out of range."""

    model: str = option("tiny", "a shipped model, a directory, a Hugging Face id or random:<preset>")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    device: str | None = option(None, "cpu or cuda (None: cuda if there is one)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: float32 on cpu, bfloat16 on cuda")
    num_threads: int | None = option(None, "CPU threads for the model (None: one per physical core)")
    max_model_len: int | None = option(None, "context length in tokens, prompt and answer (None: the model's)")
    max_queued_requests: int = option(64, "requests that may wait; one more gets status 429")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise FieldError("port", f"expected 0 to 65535, got {self.port}")
        check_num_threads(self.num_threads)
        if self.max_model_len is not None and self.max_model_len < 2:
            raise FieldError("max_model_len", f"expected at least 2 tokens, got {self.max_model_len}")
        if self.max_queued_requests < 0:
            raise FieldError("max_queued_requests", f"expected 0 or more, got {self.max_queued_requests}")
        device = self.device or default_device()
        if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and default_device() == "cpu"):
            raise FieldError("device", f"expected cpu, or cuda where torch sees a GPU, got {device!r}")
        object.__setattr__(self, "device", device)
