"""vLLM's line about what the engine has done, every ten seconds while there is work."""

import asyncio
import logging
import time
from collections.abc import Callable

from jax_engine.core.stats import EngineStats

logger = logging.getLogger(__name__)

PERIOD = 10.0  # seconds


async def log_throughput(stats: Callable[[], EngineStats], *, period: float = PERIOD) -> None:
    """Log a line every `period` seconds in which something ran or waited, for good."""
    before, since = stats(), time.monotonic()
    while True:
        await asyncio.sleep(period)
        after, now = stats(), time.monotonic()
        fields = figures(before, after, now - since)
        if after.num_running or after.num_waiting or after.steps_total != before.steps_total:
            logger.info("%s", line(fields), extra={"fields": fields})
        before, since = after, now


def figures(before: EngineStats, after: EngineStats, seconds: float) -> dict[str, float]:
    """What is told of the time between two snapshots. Percentages are 0 where there is nothing to have a share of."""
    looked_up = after.prefix_cache_queries_total - before.prefix_cache_queries_total
    found = after.prefix_cache_hits_total - before.prefix_cache_hits_total
    drafted = after.spec_draft_tokens_total - before.spec_draft_tokens_total
    kept = after.spec_accepted_tokens_total - before.spec_accepted_tokens_total
    told: dict[str, float] = {
        "prompt_tokens_per_second": (after.prompt_tokens_total - before.prompt_tokens_total) / seconds,
        "generation_tokens_per_second": (after.generation_tokens_total - before.generation_tokens_total) / seconds,
        "running": after.num_running,
        "waiting": after.num_waiting,
        "kv_cache_usage_percent": 100 * after.kv_cache_usage,
        "prefix_cache_hit_percent": 100 * found / looked_up if looked_up else 0.0,
    }
    if drafted:
        told["accepted_drafts_percent"] = 100 * kept / drafted
    return {name: round(value, 1) for name, value in told.items()}


def line(fields: dict[str, float]) -> str:
    """The figures in vLLM's words."""
    drafts = fields.get("accepted_drafts_percent")
    return (
        f"Avg prompt throughput: {fields['prompt_tokens_per_second']:.1f} tokens/s, "
        f"Avg generation throughput: {fields['generation_tokens_per_second']:.1f} tokens/s, "
        f"Running: {fields['running']:.0f} reqs, Waiting: {fields['waiting']:.0f} reqs, "
        f"KV cache usage: {fields['kv_cache_usage_percent']:.1f}%, "
        f"Prefix cache hit rate: {fields['prefix_cache_hit_percent']:.1f}%"
    ) + ("" if drafts is None else f", Accepted drafts: {drafts:.1f}%")
