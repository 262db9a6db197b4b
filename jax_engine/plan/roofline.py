"""How long a step takes at least: its operations, bytes and exchanges over what the chip can do of each.

Attention and experts are added by arithmetic to what is counted from the program's text. Products and main memory work
at the same time, so the slower of them counts; exchanges wait for the one and hold up the other, so theirs is added.
"""

from dataclasses import dataclass

from jax_engine.models.config import ModelConfig
from jax_engine.models.experts import expert_axes
from jax_engine.plan.chips import HOP_SECONDS, Chip
from jax_engine.plan.hlo_costs import Costs
from jax_engine.sharding.placed_model import PlacedModel


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
class Work:
    """Of all layers on one device, as arithmetic has it."""

    flops: float
    num_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


def attention_work(placed: PlacedModel, model: ModelConfig, load: Load) -> Work:
    """Two products with every position that a token sees, and every page read once a step.

    Cached tokens that several queries of a step see are read once, as if a kernel kept them; devices that share heads
    or stripes of pages share the work equally, of devices that own sequences the busiest counts, and the layers of a
    stage are its own.
    """
    geometry, partition = placed.geometry, placed.placement.activations
    layout, owners = geometry.layout, len(geometry.partitions.owners)
    page_sharers = load.num_sequences / -(-load.num_sequences // owners) if owners > 1 else partition.num_parts("pages")
    sharers = partition.num_parts("heads", "pages") / partition.num_parts("pages") * page_sharers
    token_bytes = geometry.page_bytes / geometry.page_size / page_sharers
    pairs = sum(load.num_sequences * _seen(load, layout.windows[group]) for group in layout.groups)
    flops = 4.0 * pairs * model.num_attention_heads * model.head_dim / sharers
    held = sum(min(load.context, window + load.new_tokens if window else load.context) for window in layout.windows)
    return Work(flops, token_bytes * load.num_sequences * (held + load.new_tokens * layout.num_groups))


def expert_work(placed: PlacedModel, model: ModelConfig, load: Load, *, num_rows: int) -> Work:
    """Three products of each row with the experts that it chooses, whose weights are read once a step of a program of
    `num_rows`.

    If all choices are as likely, and rows choose apart, an expert of E, of which T rows choose k each, is chosen by any
    with a chance of 1 - (1 - k / E)^T. A device puts those of its rows (all, or where experts are whole its part of
    them) that chose its experts through its part of them; a row goes in and comes out once for each choice. Nothing of
    a model without experts.
    """
    experts = model.experts
    if experts is None:
        return Work(0.0, 0.0)
    partition, itemsize = placed.placement.activations, placed.dtype.itemsize
    parts, width_parts, row_parts = map(partition.size_of, expert_axes(partition, num_rows))
    layers = sum(map(experts.are_in, range(model.num_hidden_layers))) / placed.geometry.num_stages
    width = experts.moe_intermediate_size / width_parts
    rows = load.num_tokens / row_parts
    choices = rows * experts.num_experts_per_tok / parts
    chance = 1 - (1 - experts.num_experts_per_tok / experts.num_experts) ** rows
    chosen = experts.num_experts / parts * chance
    one = 3.0 * model.hidden_size * width  # weights of an expert
    moved = chosen * one + 2 * choices * model.hidden_size
    return Work(layers * 2 * choices * one, layers * moved * itemsize)


def _seen(load: Load, window: int) -> float:
    """Positions that the new tokens of a sequence see, all together."""
    first, last = load.past_tokens + 1, load.context
    if window and first >= window:
        return float(window * load.new_tokens)
    whole = (first + last) * load.new_tokens / 2
    over = max(0, last - window) if window else 0
    return whole - over * (over + 1) / 2


def step_time(costs: Costs, added: Work, chip: Chip, dtype: str) -> StepTime:
    """Of a step with these costs on one device of a chip; the products of what is added are of `dtype`."""
    compute = sum(flops / chip.peak(kind) for kind, flops in costs.flops.items())
    return StepTime(
        compute + added.flops / chip.peak(dtype),
        (costs.num_bytes + added.num_bytes) / chip.device_bytes_per_second,
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
