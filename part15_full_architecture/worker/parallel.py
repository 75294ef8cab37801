"""Tensor parallelism: ranks that each have a part of every layer, and the collectives that join their results."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint_reader import CheckpointReader
from common.errors import FieldError

from ..messages import Collective
from .linear import Embedding, Linear
from .weight import Packed, Part

VOCAB_PADDING = 64  # as in vLLM: the padded vocabulary's size is a multiple of it


@dataclass(frozen=True, slots=True)
class Shard:
    """The part that a rank has of `total` heads, rows or columns: start to stop - 1."""

    total: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __mul__(self, size: int) -> Shard:
        """The same shard in smaller units: of heads, say, in rows."""
        return Shard(self.total * size, self.start * size, self.stop * size)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


class CollectiveError(Exception):
    """A collective has failed. As a rule, the cause is another rank."""


@dataclass(slots=True)
class ParallelGroup:
    """The ranks that share the layers of a model, seen from one of them.

    A group of one rank has everything and communicates nothing. process_group: torch.distributed's. num_collectives:
    how many have begun. num_bytes_sent: to other ranks, with all_to_all. log: where each is noted, if anywhere.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    num_collectives: int = 0
    num_bytes_sent: int = 0
    log: list[Collective] | None = None

    def split(self, name: str, total: int) -> Shard:
        """This rank's equal share. Raises FieldError if total is not divisible."""
        if total % self.size:
            raise FieldError("tensor_parallel_size", f"expected a divisor of {name}, {total}, got {self.size}")
        size = total // self.size
        return Shard(total, self.rank * size, (self.rank + 1) * size)

    def split_kv_heads(self, total: int) -> Shard:
        """This rank's KV heads. If there are fewer than ranks, several ranks have the same one.

        Raises FieldError if neither number divides the other.
        """
        if total >= self.size:
            return self.split("num_key_value_heads", total)
        if self.size % total:
            raise FieldError(
                "tensor_parallel_size", f"expected a multiple of num_key_value_heads, {total}, got {self.size}"
            )
        head = self.rank // (self.size // total)
        return Shard(total, head, head + 1)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, in place. Every rank gets the same bits."""
        if self.size > 1 and partial.numel():
            with self._collective("all_reduce", partial):
                dist.all_reduce(partial, group=self.process_group)
        return partial

    def all_gather(self, shard: Tensor) -> Tensor:
        """Join the ranks' shards along the last dimension. shard: [n, size], of the same shape on all ranks."""
        if self.size == 1:
            return shard
        gathered = torch.empty(self.size, *shard.shape, dtype=shard.dtype, device=shard.device)
        with self._collective("all_gather", gathered):
            dist.all_gather_single(gathered.flatten(0, 1), shard.contiguous(), group=self.process_group)
        return gathered.transpose(0, 1).flatten(1)

    def all_to_all(self, rows: Tensor, counts: list[int], num_received: list[int]) -> Transfer:
        """Send rows to all ranks: the first counts[0] to rank 0, and so on. num_received: how many come from each rank.

        rows: [sum(counts), size]. Returns at once. [sum(num_received), size] will arrive, those of rank 0 first.
        """
        received = torch.empty(sum(num_received), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        self.num_bytes_sent += (len(rows) - counts[self.rank]) * rows[:1].nbytes
        self.num_collectives += 1
        with raising("all_to_all"):
            work = dist.all_to_all_single(received, rows, num_received, counts, group=self.process_group, async_op=True)
        return Transfer(received, work, self.log)

    def exchange_counts(self, counts: Tensor) -> list[list[int]]:
        """counts: [num_transfers, size], how many rows this rank sends to each. Returns how many it gets from each, for
        each transfer."""
        sent = counts.t().contiguous()
        received = torch.empty_like(sent)
        with self._collective("all_to_all", received):
            dist.all_to_all_single(received, sent, group=self.process_group)
        return received.t().tolist()

    def any(self, is_so: bool, device: str) -> bool:
        """Whether it is so on any rank."""
        found = torch.tensor([is_so], dtype=torch.int32, device=device)
        with self._collective("all_reduce", found):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.process_group)
        return bool(found.item())

    def all_gather_rows(self, share: Tensor, num_rows: int) -> Tensor:
        """Join the ranks' shares of num_rows rows, as share_of() divides them. Returns [num_rows, size]."""
        if self.size == 1 or num_rows == 0:
            return share
        size = -(-num_rows // self.size)
        padded = F.pad(share, (0, 0, 0, size - len(share)))
        gathered = torch.empty(self.size * size, share.shape[1], dtype=share.dtype, device=share.device)
        with self._collective("all_gather", gathered):
            dist.all_gather_single(gathered, padded, group=self.process_group)
        return gathered[:num_rows]

    @contextlib.contextmanager
    def _collective(self, name: str, tensor: Tensor) -> Iterator[None]:
        self.num_collectives += 1
        start_s = time.perf_counter()
        with raising(name):
            yield
        if self.log is not None:
            self.log.append(Collective(name, tensor.nbytes, start_s, time.perf_counter()))


@dataclass(slots=True)
class Transfer:
    """Rows on their way from all ranks. log: where it's noted, if anywhere."""

    rows: Tensor
    work: dist.Work
    log: list[Collective] | None
    start_s: float = field(default_factory=time.perf_counter)

    def wait(self) -> Tensor:
        """The rows, when all have arrived. On a GPU, the current stream waits and the CPU doesn't."""
        with raising("all_to_all"):
            self.work.wait()
        if self.log is not None:
            self.log.append(Collective("all_to_all", self.rows.nbytes, self.start_s, time.perf_counter()))
        return self.rows


@contextlib.contextmanager
def raising(name: str) -> Iterator[None]:
    """Raises CollectiveError for what torch.distributed raises."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise CollectiveError(f"{name}: {error}") from error


class ColumnParallelLinear(Linear):
    """Each rank has some of the output columns (rows of the weight matrix), and computes them from the whole input.

    outputs: a projection's name in the checkpoint → this rank's shard of its rows. Each projection is split on its own.
    """

    def __init__(self, in_features: int, outputs: dict[str, Shard], bias: bool) -> None:
        super().__init__(in_features, {name: len(shard) for name, shard in outputs.items()}, bias)
        self.shards = outputs

    def part(self, name: str) -> Part:
        """This rank's rows of a projection."""
        shard = self.shards[name]
        return Part(shard.total, self.weight.shape[-1], rows=shard.slice)


class RowParallelLinear(Linear):
    """Each rank has some of the input columns, and multiplies them with its part of the input; the sum over the ranks
    is the output.

    inputs: this rank's shard of the input features. Every rank has the whole bias, and one rank adds it.
    """

    def __init__(self, inputs: Shard, outputs: dict[str, int], bias: bool, group: ParallelGroup) -> None:
        super().__init__(len(inputs), outputs, bias)
        self.shard, self.group = inputs, group

    def part(self, name: str) -> Part:
        """This rank's columns of a projection."""
        return Part(self.outputs[name], self.shard.total, columns=self.shard.slice)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: […, this rank's input features]; returns […, rows], the same on all ranks."""
        bias = self.bias if self.group.rank == 0 else None
        return self.group.all_reduce(self.weight(hidden, bias))


class VocabParallelEmbedding(Embedding):
    """Each rank has the vectors of some token ids.

    The vocabulary is padded so that all ranks have equally many; the padding's vectors are 0.
    """

    def __init__(self, vocab_size: int, hidden_size: int, group: ParallelGroup) -> None:
        self.vocab_size, self.group = vocab_size, group
        self.shard = group.split("the padded vocabulary", padded_vocab_size(vocab_size, group.size))
        super().__init__(len(self.shard), hidden_size)
        self.packed: Packed | None = None  # for logits()

    def load(self, reader: CheckpointReader, path: str) -> None:
        num_real = min(max(0, self.vocab_size - self.shard.start), len(self.shard))
        full_shape = (self.vocab_size, self.weight.shape[1])
        rows = slice(self.shard.start, self.shard.start + num_real)
        self.weight[:num_real] = reader.read(f"{path}.weight", full_shape, (rows,))
        self.weight[num_real:] = 0

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens], int64; returns [num_tokens, hidden_size], the same on all ranks."""
        if self.group.size == 1:
            return super().forward(token_ids)
        is_mine = (token_ids >= self.shard.start) & (token_ids < self.shard.stop)
        local_ids = torch.where(is_mine, token_ids - self.shard.start, 0)
        return self.group.all_reduce(super().forward(local_ids) * is_mine.unsqueeze(1))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of all token ids. hidden: [n, hidden_size]; returns [n, vocab_size], float32, on all ranks."""
        own = F.linear(hidden, self.weight) if self.packed is None else self.packed.product(hidden)
        own = own.float()
        return self.group.all_gather(own)[:, : self.vocab_size]


def padded_vocab_size(vocab_size: int, num_ranks: int) -> int:
    """The smallest size, not below vocab_size, that is a multiple of VOCAB_PADDING and of the number of ranks."""
    if num_ranks == 1:
        return vocab_size
    multiple = VOCAB_PADDING * num_ranks // math.gcd(VOCAB_PADDING, num_ranks)
    return -(-vocab_size // multiple) * multiple


@dataclass(slots=True)
class PipelineStage:
    """A stage of the pipeline: some of the layers. It gets hidden states from the stage before, and sends its own on.

    previous, next: the ranks that it talks to.
    """

    index: int = 0
    num_stages: int = 1
    previous: int = -1
    next: int = -1
    _sending: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def layers(self, num_layers: int) -> range:
        """The layers of this stage. Raises FieldError if there are more stages than layers."""
        if self.num_stages > num_layers:
            raise FieldError(
                "pipeline_parallel_size", f"expected at most num_hidden_layers, {num_layers}, got {self.num_stages}"
            )
        return range(num_layers * self.index // self.num_stages, num_layers * (self.index + 1) // self.num_stages)

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: str) -> Tensor:
        """The hidden states that the stage before has sent: [num_tokens, hidden_size]."""
        hidden = torch.empty(num_tokens, hidden_size, dtype=dtype, device=device)
        try:
            dist.recv(hidden, self.previous)
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(f"recv: {error}") from error
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Send hidden states to the next stage. Returns at once: this stage goes on with its next step."""
        self._sending = [(work, tensor) for work, tensor in self._sending if not work.is_completed()]
        try:
            work = dist.isend(hidden, self.next)
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(f"send: {error}") from error
        assert work is not None, "the next stage is another rank"
        self._sending.append((work, hidden))  # the tensor must live until it is sent


@dataclass(slots=True)
class Groups:
    """The ranks that this one computes with. tensor: those that share its layers. experts: those that share the experts
    of its layers, each having some, or this rank alone. stage: which layers these are.
    num_redundant_experts: further copies of experts, of which each layer has so many. num_micro_batches: parts in which
    a step's tokens are exchanged."""

    tensor: ParallelGroup = field(default_factory=ParallelGroup)
    experts: ParallelGroup = field(default_factory=ParallelGroup)
    stage: PipelineStage = field(default_factory=PipelineStage)
    num_redundant_experts: int = 0
    num_micro_batches: int = 1

    @property
    def has_expert_parallelism(self) -> bool:
        return self.experts.size > 1
