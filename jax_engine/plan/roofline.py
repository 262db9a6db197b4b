"""How long a step takes at least: its operations, bytes and exchanges over what the chip can do of each.

Attention is added by arithmetic to what is counted from the program's text. Products and main memory work at the same
time, so the slower of them counts; exchanges wait for the one and hold up the other, so theirs is added.
"""

from dataclasses import dataclass

from jax_engine.models.config import ModelConfig
from jax_engine.placed_model import PlacedModel
from jax_engine.plan.chips import HOP_SECONDS, Chip
from jax_engine.plan.hlo_costs import Costs


@dataclass(frozen=True)
class Load:
    """What a step is asked for: as many new tokens of each sequence, behind as many that it has already."""

    num_sequences: int
    new_tokens: int
    past_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.new_tokens

    @property
    def context(self) -> int:
        """Tokens of a sequence after the step."""
        return self.past_tokens + self.new_tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, at least, and what they are spent on."""

    compute: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.communication

    @property
    def binds(self) -> str:
        """What takes longest."""
        named = {"bandwidth": self.memory, "FLOPs": self.compute, "interconnect": self.communication}
        return max(named, key=lambda name: named[name])


@dataclass(frozen=True)
class AttentionCosts:
    """Of all layers on one device."""

    flops: float
    num_bytes: float


def attention_costs(placed: PlacedModel, model: ModelConfig, load: Load) -> AttentionCosts:
    """Two products with every position that a token sees, and every page read once a step.

    Cached tokens that several queries of a step see are read once, as if a kernel kept them; devices that share heads
    or pages share the work equally, and the layers of a stage are its own.
    """
    geometry, partition = placed.geometry, placed.placement.activations
    sharers = partition.num_parts("heads", "pages")
    layout = geometry.layout
    token_bytes = geometry.page_bytes / geometry.page_size / partition.num_parts("pages")
    pairs = sum(load.num_sequences * _seen(load, layout.windows[group]) for group in layout.groups)
    flops = 4.0 * pairs * model.num_attention_heads * model.head_dim / sharers
    held = sum(min(load.context, window + load.new_tokens if window else load.context) for window in layout.windows)
    return AttentionCosts(flops, token_bytes * load.num_sequences * (held + load.new_tokens * layout.num_groups))


def _seen(load: Load, window: int) -> float:
    """Positions that the new tokens of a sequence see, all together."""
    first, last = load.past_tokens + 1, load.context
    if window and first >= window:
        return float(window * load.new_tokens)
    whole = (first + last) * load.new_tokens / 2
    over = max(0, last - window) if window else 0
    return whole - over * (over + 1) / 2


def step_time(costs: Costs, attention: AttentionCosts, chip: Chip, dtype: str) -> StepTime:
    """Of a step with these costs on one device of a chip; attention's products are of `dtype`."""
    compute = sum(flops / chip.peak(kind) for kind, flops in costs.flops.items())
    return StepTime(
        compute + attention.flops / chip.peak(dtype),
        (costs.num_bytes + attention.num_bytes) / chip.device_bytes_per_second,
        communication_seconds(costs, chip),
    )


def communication_seconds(costs: Costs, chip: Chip) -> float:
    """Of all exchanges, one after another: bytes over a ring's bandwidth, and `HOP_SECONDS` a hop; by a switch, every
    device is one hop away.
    """
    total = 0.0
    for one, count in costs.collectives.items():
        hops = one.num_hops if chip.num_links > 1 else min(one.num_hops, 2)
        total += count * (one.sent_bytes / chip.ring_bytes_per_second + hops * HOP_SECONDS)
    return total
