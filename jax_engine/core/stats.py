"""Counters of the engine core: plain, cumulative, cheap to keep, and sent with every few steps."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import msgspec

# Upper bounds of vLLM's histogram of tokens that a step processes.
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class HostTime(msgspec.Struct, array_like=True, frozen=True):
    """Cumulative host microseconds a step's parts took, and over how many steps. `wait` is time blocked on the
    device: not host work.
    """

    steps: int = 0
    schedule: float = 0.0
    pack: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    collect: float = 0.0


class EngineStats(msgspec.Struct, array_like=True, frozen=True):
    """A snapshot. Counters (`*_total`) only grow; the rest are gauges."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_pages_in_use: int = 0
    # Of num_pages_in_use * page_size, shared ones once: the rest is page waste. A token counts in each cache group, as
    # long as one to come sees it there.
    num_tokens_in_pages: int = 0
    page_size: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0  # processed by a step: recomputation included, cached tokens not
    prefix_cache_queries_total: int = 0  # tokens of requests as they first ran, with prefix caching
    prefix_cache_hits_total: int = 0  # those of them that the device's pages held
    num_host_pages: int = 0
    num_host_pages_in_use: int = 0
    host_cache_queries_total: int = 0  # tokens looked up that the device's pages did not hold, with a host tier
    host_cache_hits_total: int = 0  # those of them that came from host memory
    saved_pages_total: int = 0  # copied from the device to host memory
    loaded_pages_total: int = 0  # copied back
    copied_pages_total: int = 0  # copied on the device, before one of the sequences that shared them wrote them
    recomputed_tokens_total: int = 0  # computed once more after a preemption
    page_room_sampled_total: int = 0  # tokens that pages in use have room for, summed over every few steps
    page_waste_sampled_total: int = 0  # what of it held none: the mean waste is the ratio of the two
    generation_tokens_total: int = 0
    padding_tokens_total: int = 0  # token rows of step programs that held no token
    token_rows_total: int = 0  # token rows of step programs, padding included
    preemptions_total: int = 0
    finished_requests_total: dict[str, int] = {}  # by finish reason
    refused_requests_total: int = 0  # sequences that max_num_queued_reqs had no room for
    programs_compiled: int = 0
    programs_planned: int = 0
    compile_eta_seconds: float = 0.0  # until the last step program is ready; 0 when nothing is being compiled
    compile_seconds_total: float = 0.0  # of all compile threads together
    compiles_in_request_path_total: int = 0
    spec_drafts_total: int = 0  # times that a sequence had drafted tokens in a step
    spec_draft_tokens_total: int = 0
    # How often the drafted token at a position, and all before it, was kept; empty without speculative decoding.
    spec_accepted_tokens_per_position_total: tuple[int, ...] = ()
    host_time: HostTime = HostTime()
    # Steps by the tokens that they processed: one count for each of STEP_TOKEN_BOUNDS, and one for more.
    steps_by_tokens_total: tuple[int, ...] = (0,) * (len(STEP_TOKEN_BOUNDS) + 1)
    running_adapters: tuple[str, ...] = ()  # names, sorted, with LoRA
    waiting_adapters: tuple[str, ...] = ()

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return self.num_pages_in_use / self.num_pages if self.num_pages else 0.0

    @property
    def spec_accepted_tokens_total(self) -> int:
        """Drafted tokens that were kept."""
        return sum(self.spec_accepted_tokens_per_position_total)

    @property
    def padding_share(self) -> float:
        """Share of all token rows so far that were padding, 0 to 1."""
        return self.padding_tokens_total / self.token_rows_total if self.token_rows_total else 0.0


def total(stats: Sequence[EngineStats]) -> EngineStats:
    """Those of several engines together: sums, the longest time to go, all adapters."""
    first, *others = stats
    names = EngineStats.__struct_fields__
    for other in others:
        first = EngineStats(**{name: _joined(name, getattr(first, name), getattr(other, name)) for name in names})
    return first


def _joined(name: str, one: Any, other: Any) -> Any:
    if name in ("page_size", "compile_eta_seconds"):
        return max(one, other)
    if isinstance(one, HostTime):
        return HostTime(*(getattr(one, part) + getattr(other, part) for part in HostTime.__struct_fields__))
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
    if name in ("running_adapters", "waiting_adapters"):
        return tuple(sorted({*one, *other}))
    if isinstance(one, tuple):
        return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))
    return one + other
