"""A plan, and a comparison of several, in text."""

from collections.abc import Sequence

from jax_engine.compilation.memory_check import gib
from jax_engine.plan.compare import Impossible
from jax_engine.plan.figures import ANALYTIC, Plan, PlannedStep


def plan_text(plan: Plan) -> str:
    """All of one plan, for people."""
    replicas = f", {plan.replicas} replicas" if plan.replicas > 1 else ""
    head = f"{plan.model} on {plan.device} ({plan.devices}{replicas}): {plan.strategy}, {plan.mesh}, {plan.dtype}; "
    head += f"figures {'by arithmetic' if plan.basis == ANALYTIC else f'of {plan.basis}'}"
    parts = [[head], _verdict(plan), _memory(plan)]
    if plan.compiled:
        parts += [_capacity(plan), _steps(plan)]
    if plan.bounds is not None:
        parts.append(_bounds(plan))
    parts.append(_programs(plan))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return [f"fits; what binds is {plan.binds}"]
    return ["does not fit: " + "; ".join(plan.problems), *(f"  - {remedy}" for remedy in plan.remedies)]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = [
        ("weights", memory.weights),
        ("state of steps", memory.state),
        ("temporaries, about", memory.temporaries),
        ("KV pages", plan.num_pages * memory.page),
        ("usable", plan.usable_bytes),
    ]
    return ["memory of each device", *(f"  {name:<24}{gib(size):>12}" for name, size in rows)]


def _capacity(plan: Plan) -> list[str]:
    lines = [f"capacity: {plan.num_pages:,} pages of {plan.memory.page_tokens} tokens on each device"]
    for context, count in plan.sequences.items():
        bound = f" ({plan.max_num_seqs} run at once)" if count > plan.max_num_seqs else ""
        lines.append(f"  {count:>8,} sequences of {context:,} tokens{bound}")
    return lines


def _steps(plan: Plan) -> list[str]:
    lines = ["a step of each device"]
    for name, step in plan.steps.items():
        load = step.load
        what = f"{load.num_sequences} sequences, {load.new_tokens} new tokens each behind {load.past_tokens}"
        lines.append(f"  {name}: {what}")
        lines.append(
            f"    {step.flops / 1e12:.3g} TFLOP, {gib(step.moved_bytes)} to and from memory, "
            f"{gib(step.sent_bytes)} sent by {_exchanges(step)}"
        )
        if (time := step.time) is not None:
            lines.append(
                f"    compute {ms(time.compute)}, memory {ms(time.memory)}, communication {ms(time.communication)}: "
                f"{ms(time.total)} at least, bound by {time.binds}"
            )
    return lines


def _exchanges(step: PlannedStep) -> str:
    return ", ".join(f"{count:g} {opcode}" for opcode, count in sorted(step.collectives.items())) or "no collectives"


def _bounds(plan: Plan) -> list[str]:
    bounds = plan.bounds
    assert bounds is not None
    return [
        "no server can beat, by these figures",
        f"  time to first token     {ms(bounds.ttft):>12}  a prompt alone",
        f"  time per output token   {ms(bounds.tpot):>12}  {bounds.requests_at_once} requests at once",
        f"  output tokens a second  {bounds.output_tokens_per_second:>12,.0f}",
    ]


def _programs(plan: Plan) -> list[str]:
    lines = []
    for one in plan.compiled:
        off = one.predicted_bytes / one.argument_bytes - 1
        lines.append(
            f"compiled {one.program} in {one.seconds:.0f} s: {gib(one.argument_bytes)} of arguments (arithmetic: "
            f"{off:+.2%}), {gib(one.temporary_bytes)} of temporaries, {gib(one.code_bytes)} of code"
        )
    if not plan.compiled:
        lines.append("nothing was compiled: arithmetic alone says that it does not fit")
    return [*lines, *(f"note: {note}" for note in plan.notes)]


HEADINGS = (
    "device", "strategy", "mesh", "fits", "weights", "sequences", "TTFT ms", "TPOT ms", "compute", "memory",
    "exchange", "tokens/s", "binds", "by",
)  # fmt: skip


def comparison_text(rows: Sequence[Plan | Impossible]) -> str:
    """A table, and under it why some rows have no figures. `sequences` are those of the longest context that fit;
    compute, memory and exchange are parts of TPOT, in ms; `by` says whose figures they are.
    """
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for row in rows:
        if isinstance(row, Impossible):
            lines.append(f"{row.strategy} on {row.device}: {row.reason}")
        elif not row.fits:
            lines.append(f"{row.strategy} on {row.device}: {'; '.join(row.problems)}")
    notes = {note: None for row in rows if isinstance(row, Plan) for note in row.notes}
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _cells(row: Plan | Impossible) -> tuple[str, ...]:
    if isinstance(row, Impossible):
        return row.device, row.strategy, row.mesh, "impossible", *("-" for _ in HEADINGS[4:])
    decode = row.steps.get("decode")
    time, bounds = decode and decode.time, row.bounds
    found = [row.device, row.strategy, row.mesh, "yes" if row.fits else "no", gib(row.memory.weights)]
    found.append(f"{row.sequences[row.max_model_len]:,}")
    found.append("-" if bounds is None else f"{1e3 * bounds.ttft:.1f}")
    found += ["-"] * 4 if not time else [f"{1e3 * part:.2f}" for part in (time.total, time.compute, time.memory)]
    found += [] if not time else [f"{1e3 * time.communication:.2f}"]
    found.append("-" if bounds is None else f"{bounds.output_tokens_per_second:,.0f}")
    return (*found, row.binds, row.basis)


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
