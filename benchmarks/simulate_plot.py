"""Simulated policies as a picture: what each serves well as the load grows, and how its latencies are distributed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from simulate_report import NUM_QUANTILES, Objectives, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, told apart by everyone
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

    loads = sorted({report.offered for report in reports})
    peak = max(reports, key=lambda report: report.goodput)
    figure = Figure(figsize=(11, 8 if len(loads) > 1 else 4.4), layout="constrained")
    panels = figure.subplots(2 if len(loads) > 1 else 1, 2, squeeze=False)
    if len(loads) > 1:
        _over_load(panels[0][0], panels[0][1], reports, objectives)
    shown = [report for report in reports if report.load == peak.load]
    _distribution(panels[-1][0], shown, "ttft_ms", objectives.ttft_ms, f"time to first token at {peak.load}")
    _distribution(panels[-1][1], shown, "tpot_ms", objectives.tpot_ms, f"time per output token at {peak.load}")
    for axes in panels.flat:
        axes.grid(color="0.9", which="major")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=140)


def _over_load(goodput: "Axes", first: "Axes", reports: Sequence[Report], objectives: Objectives) -> None:
    loads = sorted({report.offered for report in reports})
    goodput.plot(loads, loads, color="0.7", linestyle=":", label="all that is offered")
    for policy, color, marker in _styles(reports):
        points = sorted((r for r in reports if r.policy == policy), key=lambda report: report.offered)
        offered = [point.offered for point in points]
        look = {"color": color, "marker": marker, "markersize": 5}
        goodput.plot(offered, [point.goodput for point in points], label=policy, **look)
        first.plot(offered, [point.ttft_ms.percentiles.p99 for point in points], label=f"{policy}, p99", **look)
        medians = [point.ttft_ms.percentiles.p50 for point in points]
        first.plot(offered, medians, label=f"{policy}, p50", linestyle="--", markerfacecolor="white", **look)
    goodput.set(title="goodput", xlabel="requests offered a second", ylabel="requests a second within the objectives")
    goodput.set_ylim(bottom=0)
    first.set(title="time to first token", xlabel="requests offered a second", ylabel="ms", yscale="log")
    first.yaxis.set_major_formatter("{x:,.10g}")
    _mark(first.axhline, objectives.ttft_ms)


def _distribution(axes: "Axes", reports: Sequence[Report], name: str, objective: float, title: str) -> None:
    """Share of the requests, in percent, over the time that they took at most."""
    shares = [100 * step / NUM_QUANTILES for step in range(NUM_QUANTILES + 1)]
    for (policy, color, _), report in zip(_styles(reports), reports, strict=True):
        quantiles = report.ttft_ms.quantiles if name == "ttft_ms" else report.tpot_ms.quantiles
        if quantiles:
            axes.plot(quantiles, shares, color=color, label=policy)
    axes.set(title=title, xlabel="ms", ylabel="% of requests within", ylim=(0, 101))
    if name == "ttft_ms":  # spread over orders of magnitude
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    else:
        axes.set_xlim(left=0)
    _mark(axes.axvline, objective)


def _mark(line: object, objective: float) -> None:
    assert callable(line)
    if objective < float("inf"):
        line(objective, color="0.4", linewidth=1, linestyle=":", label=f"objective, {objective:g} ms")


def _styles(reports: Sequence[Report]) -> list[tuple[str, str, str]]:
    """(policy, color, marker), in the order given; more policies than colors share some."""
    policies = list(dict.fromkeys(report.policy for report in reports))
    return [(p, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, p in enumerate(policies)]
