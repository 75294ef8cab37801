"""llama.cpp, through llama-cpp-python's low-level API: continuous batching with a sequence for each request.

Its server does the same with slots: each batch has the newest token of every request that is running, and as many
prompt tokens as still fit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.peers.workers.loop import Loaded, num_cores, serve

MAX_SEQS, MAX_MODEL_LEN = 32, 1_024


@dataclass(slots=True)
class Sequence:
    """One request. pending: the tokens that are not computed yet."""

    seq_id: int
    pending: list[int]
    max_tokens: int
    num_computed: int = 0
    answer: list[int] = field(default_factory=list)


class Batches:
    """A context of llama.cpp, and the batch that it is given."""

    def __init__(self, llama_cpp: Any, weights: Any, params: Any) -> None:
        import numpy as np

        self.lib, self.size = llama_cpp, params.n_batch
        self.context = llama_cpp.llama_init_from_model(weights, params)
        if self.context is None:
            raise RuntimeError("llama.cpp made no context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
        self.batch = batch = llama_cpp.llama_batch_init(self.size, 0, 1)
        arrays = (batch.token, batch.pos, batch.n_seq_id, batch.logits)
        self.token, self.pos, num_ids, self.is_wanted = (np.ctypeslib.as_array(each, (self.size,)) for each in arrays)
        num_ids[:] = 1

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        self.lib.llama_memory_clear(self.memory, False)
        sequences = [
            Sequence(i, list(prompt), n) for i, (prompt, n) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        running = sequences
        while running:
            self.step(running)
            for sequence in running:
                if len(sequence.answer) == sequence.max_tokens:
                    self.lib.llama_memory_seq_rm(self.memory, sequence.seq_id, -1, -1)
            running = [sequence for sequence in running if len(sequence.answer) < sequence.max_tokens]
        return [sequence.answer for sequence in sequences]

    def step(self, running: list[Sequence]) -> None:
        """Compute one batch, and append the most likely token to each sequence that is computed to its end."""
        num_tokens, complete = 0, []
        for sequence in sorted(running, key=lambda sequence: not sequence.answer):  # the decodes first
            num_tokens += self.add(sequence, num_tokens)
            if not sequence.pending:
                complete.append((sequence, num_tokens - 1))
            if num_tokens == self.size:
                break
        self.batch.n_tokens = num_tokens
        status = self.lib.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for sequence, row in complete:
            sequence.pending = [self.most_likely(row)]
            sequence.answer += sequence.pending

    def add(self, sequence: Sequence, start: int) -> int:
        """Put a sequence's tokens into the batch from here on. Returns how many fit."""
        tokens = sequence.pending[: self.size - start]
        end = start + len(tokens)
        self.token[start:end] = tokens
        self.pos[start:end] = range(sequence.num_computed, sequence.num_computed + len(tokens))
        for place in range(start, end):
            self.batch.seq_id[place][0] = sequence.seq_id
        sequence.pending = sequence.pending[len(tokens) :]
        sequence.num_computed += len(tokens)
        self.is_wanted[start:end] = 0
        self.is_wanted[end - 1] = not sequence.pending
        return len(tokens)

    def most_likely(self, row: int) -> int:
        import numpy as np

        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, row), (self.vocab_size,))
        return int(logits.argmax())


def load(model: Path, dtype: str, files: Path) -> Loaded:
    import llama_cpp

    from tools.peers.gguf_file import write_gguf

    path = files / f"{dtype}.gguf"
    if not path.exists():
        write_gguf(model, path, dtype)
    llama_cpp.llama_backend_init()
    weights = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = {
        "n_ctx": MAX_SEQS * MAX_MODEL_LEN, "n_seq_max": MAX_SEQS, "n_threads": num_cores(),
        "n_threads_batch": num_cores(), **attention(llama_cpp, dtype),
    }  # fmt: skip
    params = llama_cpp.llama_context_default_params()
    for name, value in settings.items():
        setattr(params, name, value)
    batches = Batches(llama_cpp, weights, params)
    return Loaded(batches.generate, settings)


def attention(llama_cpp: Any, dtype: str) -> dict[str, int]:
    """Its flash attention computes with keys and values in float16, also where the cache has float32. In float32 it is
    off, which is exact, and was quicker besides."""
    if dtype == "float32":
        off = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return {"flash_attn_type": off, "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return {}  # the defaults: flash attention, and a cache in float16


if __name__ == "__main__":
    sys.exit(serve(load, "llama-cpp-python", "gguf"))
