"""The dense feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from .kernels.ops import Kernels
from .parallel import ColumnParallelLinear, ParallelGroup, RowParallelLinear


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), the gated feed-forward network (SwiGLU: Shazeer, 2020).

    size_name: what the config calls its size.
    """

    kernels = Kernels()

    def __init__(
        self, hidden_size: int, size: int, bias: bool, group: ParallelGroup, size_name: str = "intermediate_size"
    ) -> None:
        super().__init__()
        shard = group.split(size_name, size)
        self.gate_up_proj = ColumnParallelLinear(hidden_size, {"gate_proj": shard, "up_proj": shard}, bias)
        self.down_proj = RowParallelLinear(shard, {"down_proj": hidden_size}, bias, group)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size]; returns the same shape."""
        return self.down_proj(self.kernels.silu_and_mul(self.gate_up_proj(hidden)))
