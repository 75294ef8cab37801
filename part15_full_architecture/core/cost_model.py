"""Whether KV blocks are loaded or computed again: the faster way, as far as it has been measured."""

from __future__ import annotations

from dataclasses import dataclass, field

DECAY = 0.8  # how much of a rate's earlier measurements remains when a new one comes
# How much faster a source is assumed to be each time that it isn't used, so that it's eventually tried again.
RISE = 1.05


@dataclass(slots=True)
class Rate:
    """Tokens per second. Newer measurements count more."""

    num_tokens: float = 0.0
    seconds: float = 0.0

    def add(self, num_tokens: float, seconds: float) -> None:
        self.num_tokens = DECAY * self.num_tokens + num_tokens
        self.seconds = DECAY * self.seconds + seconds

    def rise(self) -> None:
        self.seconds /= RISE

    @property
    def tokens_per_s(self) -> float:
        """0 before the first measurement."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    def seconds_for(self, num_tokens: int) -> float:
        """0 before the first measurement: so there will be one."""
        return num_tokens * self.seconds / max(self.num_tokens, 1.0)


@dataclass(slots=True)
class CostModel:
    """Measured rates. compute: of prompts. host, tiers: of blocks that are loaded from host memory, or from below."""

    block_size: int
    compute: Rate = field(default_factory=Rate)
    host: Rate = field(default_factory=Rate)
    tiers: Rate = field(default_factory=Rate)

    def num_to_load(self, num_host: int, num_found: int) -> int:
        """How many of num_found blocks to load, of which the first num_host are in host memory: all, only these, or
        none. The others are computed. The fastest choice; of equally fast ones, the one that loads most. All, as long
        as computing hasn't been measured.
        """
        if not self.compute.seconds:
            return num_found

        def seconds(num_blocks: int) -> float:
            from_host, from_tiers = min(num_blocks, num_host), max(0, num_blocks - num_host)
            load_s = self.host.seconds_for(from_host * self.block_size)
            load_s += self.tiers.seconds_for(from_tiers * self.block_size)
            return load_s + self.compute.seconds_for((num_found - num_blocks) * self.block_size)

        return min((num_found, num_host, 0), key=seconds)

    def note_refused(self, num_host: int, num_found: int, num_blocks: int) -> None:
        """Only num_blocks were loaded. The sources of the others are assumed to get a little faster."""
        if num_blocks < num_host:
            self.host.rise()
        if num_found > max(num_host, num_blocks):
            self.tiers.rise()
