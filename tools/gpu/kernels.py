"""The parts' Triton kernels: compared with a plain reference in three dtypes, and how fast decode reads the KV cache.

Parts whose worker/triton_attention.py is the same are checked once, under the first part's name.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.gpu.parts import part_names
from tools.gpu.recorder import Recorder, SkipSection
from tools.gpu.timing import copy_bandwidth_gb_s, seconds_per_call

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE = 16
SECONDS_PER_CASE = 8  # compiling takes most of it
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}
DECODES = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 100), (1, 1_000), (1, 2_049))
MIXED = ((1, 300), (37, 37), (100, 513), (1, 1), (5, 21), (256, 700))


@dataclass(frozen=True, slots=True)
class Shape:
    """seqs: for each sequence, its new tokens and its context length, which includes them."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seqs: tuple[tuple[int, int], ...]

    @property
    def is_decode(self) -> bool:
        return all(query_len == 1 for query_len, _ in self.seqs)


SHAPES = (
    Shape("decode, Qwen3-8B", 32, 8, 128, DECODES),
    Shape("chunks and decodes, Qwen3-0.6B", 16, 8, 128, MIXED),
    Shape("decode, llama-110m", 12, 12, 64, DECODES),
    Shape("decode, 8 heads a KV head", 32, 4, 64, DECODES),
    Shape("chunks and decodes, llama-110m", 12, 12, 64, MIXED),
    Shape("chunks and decodes, tiny", 8, 4, 32, MIXED),
)
SHAPES_ON_CPU = (Shape("decode", 2, 1, 16, ((1, 5), (1, 20))), Shape("chunks and decodes", 2, 1, 16, ((3, 9), (1, 4))))
TIMED = ((1, 4_096), (32, 1_024), (256, 1_024), (256, 4_096))  # sequences, context
TIMED_SHAPES = (Shape("Qwen3-8B", 32, 8, 128, ()), Shape("llama-110m", 12, 12, 64, ()))


@dataclass(slots=True)
class Batch:
    """The inputs of a kernel. kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim]."""

    query: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    query_lens: list[int]
    context_lens: list[int]

    def starts(self) -> Tensor:
        return torch.tensor([0, *self.query_lens], device=self.query.device).cumsum(0).to(torch.int32)

    def lens(self) -> Tensor:
        return torch.tensor(self.context_lens, dtype=torch.int32, device=self.query.device)


def make_batch(shape: Shape, seqs: tuple[tuple[int, int], ...], dtype: torch.dtype, device: str) -> Batch:
    """Random queries, and a KV cache with its blocks in random order. Slots without a token hold NaN."""
    generator = torch.Generator(device).manual_seed(0)
    counts = [-(-context_len // BLOCK_SIZE) for _, context_len in seqs]
    order = (torch.randperm(sum(counts), generator=generator, device=device) + 1).to(torch.int32)  # 0: the null block
    tables = torch.zeros(len(seqs), max(counts), dtype=torch.int32, device=device)
    size = (sum(counts) + 1, BLOCK_SIZE, 2, shape.num_kv_heads, shape.head_dim)
    memory = torch.randn(size, generator=generator, device=device, dtype=dtype)
    memory[0] = float("nan")
    first = 0
    for seq, ((_, context_len), count) in enumerate(zip(seqs, counts, strict=True)):
        blocks = order[first : first + count]
        tables[seq, :count] = blocks
        if context_len % BLOCK_SIZE:
            memory[int(blocks[-1]), context_len % BLOCK_SIZE :] = float("nan")
        first += count
    num_tokens = sum(query_len for query_len, _ in seqs)
    query = torch.randn(
        num_tokens, shape.num_heads, shape.head_dim, generator=generator, device=device, dtype=dtype
    )  # fmt: skip
    return Batch(query, memory, tables, [q for q, _ in seqs], [c for _, c in seqs])


def reference(batch: Batch, scale: float) -> Tensor:
    """Dense causal attention of each sequence by itself, in float64: [num_tokens, num_heads, head_dim]."""
    outputs = []
    queries = batch.query.double().split(batch.query_lens)
    for seq, (query, context_len) in enumerate(zip(queries, batch.context_lens, strict=True)):
        blocks = batch.block_tables[seq, : -(-context_len // BLOCK_SIZE)].long()
        context = (
            batch.kv_cache[blocks].flatten(0, 1)[:context_len].double()
        )  # [context_len, 2, num_kv_heads, head_dim]
        key, value = context.repeat_interleave(query.shape[1] // context.shape[2], dim=2).unbind(1)
        positions = torch.arange(context_len, device=query.device)
        is_visible = positions <= positions[context_len - len(query) :, None]
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_visible, float("-inf")).softmax(-1), value))
    return torch.cat(outputs)


def kernel_call(module: Any, batch: Batch, scale: float) -> Any:
    """The part's kernel over a batch, as a function without arguments: its inputs are already on the device."""
    starts, lens, longest = batch.starts(), batch.lens(), max(batch.query_lens)
    if hasattr(module, "paged_attention"):
        return lambda: module.paged_attention(
            batch.query, batch.kv_cache, batch.block_tables, starts, lens, longest, scale
        )  # fmt: skip
    return lambda: module.paged_decode(batch.query, batch.kv_cache, batch.block_tables, lens, scale)


def kernels() -> dict[str, Any]:
    """The distinct kernels of the parts: "part 3" -> its module."""
    found: dict[str, str] = {}
    for part in part_names():
        path = ROOT / part / "worker" / "triton_attention.py"
        if path.is_file():
            found.setdefault(path.read_text("utf-8"), part)
    modules = {part: importlib.import_module(f"{part}.worker.triton_attention") for part in found.values()}
    return {f"part {int(part[4:6])}": module for part, module in modules.items()}


def run(recorder: Recorder) -> None:
    if importlib.util.find_spec("triton") is None:
        raise SkipSection("triton is not installed")
    dtypes = [torch.float32] if recorder.on_cpu else list(TOLERANCES)
    shapes = SHAPES_ON_CPU if recorder.on_cpu else SHAPES
    for dtype in dtypes:
        for shape in shapes:
            for name, module in kernels().items():
                if shape.is_decode or hasattr(module, "paged_attention"):
                    compare(recorder, f"{name}, {shape.name}, {str(dtype)[6:]}", module, shape, dtype)
        if not recorder.on_cpu and dtype is torch.bfloat16:  # now, because timings matter more than other dtypes
            measure(recorder, dtype)


def compare(recorder: Recorder, name: str, module: Any, shape: Shape, dtype: torch.dtype) -> None:
    """One case: the largest difference from the reference."""
    if recorder.seconds_left() < SECONDS_PER_CASE:
        recorder.skip_case(name, f"{recorder.seconds_left():.0f} s left")
        return
    with recorder.case(name) as values:
        batch, scale = make_batch(shape, shape.seqs, dtype, recorder.device), shape.head_dim**-0.5
        got = kernel_call(module, batch, scale)()
        values["difference"] = difference = float((got.double() - reference(batch, scale)).abs().max())
        assert difference <= TOLERANCES[dtype], (  # fails for NaN, which comes from a slot without a token
            f"expected to differ by at most {TOLERANCES[dtype]:g} from the reference, got {difference:.2e}"
        )


def measure(recorder: Recorder, dtype: torch.dtype) -> None:
    """GB/s at which decodes read the KV cache. If the kernel is shorter than its launch, the launch counts."""
    copy_gb_s = copy_bandwidth_gb_s(recorder.device)
    for shape in TIMED_SHAPES:
        for num_seqs, context_len in TIMED:
            for name, module in kernels().items():
                case = f"{name}, {num_seqs} decodes over {context_len} tokens, {shape.name}, {str(dtype)[6:]}"
                if recorder.seconds_left() < SECONDS_PER_CASE:
                    recorder.skip_case(case, f"{recorder.seconds_left():.0f} s left")
                    continue
                with recorder.case(case) as values:
                    batch = make_batch(shape, ((1, context_len),) * num_seqs, dtype, recorder.device)
                    call = kernel_call(module, batch, shape.head_dim**-0.5)
                    seconds = seconds_per_call(call, recorder.device)
                    num_bytes = num_seqs * context_len * 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
                    values |= {"us": seconds * 1e6, "kv_mb": num_bytes / 1e6, "gb_s": num_bytes / seconds / 1e9}
                    values["share_of_copy_bandwidth"] = values["gb_s"] / copy_gb_s
