"""How a checkpoint's tensors become parameters: rules from names to layouts, independent of depth."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

# One (start, stop) a dimension.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """How a parameter's dimensions are stored: `groups[i]` are those merged into stored dimension i, slowest first.

    The methods take the parameter's `shape`; `ranges` select a part of it, so that a device can read its part alone.
    """

    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read "stored -> used", e.g. "(heads head_dim) embed -> embed heads head_dim"."""
        stored, _, used = text.partition(" -> ")
        names = used.split()
        groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", stored)]
        if sorted(name for group in groups for name in group) != sorted(names) or len(set(names)) != len(names):
            raise ValueError(f"layout {text!r} must name the same dimensions, each once, on both sides of ' -> '")
        return cls(tuple(tuple(names.index(name) for name in group) for group in groups))

    @classmethod
    def identity(cls, num_dimensions: int) -> "Layout":
        """Stored as used."""
        return cls(tuple((dimension,) for dimension in range(num_dimensions)))

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape a checkpoint must hold for a parameter of `shape`."""
        return tuple(prod(shape[dimension] for dimension in group) for group in self.groups)

    def stored_ranges(self, shape: Sequence[int], ranges: Ranges) -> Ranges:
        """The smallest stored block that holds `ranges`: of a merged dimension, whole steps of the slowest one."""
        steps = [prod(shape[dimension] for dimension in group[1:]) for group in self.groups]
        bounds = [ranges[group[0]] for group in self.groups]
        return tuple((start * step, stop * step) for (start, stop), step in zip(bounds, steps, strict=True))

    def arrange(self, block: np.ndarray[Any, Any], shape: Sequence[int], ranges: Ranges) -> np.ndarray[Any, Any]:
        """The parameter's part at `ranges`, as a view of the stored block read from `stored_ranges`."""
        order = [dimension for group in self.groups for dimension in group]
        slowest = {group[0] for group in self.groups}
        spread = block.reshape([ranges[d][1] - ranges[d][0] if d in slowest else shape[d] for d in order])
        part = spread[tuple(slice(None) if d in slowest else slice(*ranges[d]) for d in order)]
        return part.transpose([order.index(dimension) for dimension in range(len(order))])


@dataclass(frozen=True)
class Rule:
    """Parameters whose name ends with `pattern` (a regular expression) are stored as `layout` says."""

    pattern: str
    layout: str

    def matches(self, name: str) -> bool:
        """Whether this rule is for the parameter `name`, such as `model.layers.0.self_attn.q_proj.weight`."""
        return re.search(rf"(^|\.){self.pattern}$", name) is not None


def layout_of(name: str, num_dimensions: int, rules: Iterable[Rule]) -> Layout:
    """The layout of a parameter: that of the first rule that matches, else stored as used."""
    for rule in rules:
        if rule.matches(name):
            return Layout.parse(rule.layout)
    return Layout.identity(num_dimensions)
