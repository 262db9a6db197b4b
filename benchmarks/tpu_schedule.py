"""Read the static schedule that the TPU compiler dumps: loops, what they hold, and what spilled.

The compiler dumps two text files a kernel (`--xla_jf_dump_to=DIR --xla_jf_dump_llo_pass_label_regex=.*final.*`), seen
alike for v4, v5e, v5p, v6e and tpu7x. A bundle is what a core issues in one cycle, so the length of a loop's body is
the cycles of one trip, waits for memory left out.

`*-final_bundles.txt`, after a legend: one bundle a line, though a comment may run over several. Bundles are numbered
from 0 in hexadecimal; then a label (`LB` first bundle of a loop, `PF` where branches meet), then one `>` for each loop
around it, then instructions between braces. Empty bundles and some branches omit the `>`:

    0x5c LB: >>> { %v1 = vld [vmem:[#allocation2] sm:$0xff] } /* Start region 135 :: Start region 48 */
    0x83   : >>> { %235 = sbr.rel (!%p757_p4) target = $region135 }
    0x84   :  {}
    0x88 PF: >> { %s522_s13 = sadd.s32 2, %s4362_s6 } /* Start/End empty region 129 */

A branch names a region, and the region's first bundle says so in a comment: backwards it closes a loop, forwards it
skips a conditional part. Up to six bundles after a branch still run (one on v4, four on v5 and v6e, up to six on
tpu7x): they count to a loop, and to the part that is skipped, so lengths are exact to those few bundles.

`*-final_hlo-static-per-bundle-utilization.txt`: the units' names, their capacities, then one row a bundle with how many
of each it uses. `VLOAD:FILL` and `VSTORE:SPILL` are vector registers that did not fit:

    == CAPACTIY:
    MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
        2     2     4     2     1     3     3     2     2     2
    == UTILIZATION:
    0 0 0 0 0 1 0 0 0 2
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MATMUL_UNITS = ("MXU", "MATMUL", "MATPUSH")  # the matrix unit's name depends on the compiler's version
MAX_DELAY_SLOTS = 6

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(.*)", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"\bsbr\.\S+\s+(?:\(\S+\)\s+)?target = \$region(\d+)")
_ANY_BRANCH = re.compile(r"\bsbr\.")


@dataclass(frozen=True)
class Counts:
    """Bundles, and how often each unit is used in them."""

    bundles: int
    units: Mapping[str, int]

    @property
    def matmuls(self) -> int:
        """Uses of the matrix unit, loading weights into it included."""
        return sum(self.units.get(name, 0) for name in MATMUL_UNITS)

    @property
    def spills(self) -> int:
        return self.units["VSTORE:SPILL"]

    @property
    def fills(self) -> int:
        return self.units["VLOAD:FILL"]

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(self.bundles - other.bundles, {name: n - other.units[name] for name, n in self.units.items()})

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.bundles + other.bundles, {name: n + other.units[name] for name, n in self.units.items()})


@dataclass(frozen=True)
class Section:
    """Bundles `first` to `end` (exclusive) of a loop's body, inner loops left out of the counts.

    `sections` are the parts of it that a branch may skip.
    """

    first: int
    end: int
    counts: Counts
    sections: tuple["Section", ...]

    @property
    def unconditional(self) -> Counts:
        """What runs whenever this section does."""
        rest = self.counts
        for section in self.sections:
            rest -= section.counts
        return rest

    @property
    def main_path(self) -> Counts:
        """The cheapest way through that reaches the matrix unit.

        Where the unconditional part holds no matmuls, its alternatives do (one masked, one not): the shortest counts.
        """
        always = self.unconditional
        if always.matmuls:
            return always
        paths = [section.main_path for section in self.sections if section.main_path.matmuls]
        return always + min(paths, key=lambda path: path.bundles) if paths else always


@dataclass(frozen=True)
class Loop:
    """One loop; `depth` is 1 for an outermost one, `total` has inner loops once each, `body` has not."""

    depth: int
    total: Counts
    body: Section
    loops: tuple["Loop", ...]

    def all_loops(self) -> list["Loop"]:
        """This loop and those inside it, in the order of their first bundles."""
        return list(_walk((self,)))

    def innermost_matmul_loops(self) -> list["Loop"]:
        """This loop, or those inside it, that hold matmuls and no loop that does; in the order of the first bundles."""
        inside = [found for loop in self.loops for found in loop.innermost_matmul_loops()]
        return inside or ([self] if self.body.counts.matmuls else [])


@dataclass(frozen=True)
class Schedule:
    """A kernel's bundles and its loops, outermost first."""

    total: Counts
    capacities: Mapping[str, int]
    loops: tuple[Loop, ...]

    def all_loops(self) -> list[Loop]:
        """Every loop in the order of the first bundles."""
        return list(_walk(self.loops))


def read_schedule(directory: Path, kernel: str) -> Schedule:
    """The schedule of the kernel that `pallas_call` was given the name `kernel`.

    Raises:
        ValueError: there is not exactly one such kernel in the dump, or its files are not in the known format.
    """
    name = re.compile(rf"\d+-{re.escape(kernel)}(?:\.\d+)?-\d+-final_bundles\.txt")
    found = sorted(path for path in directory.iterdir() if name.fullmatch(path.name))
    if len(found) != 1:
        others = sorted({path.name.split("-", 1)[1] for path in directory.glob("*-final_bundles.txt")})
        raise ValueError(f"{len(found)} schedules of kernel {kernel!r} in {directory}; it has {', '.join(others)}")
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", found[0].name)
    tables = directory.glob("*-final_hlo-static-per-bundle-utilization.txt")
    (table,) = (path for path in tables if re.sub(r"-\d+-final_hlo.*$", "", path.name) == stem)
    return parse_schedule(found[0].read_text(), table.read_text())


def parse_schedule(bundles_text: str, utilization_text: str) -> Schedule:
    """The schedule in the text of both files.

    Raises:
        ValueError: either is not in the format that the module's docstring describes.
    """
    bundles = _parse_bundles(bundles_text)
    table = _parse_utilization(utilization_text)
    if len(table.rows) != len(bundles):
        raise ValueError(f"{len(bundles)} bundles but {len(table.rows)} rows of utilization")
    branches = _parse_branches(bundles)
    spans = _loop_spans(bundles, branches)
    loops = _nest(spans, branches, table)
    for loop in _walk(loops):
        header = bundles[loop.body.first]
        if header.depth != loop.depth:
            raise ValueError(f"loop at {header.address:#x} is drawn at depth {header.depth}, found at {loop.depth}")
    return Schedule(table.count(range(len(bundles))), table.capacities, loops)


@dataclass(frozen=True)
class _Bundle:
    address: int
    label: str | None
    depth: int
    text: str

    @property
    def is_empty(self) -> bool:
        return self.text.startswith("}")


@dataclass(frozen=True)
class _Utilization:
    capacities: Mapping[str, int]
    rows: Sequence[tuple[int, ...]]

    def count(self, addresses: Iterable[int]) -> Counts:
        kept = [self.rows[address] for address in addresses]
        sums = [sum(column) for column in zip(*kept, strict=True)] if kept else [0] * len(self.capacities)
        return Counts(len(kept), dict(zip(self.capacities, sums, strict=True)))


def _parse_bundles(text: str) -> list[_Bundle]:
    """Bundles in order; a line that starts none belongs to the comment of the one before."""
    joined: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            joined.append(line)
        elif joined:
            joined[-1] += "\n" + line
    bundles = []
    for expected, line in enumerate(joined):
        match = _BUNDLE.match(line)
        assert match is not None
        address, label, arrows, rest = match.groups()
        if int(address, 16) != expected:
            raise ValueError(f"bundle {address} where {expected:#x} was expected")
        bundles.append(_Bundle(expected, label, len(arrows), rest))
    if not bundles:
        raise ValueError("no bundles in the final_bundles dump")
    return bundles


def _parse_utilization(text: str) -> _Utilization:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 4 or not lines[0].startswith("== CAPA") or not lines[3].startswith("== UTILIZATION"):
        raise ValueError(f"the utilization dump does not begin with capacities and units: {lines[:4]}")
    names = [name.strip() for name in lines[1].split(",")]
    for needed in ("VLOAD:FILL", "VSTORE:SPILL"):
        if needed not in names:
            raise ValueError(f"the utilization dump has no column {needed}, only {', '.join(names)}")
    if not set(names) & set(MATMUL_UNITS):
        raise ValueError(f"the utilization dump has none of {', '.join(MATMUL_UNITS)}, only {', '.join(names)}")
    capacities, *rows = (tuple(map(int, line.split())) for line in (lines[2], *lines[4:]))
    if any(len(row) != len(names) for row in (capacities, *rows)):
        raise ValueError(f"a row of the utilization dump does not have its {len(names)} columns")
    return _Utilization(dict(zip(names, capacities, strict=True)), rows)


def _parse_branches(bundles: Sequence[_Bundle]) -> list[tuple[int, int]]:
    """(address, target) of every branch."""
    regions = {int(region): bundle.address for bundle in bundles for region in _REGION.findall(bundle.text)}
    # The exit's comment takes the place of its region's; on chips of two cores the idle one branches there at once.
    leave = bundles[-1].address if "/* exit bundle:" in bundles[-1].text and bundles[-1].label == "PF" else None
    branches = []
    for bundle in bundles:
        targets = [int(region) for region in _BRANCH.findall(bundle.text)]
        if len(targets) != len(_ANY_BRANCH.findall(bundle.text)):
            raise ValueError(f"bundle {bundle.address:#x} has a branch in an unknown form: {bundle.text[:200]}")
        for region in targets:
            target = regions.get(region, leave)
            if target is None:
                raise ValueError(f"bundle {bundle.address:#x} branches to region {region}, which starts nowhere")
            branches.append((bundle.address, target))
    return branches


def _loop_spans(bundles: Sequence[_Bundle], branches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, end) of every loop: from a backward branch's target to the last bundle that still runs after it."""
    ends: dict[int, int] = {}
    for address, target in branches:
        if target > address:
            continue
        end = address + 1
        while end < len(bundles) and end - address <= MAX_DELAY_SLOTS:
            after = bundles[end]
            if after.label or (not after.is_empty and after.depth < bundles[target].depth):
                break
            end += 1
        ends[target] = max(end, ends.get(target, 0))
    headers = {bundle.address for bundle in bundles if bundle.label in ("LB", "LH")}
    if headers != set(ends):
        unmatched = ", ".join(f"{address:#x}" for address in sorted(headers ^ set(ends)))
        raise ValueError(f"loop labels and backward branches disagree at {unmatched}")
    return sorted(ends.items())


def _nest(
    spans: Sequence[tuple[int, int]], branches: Sequence[tuple[int, int]], table: _Utilization, depth: int = 1
) -> tuple[Loop, ...]:
    """Loops of sorted spans, those inside another below it."""
    loops: list[Loop] = []
    rest = list(spans)
    while rest:
        (first, end), *rest = rest
        inner = [span for span in rest if span[0] < end]
        if any(inner_end > end for _, inner_end in inner):
            raise ValueError(f"the loop at {first:#x} and one inside it do not nest")
        rest = rest[len(inner) :]
        children = _nest(inner, branches, table, depth + 1)
        covered = {address for start, stop in inner for address in range(start, stop)}
        skips = [
            (address + 1, min(target, end))
            for address, target in branches
            if first <= address < end and address not in covered and target > address
        ]
        body = _section(first, end, skips, covered, table)
        loops.append(Loop(depth, table.count(range(first, end)), body, children))
    return tuple(loops)


def _section(first: int, end: int, skips: Sequence[tuple[int, int]], covered: set[int], table: _Utilization) -> Section:
    """The section of these bundles, with the parts of it that `skips` name nested as they lie."""
    sections: list[Section] = []
    rest = sorted(skips, key=lambda skip: (skip[0], -skip[1]))
    position = first
    while rest:
        (start, stop), *rest = rest
        # The jump from the end of a "then" over its "else" lies in the former's last bundles.
        start = max(start, position)
        if stop <= start:
            continue
        inner = [skip for skip in rest if skip[0] < stop and skip[1] <= stop]
        rest = [skip for skip in rest if skip not in inner]
        sections.append(_section(start, stop, inner, covered, table))
        position = stop
    counts = table.count(address for address in range(first, end) if address not in covered)
    return Section(first, end, counts, tuple(sections))


def _walk(loops: Iterable[Loop]) -> Iterable[Loop]:
    for loop in loops:
        yield loop
        yield from _walk(loop.loops)
