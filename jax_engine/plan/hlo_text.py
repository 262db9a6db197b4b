"""The text of an optimised program, read into computations and instructions.

The text is the one form that every backend gives (`jax.stages.Compiled.as_text`), those for devices that are not here
too. Only what costs depend on is read: shapes with their memory, operands, called computations, attributes as text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"(body|calls|condition|to_apply|called_computations|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str  # HLO's name, such as bf16
    sizes: tuple[int, ...]
    is_on_chip: bool = False  # in a scratch memory of the chip, beside its main one

    @property
    def num_bytes(self) -> float:
        """Without the padding of its layout."""
        return prod(self.sizes) * bits(self.dtype) / 8


@dataclass(frozen=True)
class Instruction:
    """One instruction; `arrays` are the leaves of its result."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]  # names; of a constant or a parameter, what stands in the parentheses
    attributes: str
    is_tuple: bool = False  # its result is several arrays, or one in a tuple

    def called(self, kind: str | None = None) -> tuple[str, ...]:
        """Names of the computations that it calls, of one kind such as `body`, or of all."""
        return tuple(
            name.strip().lstrip("%")
            for key, several, single in _CALLED.findall(self.attributes)
            if kind in (None, key)
            for name in (several or single).split(",")
        )

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from: names between slashes."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def num_bytes(self) -> float:
        return sum(array.num_bytes for array in self.arrays)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order; `root` is the one that it returns."""

    instructions: Mapping[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Who takes an instruction's result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return {name: tuple(listed) for name, listed in found.items()}

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """Its parameters by number."""
        return {int(one.operands[0]): one for one in self if one.opcode == "parameter"}


@dataclass(frozen=True)
class Module:
    """A program."""

    computations: Mapping[str, Computation]
    entry: str
    num_devices: int


def bits(dtype: str) -> int:
    """Bits of a number by HLO's name for its type; ValueError for a name without a size."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+?(\d+)", dtype)
    if match is None:
        raise ValueError(f"the program's text has a type {dtype!r}, whose size is not known")
    return int(match[1])


def parse_module(text: str) -> Module:
    """Read the text of a compiled program.

    Raises:
        ValueError: it is not in the known form.
    """
    found: dict[str, Computation] = {}
    entry, name, root = "", "", None
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, current, root = header[2], {}, None
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            if not current:
                raise ValueError(f"computation {name} of the program's text has no instructions")
            found[name] = Computation(current, root or list(current.values())[-1])
            name = ""
        elif name and (match := _NAME.match(line)):
            instruction = _instruction(match[2], line[match.end() :])
            current[instruction.name] = instruction
            root = instruction if match[1] else root
    if not entry or entry not in found:
        raise ValueError("no entry computation in the program's text")
    head = text.partition("\n")[0]
    counts = [int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)]
    return Module(found, entry, prod(counts))


def _instruction(name: str, rest: str) -> Instruction:
    """What stands behind `name =`: shape, opcode, operands in parentheses, attributes."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = _operands(rest[opening + 1 : closing - 1])
    return Instruction(name, rest[:opening], _arrays(shape), operands, rest[closing:], shape.startswith("("))


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"unbalanced parentheses in the program's text: {text[:80]!r}")


def _operands(text: str) -> tuple[str, ...]:
    """Names between commas, each perhaps behind its shape."""
    parts, depth, start = [], 0, 0
    text = _COMMENT.sub("", text)
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return tuple(part.split()[-1].lstrip("%") for part in parts if part.strip())


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), _is_on_chip(layout))
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )


def _is_on_chip(layout: str) -> bool:
    space = _MEMORY_SPACE.search(layout)
    return space is not None and int(space[1]) != 0
