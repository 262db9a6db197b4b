"""Simulated policies as a picture: what each serves well as the load grows, and how its latencies are distributed."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulate_report import NUM_QUANTILES, Objectives, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, told apart by everyone
PLAIN = "{x:,.10g}"  # of numbers on logarithmic axes
MARKERS = ("o", "s", "^", "D", "v", "P")


def check_plot(path: Path) -> None:
    """Refuse what `draw` could not write, before hours of simulation.

    Raises:
        ValueError: the ending is none of `FORMATS`, or matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ValueError('a plot needs matplotlib: pip install "jax-engine[bench]", or leave the plot out')


def draw(path: Path, reports: Sequence[Report], objectives: Objectives, title: str) -> None:
    """Write the picture: distributions at the load where some policy's goodput is highest; with several loads, goodput
    and first tokens over the load too.
    """
    from matplotlib.figure import Figure

    has_curves = len({report.offered for report in reports}) > 1
    peak = max(reports, key=lambda report: report.goodput)
    figure = Figure(figsize=(11, 8.4 if has_curves else 4.6), layout="constrained")
    panels = figure.subplots(2 if has_curves else 1, 2, squeeze=False)
    if has_curves:
        _over_load(panels[0][0], panels[0][1], reports, objectives)
    shown = [report for report in reports if report.load == peak.load]
    ttft, tpot = ([getattr(report, name).quantiles for report in shown] for name in ("ttft_ms", "tpot_ms"))
    _distribution(panels[-1][0], shown, ttft, objectives.ttft_ms, f"time to first token at {peak.load}")
    panels[-1][0].set(xscale="log")  # spread over orders of magnitude
    panels[-1][0].xaxis.set_major_formatter(PLAIN)
    _distribution(panels[-1][1], shown, tpot, objectives.tpot_ms, f"time per output token at {peak.load}")
    panels[-1][1].set_xlim(left=0)
    for axes in panels.flat:
        axes.grid(color="0.9", which="major")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    # Of equal names the first panel's counts, which has markers.
    entries = [axes.get_legend_handles_labels() for axes in panels.flat[::-1]]
    named = {label: handle for handles, labels in entries for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=140)


def _over_load(goodput: "Axes", first: "Axes", reports: Sequence[Report], objectives: Objectives) -> None:
    loads = sorted({report.offered for report in reports})
    goodput.plot(loads, loads, color="0.6", label="all that is offered")
    for policy, color, marker in _styles(reports):
        points = sorted((r for r in reports if r.policy == policy), key=lambda report: report.offered)
        offered = [point.offered for point in points]
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        goodput.plot(offered, [point.goodput for point in points], label=policy, **look)
        first.plot(offered, [point.ttft_ms.percentiles.p99 for point in points], **look)
        medians = [point.ttft_ms.percentiles.p50 for point in points]
        first.plot(offered, medians, linestyle="--", markerfacecolor="white", **look)
    goodput.set(title="goodput", xlabel="requests offered a second", ylabel="requests a second within the objectives")
    goodput.set_ylim(bottom=0)
    first.set(title="time to first token: p99, and p50 dashed", xlabel="requests offered a second", ylabel="ms")
    first.set(yscale="log")
    first.yaxis.set_major_formatter(PLAIN)
    _mark(first.axhline, objectives.ttft_ms)


def _distribution(
    axes: "Axes", reports: Sequence[Report], quantiles: Sequence[Sequence[float]], objective: float, title: str
) -> None:
    """Share of the requests, in percent, over the time that they took at most."""
    for (policy, color, _), values in zip(_styles(reports), quantiles, strict=True):
        shares = [100 * step / NUM_QUANTILES for step in range(len(values))]
        axes.plot(values, shares, color=color, label=policy)
    axes.set(title=title, xlabel="ms", ylabel="% of requests within", ylim=(0, 101))
    _mark(axes.axvline, objective)


def _mark(line: Callable[..., object], objective: float) -> None:
    if objective < math.inf:
        line(objective, color="0.3", linewidth=1, linestyle=":", label="objective")


def _styles(reports: Sequence[Report]) -> list[tuple[str, str, str]]:
    """(policy, color, marker), in the order given; more policies than colors share some."""
    policies = list(dict.fromkeys(report.policy for report in reports))
    return [(p, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, p in enumerate(policies)]
