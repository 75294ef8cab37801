"""Small steps as CUDA graphs: all of a forward pass's kernels are launched with one call.

A graph replays the kernels that were captured, with the same addresses and sizes. So a step is padded to the next
bucket, a size for which there is a graph, and its numbers are copied into buffers that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..messages import NULL_BLOCK
from .attention import AttentionMetadata, PagedAttention
from .model import DecoderModel

DEFAULT_SIZES = (1, 2, 4, *range(8, 257, 8))  # tokens of a step, on a GPU (vLLM's begin like this)
WARM_UP_RUNS = 2  # before a capture: kernels are compiled and measured, workspaces allocated
Replay = Callable[[], Tensor]


class StepGraphs:
    """The graphs of a model, one per bucket, for steps of decodes and for steps that also have chunks or drafts.

    sizes: of the buckets, in tokens. A step with more tokens is computed as usual. num_replays, num_padded: steps that
    were replayed, and the tokens that padding added to them.

    Padding never touches what belongs to a request: its keys and values go to the null block. In a step of decodes, a
    padded row is a sequence of one token, in the null block. In a mixed step, padded tokens belong to no sequence.
    """

    def __init__(self, model: DecoderModel, attention: PagedAttention, sizes: Sequence[int], max_blocks: int) -> None:
        self.model, self.attention, self.sizes = model, attention, sorted(sizes, reverse=True)
        self.num_replays = self.num_padded = 0
        largest, device = self.sizes[0], model.device
        self.input_ids, self.positions, self.slots = (
            torch.zeros(largest, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.block_tables = torch.full((largest, max_blocks), NULL_BLOCK, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(largest + 1, dtype=torch.int32, device=device)
        self.context_lens = torch.ones(largest, dtype=torch.int32, device=device)
        self._replays: dict[tuple[int, bool], Replay] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.startswith("cuda") else None

    def capture(self) -> None:
        """Capture all graphs, the largest first: the smaller ones use its memory."""
        for size in self.sizes:
            for is_decode in (True, False):
                if size > 1 or is_decode:
                    self._fill_padding(size, is_decode)
                    self._replays[size, is_decode] = self._capture(partial(self._forward, size, is_decode))

    def bucket(self, num_tokens: int, num_seqs: int) -> int | None:
        """The smallest size that has room for a step, None if none has."""
        return min((size for size in self.sizes if size >= max(num_tokens, num_seqs)), default=None)

    def run(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor | None:
        """A forward pass: [num_tokens, hidden_size], which the next replay overwrites. None if there is no bucket."""
        num_tokens, num_seqs = len(input_ids), len(metadata.context_lens)
        size = self.bucket(num_tokens, num_seqs)
        if size is None:
            return None
        is_decode = metadata.max_query_len == 1
        self._fill_padding(size, is_decode, num_tokens)
        self.input_ids[:num_tokens] = input_ids
        self.positions[:num_tokens] = positions
        self.slots[:num_tokens] = metadata.slot_mapping
        self.block_tables[:num_seqs, : metadata.block_tables.shape[1]] = metadata.block_tables
        self.query_start_loc[: num_seqs + 1] = metadata.query_start_loc
        self.context_lens[:num_seqs] = metadata.context_lens
        self.num_replays += 1
        self.num_padded += size - num_tokens
        return self._replays[size, is_decode]()[:num_tokens]

    def _fill_padding(self, size: int, is_decode: bool, num_tokens: int = 0) -> None:
        """Fill the buffers with padding for the whole bucket: nothing of an earlier step may remain, neither rows nor
        columns. run() then writes the real step over the first rows.

        num_tokens: of the real step.
        """
        # exercise: fill_padding
        self.input_ids[:size] = 0
        self.positions[:size] = 0
        self.slots[:size] = NULL_BLOCK
        self.block_tables[:size] = NULL_BLOCK
        self.context_lens[:size] = 1 if is_decode else 0
        if is_decode:
            torch.arange(size + 1, out=self.query_start_loc[: size + 1])
        else:
            self.query_start_loc[: size + 1] = num_tokens
        # exercise: end

    def _forward(self, size: int, is_decode: bool) -> Tensor:
        metadata = AttentionMetadata(
            slot_mapping=self.slots[:size],
            block_tables=self.block_tables[:size],
            query_start_loc=self.query_start_loc[: size + 1],
            context_lens=self.context_lens[:size],
            max_query_len=1 if is_decode else size,
        )
        attend = partial(self.attention.attend, metadata)
        hidden: Tensor = self.model(self.input_ids[:size], self.positions[:size], attend)
        return hidden

    def _capture(self, forward: Replay) -> Replay:
        """On a CPU, a replay computes again: only the padding and the buffers are the same as on a GPU."""
        if self._pool is None:
            return forward
        for _ in range(WARM_UP_RUNS):
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # other threads copy blocks
            output = forward()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def can_be_captured(model: DecoderModel) -> bool:
    """Whether a forward pass launches the same kernels for every step. It does not if it talks to other stages or
    experts, whose tokens vary, or fetches weights."""
    is_whole = model.stage.num_stages == 1 and model.fetcher is None
    return is_whole and not any(mixture.groups.has_expert_parallelism for mixture in model.mixtures)
