"""What a server's own metrics tell of the time between two readings of them."""

import re
from collections.abc import Mapping

from jax_engine.server.bench.client import RequestError, Target, get

# One line of Prometheus' text format; label values may hold anything but a bare quote.
SAMPLE = re.compile(r'(?P<name>[^\s{#]+)(?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? (?P<value>\S+)(?: \S+)?')
PART_LABEL = re.compile(r'\bpart="([^"]*)"')
HOST_PARTS = ("schedule", "pack", "launch", "collect", "wait")
GROWING = {
    "steps": "jax_engine:steps_total",
    "preemptions": "vllm:num_preemptions_total",
    "compiles in a request's path": "jax_engine:compiles_in_request_path_total",
}


async def metrics(target: Target) -> dict[str, float]:
    """The server's Prometheus samples; empty where it has none."""
    try:
        return parse_metrics(await get(target, "/metrics"))
    except RequestError:
        return {}


def parse_metrics(exposition: str) -> dict[str, float]:
    """Samples in Prometheus' text format by name, a label `part` kept as `name{part}` and all other labels added up."""
    totals: dict[str, float] = {}
    for line in exposition.splitlines():
        if (sample := SAMPLE.fullmatch(line)) is None:
            continue
        part = PART_LABEL.search(sample["labels"] or "")
        name = f"{sample['name']}{{{part[1]}}}" if part else sample["name"]
        totals[name] = totals.get(name, 0.0) + float(sample["value"])
    return totals


def server_figures(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Compile count, waste and host time between two readings of our own metrics; of a peer's, what they share."""
    growth = {name: value - before.get(name, 0.0) for name, value in after.items()}
    figures: dict[str, float] = {label: int(growth[name]) for label, name in GROWING.items() if name in growth}
    if "jax_engine:programs_compiled" in after:
        figures["programs compiled"] = int(after["jax_engine:programs_compiled"])
    if rows := growth.get("jax_engine:token_rows_total"):
        figures["padding, % of token rows"] = 100 * growth["jax_engine:padding_tokens_total"] / rows
    if room := growth.get("jax_engine:kv_page_room_sampled_total"):
        figures["KV page waste, mean %"] = 100 * growth["jax_engine:kv_page_waste_sampled_total"] / room
    if steps := growth.get("jax_engine:steps_total"):
        for part in HOST_PARTS:
            figures[f"host {part}, us/step"] = 1e6 * growth[f"jax_engine:host_seconds_total{{{part}}}"] / steps
    return figures
