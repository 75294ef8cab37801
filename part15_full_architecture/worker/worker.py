"""The worker: everything that lives on the model's device."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch

from common.checkpoint import DTYPES, default_dtype, resolve_checkpoint
from common.errors import FieldError
from common.memory import check_memory, num_blocks_in, peak_memory
from common.threads import set_num_threads

from ..config import EngineConfig
from ..messages import Load, LookUp, Notice, Publish, Save, StepInput, StepOutput, Transfer, TransferDone
from .block_copier import BlockCopier
from .draft_model import DraftModelProposer
from .expert_moves import move_experts, take_loads
from .kernels.ops import Kernels, Situation, choose_kernels
from .kv_cache import CPU_KV_CACHE_BYTES, KVCache, kv_bytes_per_block
from .kv_shard import make_shard
from .kv_tiers import make_tiers
from .kv_transfer import KVTransferAgent
from .megakernel import most_tokens
from .model import DecoderModel
from .model_runner import ModelRunner, to_step_output
from .packed_matrix import pack_copies, pack_matrices
from .parallel import Groups
from .quantization.choice import QuantizationFlags
from .quantization.kv_codes import KVFormat
from .quantization.kv_scales import choose_kv_format
from .sampler import SamplerOutput
from .small_steps import uses_megakernel
from .stream import StepHandle, make_stream
from .weights import load_decoder


class Worker:
    """Loads the model, determines how large the KV cache can be, allocates it, and runs steps on its stream.

    config: as resolve_config returns it. groups: this rank's layers, and the ranks that it shares them with.
    Every rank of the last stage has the whole draft model: it is small, and its many short passes would spend their
    time in collectives. seed: of unseeded draws, the same on all ranks. allocate_cache() comes before the first step.
    """

    def __init__(
        self, config: EngineConfig, groups: Groups | None = None, local_rank: int = 0, seed: int | None = None,
    ) -> None:  # fmt: skip
        assert config.device and config.max_model_len, "resolve_config fills them in"
        self.config, self.groups = config, groups or Groups()
        self.device = f"cuda:{local_rank}" if config.device == "cuda" and config.num_ranks > 1 else config.device
        num_bytes = 8 * config.max_num_seqs * config.max_model_len  # of the token buffer
        check_memory("max_num_seqs", config.max_num_seqs, num_bytes, self.device)
        self.checkpoint = resolve_checkpoint(config.model)
        dtype = default_dtype(self.device) if config.dtype == "auto" else DTYPES[config.dtype]
        self.stream = make_stream(self.device)
        self.stream.run(lambda: set_num_threads(config.num_threads))
        num_offloaded_bytes = int(config.cpu_offload_gb * 2**30)
        flags = QuantizationFlags(config.quantization, config.quantization_group_size)
        self.model = self.stream.run(
            lambda: load_decoder(self.checkpoint, dtype, self.device, self.groups, num_offloaded_bytes, flags)
        )
        self.kv_format = self.stream.run(lambda: choose_kv_format(self.model, config, self.checkpoint))
        self.kernels = self.stream.run(lambda: use_kernels(self.model, self.kv_format, config))
        generator = torch.Generator(self.device)
        generator.manual_seed(random.getrandbits(63) if seed is None else seed)
        self.drafter = None
        if config.speculative_method == "draft_model" and self.groups.stage.is_last:
            draft = self.stream.run(lambda: load_draft_model(config, dtype, self.device))
            kernels = self.stream.run(lambda: use_kernels(*draft, config))
            self.drafter = self.stream.run(lambda: DraftModelProposer(*draft, config, kernels, generator))
        eos_token_ids = self.checkpoint.eos_token_ids
        self.runner = self.stream.run(
            lambda: ModelRunner(self.model, config, self.kernels, eos_token_ids, self.drafter, generator)
        )
        self.copier: BlockCopier | None = None
        self.agent: KVTransferAgent | None = None
        self._published: list[Publish] = []  # of the step that is launched next

    @property
    def kernel_choices(self) -> dict[str, tuple[str, str]]:
        """Operation → backend, and why it was chosen."""
        return {name: (choice.backend, choice.reason) for name, choice in self.kernels.choices.items()}

    @property
    def num_collectives(self) -> int:
        """How many collectives of its groups this rank has begun."""
        return self.groups.tensor.num_collectives + self.groups.experts.num_collectives

    @property
    def weight_bytes(self) -> int:
        """Of the model, and of the draft model if there is one."""
        models = [self.model] if self.drafter is None else [self.model, self.drafter.model]
        return sum(model.packed_bytes + sum(parameter.nbytes for parameter in model.parameters()) for model in models)

    @property
    def bytes_per_block(self) -> int:
        """Of the KV pool, and the draft model's if there is one: it has as many blocks."""
        models = [(self.model, self.kv_format)]
        if self.drafter is not None:
            models.append((self.drafter.model, self.drafter.kv_format))
        return sum(kv_bytes_per_block(model, self.config.block_size, kv_format) for model, kv_format in models)

    def num_blocks_available(self) -> int:
        """The size of the KV pool in blocks: as configured, or as many as fit."""
        config, bytes_per_block = self.config, self.bytes_per_block
        if config.num_kv_blocks is not None:
            check_memory("num_kv_blocks", config.num_kv_blocks, config.num_kv_blocks * bytes_per_block, self.device)
            return config.num_kv_blocks
        if config.kv_cache_memory is not None:
            check_memory("kv_cache_memory", config.kv_cache_memory, config.kv_cache_memory, self.device)
            return num_blocks_in(config.kv_cache_memory, bytes_per_block, "kv_cache_memory")
        if not self.device.startswith("cuda"):
            return num_blocks_in(CPU_KV_CACHE_BYTES, bytes_per_block, "kv_cache_memory")
        total = torch.cuda.get_device_properties(self.device).total_memory
        available = int(config.gpu_memory_utilization * total) - peak_memory(self.device, self.runner.profile)
        for mixture in self.model.mixtures:
            mixture.loads.zero_()  # from tokens that nobody sent
        if available <= 0:
            raise FieldError("gpu_memory_utilization", f"{config.gpu_memory_utilization} leaves no room for a KV cache")
        return num_blocks_in(available, bytes_per_block, "gpu_memory_utilization")

    def allocate_cache(
        self, num_blocks: int, num_host_blocks: int = 0, report: Callable[[TransferDone], None] = lambda done: None
    ) -> None:
        """Allocate the KV pool, and room for num_host_blocks blocks in host memory. report: called with the answer to
        each transfer, in another thread."""
        cache = self.stream.run(lambda: KVCache(self.model, num_blocks, self.config.block_size, self.kv_format))
        self.stream.run(lambda: self.runner.set_cache(cache))
        if num_host_blocks:
            caches = [cache] if self.drafter is None else [cache, self.drafter.kv_cache]
            tiers = make_tiers(self.config, self.checkpoint, self.groups, self.bytes_per_block, caches)
            self.copier = BlockCopier(self.runner.pools, num_host_blocks, tiers, self.stream.mark, report)
        if self.config.kv_connector != "none":
            shard = make_shard(cache, self.checkpoint, self.groups, self.config)
            self.agent = KVTransferAgent(shard, self.config, self.stream.mark, report)

    def transfer(self, transfer: Transfer | Notice) -> None:
        """Start a transfer. It touches the pool when the steps that were launched before have run."""
        match transfer:
            case Save() | Load() | LookUp():
                assert self.copier is not None, "core makes none without host memory"
                self.copier.start(transfer)
            case Publish():
                self._published.append(transfer)
            case _:
                assert self.agent is not None, "core makes none without a connector"
                self.agent.start(transfer)

    def close(self) -> None:
        """Finish what other engines may need, and end the threads that copy. Nothing may be called afterwards."""
        if self.copier is not None:
            self.copier.close()
        if self.agent is not None:
            self.agent.close()

    @property
    def answers(self) -> bool:
        """Whether this rank sends the results to core: all ranks of the last stage have the same."""
        return self.groups.stage.is_last and self.groups.tensor.rank == 0

    def launch(self, step: StepInput) -> StepHandle:
        """Launch a step; it runs after those launched before. Returns before it is done."""
        batch = self.runner.prepare(step) if step.requests else None
        published, self._published = self._published, []
        any_has_requests: bool | None = None

        def run() -> SamplerOutput:
            nonlocal any_has_requests
            if step.has_requests is not None:
                any_has_requests = self.groups.experts.any(step.has_requests, self.device)
            if batch is None:
                return self.runner.run_dummy()
            if published and self.agent is not None:
                return self.runner.run(batch, partial(self.agent.note_layer, published))
            return self.runner.run(batch)

        def finish(sampled: SamplerOutput) -> StepOutput:
            if batch is None or not self.groups.stage.is_last:
                output = StepOutput([], [], [])
            else:
                output = to_step_output(sampled, batch)
            output.any_has_requests = any_has_requests
            return output

        return self.stream.launch(run, finish)

    def measure_experts(self) -> list[list[int]]:
        """How many tokens the experts of each layer have got from all ranks since the last time."""
        return self.stream.run(lambda: take_loads(self.model.mixtures))

    def place_experts(self, placements: list[list[int]]) -> None:
        """Move the experts of each layer. All ranks do this between the same two steps."""

        def move() -> None:
            for mixture, experts in zip(self.model.mixtures, placements, strict=True):
                move_experts(mixture, experts)

        self.stream.run(move)


def use_kernels(model: DecoderModel, kv_format: KVFormat, config: EngineConfig) -> Kernels:
    """Choose the kernels for a model, which uses them from now on."""
    situation = Situation(
        device=torch.device(model.device), dtype=model.dtype, kv_dtype=kv_format.dtype, num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size, num_ranks=config.num_ranks * config.data_parallel_size,
    )  # fmt: skip
    kernels = choose_kernels(config.kernels, situation)
    model.use(kernels)
    is_packed = config.pack_weights and model.device == "cpu" and situation.num_ranks == 1  # ranks must compute alike
    if is_packed and uses_megakernel(model, kernels, kv_format.scales, config):
        pack_copies(model, most_tokens(model.dtype))
    elif is_packed:
        pack_matrices(model)
    return kernels


def load_draft_model(config: EngineConfig, dtype: torch.dtype, device: str) -> tuple[DecoderModel, KVFormat]:
    """As load_decoder does, but errors name the flag speculative_model."""
    flags = QuantizationFlags(config.speculative_quantization, config.quantization_group_size)
    try:
        checkpoint = resolve_checkpoint(config.speculative_model)
        model = load_decoder(checkpoint, dtype, device, quantization=flags)
        return model, choose_kv_format(model, config, checkpoint)
    except FieldError as error:
        raise FieldError("speculative_model", str(error).removeprefix(f"{error.field}: ")) from None
