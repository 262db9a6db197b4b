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

    def of_last(self, count: int) -> "Layout":
        """The layout of what has the last `count` dimensions alone."""
        first = sum(map(len, self.groups)) - count
        groups = (tuple(dimension - first for dimension in group if dimension >= first) for group in self.groups)
        return Layout(tuple(filter(None, groups)))

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
    """Parameters whose name ends with `pattern` (a regular expression) are stored as `layout` says.

    If the checkpoint has another name for what matches, it is `stored`, in which `\\1` is the pattern's first group. In
    it, a `*` stands for the number of an expert: the parameter, with a first axis `experts`, is of a tensor for each.
    """

    pattern: str
    layout: str
    stored: str | None = None

    def matches(self, name: str) -> bool:
        """Whether this rule is for the parameter `name`, such as `model.layers.0.self_attn.q_proj.weight`."""
        return self._match(name) is not None

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of the parameter `name`, for which this rule is."""
        match = self._match(name)
        if match is None or self.stored is None:
            return name
        return name[: match.start()] + match.expand(self.stored)

    def _match(self, name: str) -> re.Match[str] | None:
        return re.search(rf"(?<![^.]){self.pattern}$", name)


# How the Qwens store the mixtures of `models/feed_forward.py`.
EXPERT_RULES = (
    Rule(r"mlp\.gate\.weight", "experts embed -> embed experts"),
    Rule(r"mlp\.experts\.(\w+)\.weight", "out in -> in out", r"mlp.experts.*.\1.weight"),
    Rule(r"mlp\.shared_expert\.\w+\.weight", "out in -> in out"),
    Rule(r"mlp\.shared_expert_gate\.weight", "one embed -> embed one"),
)


def layout_of(name: str, num_dimensions: int, rules: Iterable[Rule]) -> Layout:
    """The layout of a parameter: that of the first rule that matches, else stored as used."""
    rule = _rule_of(name, rules)
    return Layout.identity(num_dimensions) if rule is None else Layout.parse(rule.layout)


def stored_name(name: str, rules: Iterable[Rule]) -> str:
    """The checkpoint's name of a parameter: by the first rule that matches, else its own."""
    rule = _rule_of(name, rules)
    return name if rule is None else rule.stored_name(name)


def _rule_of(name: str, rules: Iterable[Rule]) -> Rule | None:
    return next((rule for rule in rules if rule.matches(name)), None)
