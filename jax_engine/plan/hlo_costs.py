"""What one run of a compiled program costs a device, counted from its text with loops multiplied out.

XLA's own `cost_analysis` counts a loop's body once, so of a model whose layers are scanned it sees one. Counted here
are the operations of matrix products (a multiplication and an addition each), bytes to and from the device's main
memory, and what collectives send. Elementwise work is left out: it hides behind the memory that it reads. Of
alternatives (`lax.cond`) the dearest counts; a loop whose length depends on data counts as one trip, and is reported.

Attention and a mixture's experts are left out, too (whatever is traced within their scopes, kernels or not), but for
what they exchange: how much they do depends on lengths, and on which experts rows choose, that no program's text knows.
`roofline.py` adds them by arithmetic.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import TypeVar

from jax_engine.models.experts import EXPERTS_SCOPE
from jax_engine.models.kv_pages import ATTENTION_SCOPE
from jax_engine.plan.hlo_loops import trip_count
from jax_engine.plan.hlo_text import Computation, Instruction, Module, parse_module

Key = TypeVar("Key")

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Instructions that move nothing themselves: their result is their operand's memory, or another instruction's business.
_FREE = {
    "after-all", "add-dependency", "bitcast", "constant", "custom-call", "get-tuple-element", "opt-barrier",
    "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
# A TPU's compiler makes a table of rows before a ragged product, which is an expert's, under this name alone.
_RAGGED_TABLE = "ragged-dot-metadata"
_READS_PART = {"dynamic-slice", "gather", "slice"}


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of exchange between devices."""

    opcode: str
    num_devices: int  # that exchange among themselves
    num_bytes: float  # of the larger of what a device gives and what it gets

    @property
    def sent_bytes(self) -> float:
        """What a device sends, at least: of a ring's all-reduce two shares of n - 1 of n parts."""
        others = (self.num_devices - 1) / self.num_devices
        if self.opcode == "collective-permute":
            return self.num_bytes
        return self.num_bytes * others * (2 if self.opcode == "all-reduce" else 1)

    @property
    def num_hops(self) -> float:
        """Exchanges with a neighbour that follow one another, on a ring that is used in both directions."""
        if self.opcode == "collective-permute":
            return 1
        return self.num_devices // 2 * (2 if self.opcode == "all-reduce" else 1)


@dataclass(frozen=True)
class Costs:
    """Of one run, on one device."""

    flops: Mapping[str, float] = field(default_factory=dict)  # by HLO's name of the operands' type
    num_bytes: float = 0.0  # to and from main memory, kernels, attention and experts aside
    collectives: Mapping[Collective, float] = field(default_factory=dict)  # how often each runs
    kernels: Mapping[str, float] = field(default_factory=dict)  # custom calls by target, how often each runs
    unknown_loops: tuple[str, ...] = ()  # where loops of unknown length were traced; counted as one trip

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            _sum(self.flops, other.flops),
            self.num_bytes + other.num_bytes,
            _sum(self.collectives, other.collectives),
            _sum(self.kernels, other.kernels),
            tuple(dict.fromkeys((*self.unknown_loops, *other.unknown_loops))),
        )

    def times(self, count: float) -> "Costs":
        return Costs(
            _scaled(self.flops, count),
            count * self.num_bytes,
            _scaled(self.collectives, count),
            _scaled(self.kernels, count),
            self.unknown_loops,
        )

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def sent_bytes(self) -> float:
        """What a device sends to others."""
        return sum(count * one.sent_bytes for one, count in self.collectives.items())


def program_costs(text: str, *, num_blocks: int | None = None) -> Costs:
    """Costs of a compiled program, by its text; ValueError where the text is not in the known form.

    A step that runs in blocks of rows loops over as many as hold tokens: `num_blocks` are the trips of a loop of the
    program itself whose length depends on data and which multiplies matrices.
    """
    module = parse_module(text)
    return _Counter(module, num_blocks).of(module.entry)


class _Counter:
    """Walks one module. Mutable: it remembers what computations cost."""

    def __init__(self, module: Module, num_blocks: int | None) -> None:
        self._module = module
        self._num_blocks = num_blocks
        self.of = cache(self._of)

    def _of(self, name: str) -> Costs:
        """Of a computation that runs as instructions, one after another."""
        computation = self._module.computations[name]
        return _total(self._instruction(one, computation) for one in computation)

    def _instruction(self, one: Instruction, computation: Computation) -> Costs:
        costs = self._all_of(one, computation)
        return Costs(collectives=costs.collectives) if _is_left_out(one) else costs

    def _all_of(self, one: Instruction, computation: Computation) -> Costs:
        if one.opcode == "while":
            (body,), (condition,) = one.called("body"), one.called("condition")
            trips = trip_count(one, computation, self._module)
            inside = self.of(body) + self.of(condition)
            if trips is None and computation is self._module.computations[self._module.entry] and inside.flops:
                trips = self._num_blocks
            unknown = () if trips is not None else (one.scope,)
            return inside.times(1 if trips is None else trips) + Costs(unknown_loops=unknown)
        if one.opcode == "conditional":
            return max(map(self.of, one.called()), key=lambda costs: (costs.num_bytes, costs.total_flops))
        if one.opcode in ("call", "async-start"):
            return _total(map(self.of, one.called("calls") or one.called("to_apply") or one.called()))
        costs = self._inside(one, computation)
        if one.opcode == "custom-call" and costs.flops:
            read = sum(computation.instructions[name].num_bytes for name in one.operands)
            return costs + Costs(num_bytes=read + one.arrays[0].num_bytes)
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return costs
        return costs + Costs(num_bytes=self._bytes(one, computation))

    def _inside(self, one: Instruction, computation: Computation) -> Costs:
        """Operations, exchanges and kernels of an instruction, those fused into it too; no bytes."""
        if one.opcode == "fusion":
            inner = [self._module.computations[name] for name in one.called("calls")]
            return _total(self._inside(part, fused) for fused in inner for part in fused)
        if one.opcode == "custom-call":
            return _call_costs(one, computation)
        if one.opcode.removesuffix("-start") in COLLECTIVES:
            return Costs(collectives=self._collective(one, computation))
        if one.opcode in ("dot", "ragged-dot", "convolution"):
            operands = [computation.instructions[name] for name in one.operands]
            product = _convolution_flops if one.opcode == "convolution" else _dot_flops
            return Costs(flops={operands[0].arrays[0].dtype: product(one, operands)})
        return Costs()

    def _collective(self, one: Instruction, computation: Computation) -> dict[Collective, float]:
        opcode = one.opcode.removesuffix("-start")
        given = sum(computation.instructions[name].num_bytes for name in one.operands)
        size = group_size(one.attributes, self._module.num_devices)
        got = one.num_bytes
        if one.opcode.endswith("-start"):  # its result names what is given beside what is got
            got = {"all-gather": given * size, "reduce-scatter": given / size}.get(opcode, given)
        return {Collective(opcode, size, max(given, got)): 1.0} if size > 1 else {}

    def _bytes(self, one: Instruction, computation: Computation) -> float:
        """To and from main memory, of an instruction that is not fused into another."""
        inner = self._module.computations[one.called("calls")[0]] if one.opcode == "fusion" else None
        if one.opcode.endswith("-start"):
            return _moved(one, computation)
        total = _written(inner.root if inner else one, inner or computation, one)
        for number, name in enumerate(one.operands):
            operand = computation.instructions.get(name)
            if operand is None or all(array.is_on_chip for array in operand.arrays):
                continue
            total += self._read(number, inner) if inner else _read_by(one, number, operand)
        return total

    def _read(self, number: int, fused: Computation) -> float:
        """What a fusion reads of its operand: a slice, where that is all it takes."""
        parameter = fused.parameters.get(number)
        return 0.0 if parameter is None else min(parameter.num_bytes, self._taken(parameter, fused))

    def _taken(self, value: Instruction, fused: Computation) -> float:
        total = 0.0
        for user in fused.users.get(value.name, ()):
            for number in (place for place, name in enumerate(user.operands) if name == value.name):
                if user.opcode in ("bitcast", "get-tuple-element") or self._gives_on(user, number):
                    total += self._taken(user, fused)
                elif user.opcode == "fusion":
                    inner = self._module.computations[user.called("calls")[0]]
                    total += self._read(number, inner)
                else:
                    total += _read_by(user, number, value)
        return total

    def _gives_on(self, one: Instruction, number: int) -> bool:
        """Whether a fusion within another makes nothing of its operand but the same in another layout."""
        if one.opcode != "fusion":
            return False
        inner = self._module.computations[one.called("calls")[0]]
        value: Instruction | None = inner.root
        while value is not None and value.opcode in ("bitcast", "copy"):
            value = inner.instructions.get(value.operands[0])
        return value is not None and value is inner.parameters.get(number)


def _read_by(user: Instruction, number: int, operand: Instruction) -> float:
    """What an instruction reads of its operand `number`."""
    if number == 0 and user.opcode in _READS_PART:
        return min(user.num_bytes, operand.num_bytes)
    if number == 0 and user.opcode in ("dynamic-update-slice", "scatter"):
        return 0.0  # updated in place
    return operand.num_bytes


def _written(root: Instruction, computation: Computation, outer: Instruction) -> float:
    """What an instruction whose value is made by `root` writes to main memory."""
    if root.opcode == "tuple":
        leaves = [computation.instructions[name] for name in root.operands]
        places = [array.is_on_chip for array in outer.arrays]
        if len(places) == len(leaves):
            return sum(_made(leaf, computation) for leaf, on_chip in zip(leaves, places, strict=True) if not on_chip)
    if all(array.is_on_chip for array in outer.arrays):
        return 0.0
    return min(_made(root, computation), sum(array.num_bytes for array in outer.arrays if not array.is_on_chip))


def _made(value: Instruction, computation: Computation) -> float:
    """Bytes of a value that are new: of an array that is updated in place, the update's."""
    while value.opcode in ("bitcast", "copy") and value.operands[0] in computation.instructions:
        before = computation.instructions[value.operands[0]]
        if before.opcode not in ("bitcast", "dynamic-update-slice"):
            break
        value = before
    if value.opcode == "dynamic-update-slice":
        return computation.instructions[value.operands[1]].num_bytes
    if value.opcode == "scatter":
        return computation.instructions[value.operands[-1]].num_bytes
    return 0.0 if value.opcode == "parameter" else value.num_bytes


def _moved(one: Instruction, computation: Computation) -> float:
    """Bytes of an asynchronous copy: read, if it comes from main memory, and written, if it goes there."""
    if one.opcode.removesuffix("-start") in COLLECTIVES:
        return 2 * sum(computation.instructions[name].num_bytes for name in one.operands)
    given = [array for name in one.operands for array in computation.instructions[name].arrays]
    # A copy's result begins with where it goes, any other's with what it is given.
    destination, source = one.arrays[0 if one.opcode == "copy-start" else len(given)], given[0]
    size = min(destination.num_bytes, source.num_bytes)
    return size * ((not source.is_on_chip) + (not destination.is_on_chip))


def group_size(attributes: str, num_devices: int) -> int:
    """How many devices exchange among themselves, by any of the forms that a collective's text has."""
    if "source_target_pairs=" in attributes:
        return 2
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return prod(int(part) if part else sizes[name] for name, part in parts)
    return num_devices


def _call_costs(one: Instruction, computation: Computation) -> Costs:
    """Of a custom call: the operations of a product by a GPU's library, whose workspace comes behind its result."""
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    if target is None:
        return Costs()
    if not target[1].startswith("__cublas"):
        return Costs(kernels={target[1]: 1.0})
    operands = [computation.instructions[name] for name in one.operands]
    return Costs(flops={operands[0].arrays[0].dtype: _dot_flops(one, operands)})


def _dot_flops(one: Instruction, operands: list[Instruction]) -> float:
    left = operands[0].arrays[0].sizes
    listed = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', one.attributes)
    contracted = [int(place) for place in re.findall(r"\d+", listed[1])] if listed else []
    return 2.0 * prod(one.arrays[0].sizes) * prod(left[place] for place in contracted)


def _convolution_flops(one: Instruction, operands: list[Instruction]) -> float:
    """A TPU's form of a product. Of a window's taps, those on padding are no operations."""
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if match is None:
        raise ValueError(f"the convolution {one.name} of the program's text has no dim_labels")
    left, kernel, out = ({letter: place for place, letter in enumerate(labels)} for labels in match.groups())
    sizes = [operands[0].arrays[0].sizes, operands[1].arrays[0].sizes, one.arrays[0].sizes]
    flops = 2.0 * sizes[2][out["b"]] * sizes[2][out["f"]] * sizes[1][kernel["i"]]
    window = _window(one.attributes)
    for place, letter in enumerate(sorted(key for key in out if key.isdigit())):
        options = {key: values[place] for key, values in window.items()}
        flops *= _valid_taps(sizes[0][left[letter]], sizes[1][kernel[letter]], sizes[2][out[letter]], options)
    return flops


def _window(attributes: str) -> dict[str, list[str]]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}
    return {key: value.split("x") for key, value in fields.items()}


def _valid_taps(size: int, taps: int, outputs: int, options: Mapping[str, str]) -> int:
    """Pairs of an output's place and a tap that lies on the input, in one dimension."""
    stride, low = int(options.get("stride", "1")), int(options.get("pad", "0_0").split("_")[0])
    input_step, tap_step = int(options.get("lhs_dilate", "1")), int(options.get("rhs_dilate", "1"))
    places = (place * stride + tap * tap_step - low for place in range(outputs) for tap in range(taps))
    return sum(0 <= place <= (size - 1) * input_step and place % input_step == 0 for place in places)


def _is_left_out(one: Instruction) -> bool:
    return not {ATTENTION_SCOPE, EXPERTS_SCOPE, _RAGGED_TABLE}.isdisjoint(one.scope.split("/"))


def _total(parts: Iterable[Costs]) -> Costs:
    total = Costs()
    for part in parts:
        if part != Costs():
            total += part
    return total


def _scaled(table: Mapping[Key, float], count: float) -> dict[Key, float]:
    return {key: count * value for key, value in table.items()}


def _sum(left: Mapping[Key, float], right: Mapping[Key, float]) -> dict[Key, float]:
    return {key: left.get(key, 0.0) + right.get(key, 0.0) for key in dict.fromkeys((*left, *right))}
