"""Every diagram under its file's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import (
    architecture,
    batches,
    disaggregation,
    experts,
    fusion,
    gpu,
    kernel_choice,
    kv_blocks,
    lifecycle,
    offload,
    one_request,
    overview,
    processes,
    quantization,
    quantized_layers,
    ranks,
    router,
    speculation,
    step_graphs,
    team,
    transformer,
)
from .svg import Drawing

DIAGRAMS: dict[str, Callable[[], Drawing]] = {
    "architecture": overview.architecture,
    "request_life": one_request.request_life,
    "prefill_decode": one_request.prefill_decode,
    "streaming": one_request.streaming,
    "transformer_shapes": transformer.transformer_shapes,
    "block_table": kv_blocks.block_table,
    "hash_chain": kv_blocks.hash_chain,
    "slots": batches.slots,
    "flat_batch": batches.flat_batch,
    "chunks": batches.chunks,
    "processes": processes.processes,
    "overlap": processes.overlap,
    "draft_verify": speculation.draft_verify,
    "tensor_parallel": ranks.tensor_parallel,
    "pipeline": ranks.pipeline,
    "prefix_index": router.prefix_index,
    "expert_dispatch": experts.expert_dispatch,
    "kv_tiers": offload.kv_tiers,
    "weight_prefetch": offload.weight_prefetch,
    "disaggregation": disaggregation.disaggregation,
    "kv_transfer": disaggregation.kv_transfer,
    "int4_groups": quantization.int4_groups,
    "gptq_step": quantization.gptq_step,
    "quantized_linear": quantized_layers.quantized_linear,
    "kv_codes": quantized_layers.kv_codes,
    "fused_operations": fusion.fused_operations,
    "padded_step": step_graphs.padded_step,
    "shared_tasks": team.shared_tasks,
    "kernel_choice": kernel_choice.kernel_choice,
    "warp_reduction": gpu.warp_reduction,
    "split_kv": gpu.split_kv,
    "lifecycle": lifecycle.lifecycle,
    **{f"architecture_part{part:02}": partial(architecture.architecture_part, part) for part in architecture.SUBTITLES},
}
