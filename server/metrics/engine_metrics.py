"""The metrics of one engine: vLLM's names, labels and bucket bounds for what exists here, and our own under
`jax_engine:`.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from jax_engine.config import EngineConfig
from jax_engine.core.stats import STEP_TOKEN_BOUNDS, EngineStats
from jax_engine.outputs import RequestMetrics
from jax_engine.pooling_params import RequestParams
from jax_engine.server.metrics.cells import CellMemory
from jax_engine.server.metrics.histogram import Histogram, one_two_five

FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
# What `vllm:cache_config_info` shows of the engine's settings.
CACHE_SETTINGS = ("enable_prefix_caching", "gpu_memory_utilization", "prefix_caching_hash_algo", "swap_space")
COMPLETIONS_BOUNDS = (1, 2, 5, 10, 20)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
# vLLM ends its token-count bounds at the model's context, which is unknown until the engine is up; this holds any.
TOKEN_COUNT_LIMIT = 2 * 10**6
LABELS = ("model_name", "engine")


class EngineMetrics:
    """What is shown of one replica's engine. Mutable; owned by `Metrics`."""

    def __init__(self, model_name: str, engine: int, memory: CellMemory, config: EngineConfig) -> None:
        """`engine` is the replica's number, vLLM's label; `config` is what `vllm:cache_config_info` tells of."""
        self._config = config
        self.time_to_first_token = Histogram(FIRST_TOKEN_BOUNDS, memory)
        self.inter_token_latency = Histogram(TOKEN_GAP_BOUNDS, memory)
        self.request_time_per_output_token = Histogram(TOKEN_GAP_BOUNDS, memory)
        self.e2e_request_latency = Histogram(REQUEST_BOUNDS, memory)
        self.request_queue_time = Histogram(REQUEST_BOUNDS, memory)
        self.request_inference_time = Histogram(REQUEST_BOUNDS, memory)
        self.request_prefill_time = Histogram(REQUEST_BOUNDS, memory)
        self.request_decode_time = Histogram(REQUEST_BOUNDS, memory)
        self.request_prompt_tokens = Histogram(one_two_five(TOKEN_COUNT_LIMIT), memory)
        self.request_generation_tokens = Histogram(one_two_five(TOKEN_COUNT_LIMIT), memory)
        self.request_params_max_tokens = Histogram(one_two_five(TOKEN_COUNT_LIMIT), memory)
        self.request_max_num_generation_tokens = Histogram(one_two_five(TOKEN_COUNT_LIMIT), memory)
        self.request_prefill_kv_computed_tokens = Histogram(one_two_five(TOKEN_COUNT_LIMIT), memory)
        self.request_params_n = Histogram(COMPLETIONS_BOUNDS, memory)
        self.stats = EngineStats()  # replaced by the latest snapshot before each rendering
        self._finished = memory.take(len(FINISH_REASONS))
        self._labels = (model_name, str(engine))

    def count_finished(self, finish_reason: str) -> None:
        """One completion has ended."""
        self._finished.own[FINISH_REASONS.index(finish_reason)] += 1

    def observe_finished(
        self,
        params: RequestParams,
        times: RequestMetrics,
        now: float,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: Collection[int],
    ) -> None:
        """One prompt and all its completions, of so many tokens each, have ended."""
        total_output_tokens = sum(output_tokens)
        self.request_max_num_generation_tokens.observe(max(output_tokens, default=0))
        self.request_prefill_kv_computed_tokens.observe(prompt_tokens - cached_tokens)
        self.e2e_request_latency.observe(now - times.arrival_time)
        self.request_prompt_tokens.observe(prompt_tokens)
        self.request_generation_tokens.observe(total_output_tokens)
        self.request_params_n.observe(params.n)
        if params.max_tokens is not None:
            self.request_params_max_tokens.observe(params.max_tokens)
        scheduled, first, last = times.first_scheduled_time, times.first_token_time, times.last_token_time
        if scheduled is None or first is None or last is None:  # aborted before its first token
            return
        self.request_queue_time.observe(scheduled - times.arrival_time)
        self.request_inference_time.observe(last - scheduled)
        self.request_prefill_time.observe(first - scheduled)
        self.request_decode_time.observe(last - first)
        tokens_each = total_output_tokens / params.n
        if tokens_each > 1:
            self.request_time_per_output_token.observe((last - first) / (tokens_each - 1))

    def collect(self) -> Iterator[Metric]:
        """The families, each with this engine's samples, with the counters as of `stats`."""
        yield from self._engine_gauges()
        yield from self._engine_counters()
        yield from self._prompt_sources()
        yield from self._speculation()
        yield from self._histograms()
        finished = CounterMetricFamily(
            "vllm:request_success", "Completions that ended, by reason.", labels=(*LABELS, "finished_reason")
        )
        for index, reason in enumerate(FINISH_REASONS):
            finished.add_metric((*self._labels, reason), self._finished.total(index))
        yield finished
        host = CounterMetricFamily("jax_engine:host_seconds", "Host time of steps.", labels=(*LABELS, "part"))
        times = self.stats.host_time
        parts = {"schedule": times.schedule, "pack": times.pack, "launch": times.launch, "wait": times.wait}
        for part, microseconds in {**parts, "collect": times.collect}.items():
            host.add_metric((*self._labels, part), microseconds / 1e6)
        yield host

    def _engine_gauges(self) -> Iterator[Metric]:
        stats = self.stats
        in_pages = stats.num_pages_in_use * stats.page_size
        gauges = {
            "vllm:num_requests_running": ("Sequences in the running batch.", stats.num_running),
            "vllm:num_requests_waiting": ("Sequences waiting for pages or a slot.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of KV pages in use; 1 is all.", stats.kv_cache_usage),
            "jax_engine:kv_pages": ("KV pages.", stats.num_pages),
            "jax_engine:kv_pages_in_use": ("KV pages that sequences hold.", stats.num_pages_in_use),
            "jax_engine:kv_page_waste": (
                "Share of the pages in use that holds no token.",
                1 - stats.num_tokens_in_pages / in_pages if in_pages else 0.0,
            ),
            "jax_engine:host_pages": ("KV pages that host memory has room for.", stats.num_host_pages),
            "jax_engine:host_pages_in_use": ("KV pages in host memory.", stats.num_host_pages_in_use),
            "jax_engine:programs_compiled": ("Step programs ready.", stats.programs_compiled),
            "jax_engine:programs_planned": ("Step programs there will be.", stats.programs_planned),
            "jax_engine:compile_eta_seconds": (
                "Seconds until the last step program is ready, by the pace so far; 0: none is being compiled.",
                stats.compile_eta_seconds,
            ),
        }
        yield from self._families(GaugeMetricFamily, gauges)
        about_cache = {
            "block_size": stats.page_size,
            "num_gpu_blocks": stats.num_pages,
            "cache_dtype": self._config.kv_cache_dtype,
            **{name: getattr(self._config, name) for name in CACHE_SETTINGS},
        }
        cache = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=(*LABELS, *about_cache))
        cache.add_metric((*self._labels, *map(str, about_cache.values())), 1)
        yield cache

    def _engine_counters(self) -> Iterator[Metric]:
        stats = self.stats
        counters = {
            "vllm:prompt_tokens": (
                "Prompt tokens processed: recomputed ones included, cached ones not.",
                stats.prompt_tokens_total,
            ),
            "vllm:prefix_cache_queries": (
                "Tokens looked up in the prefix cache.",
                stats.prefix_cache_queries_total,
            ),
            "vllm:prefix_cache_hits": (
                "Tokens found in the prefix cache's pages on the device.",
                stats.prefix_cache_hits_total,
            ),
            "vllm:external_prefix_cache_queries": (
                "Tokens looked up in host memory, since the device's pages did not hold them.",
                stats.host_cache_queries_total,
            ),
            "vllm:external_prefix_cache_hits": ("Tokens found in host memory.", stats.host_cache_hits_total),
            "jax_engine:saved_pages": ("KV pages copied to host memory.", stats.saved_pages_total),
            "jax_engine:loaded_pages": ("KV pages copied back to the device.", stats.loaded_pages_total),
            "jax_engine:copied_pages": (
                "Shared KV pages copied because one of their sequences was to write them.",
                stats.copied_pages_total,
            ),
            "jax_engine:kv_page_room_sampled": (
                "Tokens that the pages in use have room for, summed over every few steps.",
                stats.page_room_sampled_total,
            ),
            "jax_engine:kv_page_waste_sampled": (
                "What of kv_page_room_sampled held no token: the ratio is the mean waste.",
                stats.page_waste_sampled_total,
            ),
            "jax_engine:recomputed_tokens": (
                "Tokens computed once more after a preemption.",
                stats.recomputed_tokens_total,
            ),
            "vllm:generation_tokens": ("Tokens generated.", stats.generation_tokens_total),
            "vllm:num_preemptions": ("Times a sequence lost its pages to another.", stats.preemptions_total),
            "jax_engine:requests_refused": (
                "Sequences refused because max_num_queued_reqs were in flight.",
                stats.refused_requests_total,
            ),
            "jax_engine:steps": ("Engine steps.", stats.steps_total),
            "jax_engine:padding_tokens": ("Token rows of steps that held no token.", stats.padding_tokens_total),
            "jax_engine:token_rows": ("Token rows of steps, padding included.", stats.token_rows_total),
            "jax_engine:compile_seconds": ("Time spent compiling, in all threads.", stats.compile_seconds_total),
            "jax_engine:compiles_in_request_path": (
                "Compiles that a request waited for; stays 0.",
                stats.compiles_in_request_path_total,
            ),
        }
        yield from self._families(CounterMetricFamily, counters)

    def _families(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        figures: Mapping[str, tuple[str, float]],
    ) -> Iterator[Metric]:
        """One figure of this engine each, by name, with what it says."""
        for name, (text, value) in figures.items():
            family = kind(name, text, labels=LABELS)
            family.add_metric(self._labels, value)
            yield family

    def _prompt_sources(self) -> Iterator[Metric]:
        stats = self.stats
        sources = {
            "local_compute": stats.prompt_tokens_total,
            "local_cache_hit": stats.prefix_cache_hits_total,
            "external_kv_transfer": stats.host_cache_hits_total,
        }
        family = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens computed, found in the device's pages, and loaded from host memory.",
            labels=(*LABELS, "source"),
        )
        for source, value in sources.items():
            family.add_metric((*self._labels, source), value)
        yield family

    def _speculation(self) -> Iterator[Metric]:
        stats = self.stats
        accepted = stats.spec_accepted_tokens_per_position_total
        if not accepted:  # no speculative decoding
            return
        counters = {
            "vllm:spec_decode_num_drafts": (
                "Times that a sequence had drafted tokens in a step.",
                stats.spec_drafts_total,
            ),
            "vllm:spec_decode_num_draft_tokens": ("Drafted tokens.", stats.spec_draft_tokens_total),
            "vllm:spec_decode_num_accepted_tokens": (
                "Drafted tokens that were kept.",
                stats.spec_accepted_tokens_total,
            ),
        }
        yield from self._families(CounterMetricFamily, counters)
        by_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were kept, by their place among those of a step.",
            labels=(*LABELS, "position"),
        )
        for position, value in enumerate(accepted):
            by_position.add_metric((*self._labels, str(position)), value)
        yield by_position

    def _histograms(self) -> Iterator[Metric]:
        histograms = {
            "vllm:time_to_first_token_seconds": ("Arrival to first token.", self.time_to_first_token),
            "vllm:inter_token_latency_seconds": ("Time between tokens of a completion.", self.inter_token_latency),
            "vllm:request_time_per_output_token_seconds": (
                "Mean time per token after the first, one observation a request.",
                self.request_time_per_output_token,
            ),
            "vllm:e2e_request_latency_seconds": ("Arrival to last token sent.", self.e2e_request_latency),
            "vllm:request_queue_time_seconds": ("Arrival to first step.", self.request_queue_time),
            "vllm:request_inference_time_seconds": ("First step to last token.", self.request_inference_time),
            "vllm:request_prefill_time_seconds": ("First step to first token.", self.request_prefill_time),
            "vllm:request_decode_time_seconds": ("First token to last token.", self.request_decode_time),
            "vllm:request_prompt_tokens": ("Tokens of a prompt.", self.request_prompt_tokens),
            "vllm:request_generation_tokens": ("Tokens generated for a prompt.", self.request_generation_tokens),
            "vllm:request_max_num_generation_tokens": (
                "Tokens of a prompt's longest completion.",
                self.request_max_num_generation_tokens,
            ),
            "vllm:request_prefill_kv_computed_tokens": (
                "Tokens of a prompt that were not found in the prefix cache.",
                self.request_prefill_kv_computed_tokens,
            ),
            "vllm:request_params_max_tokens": ("max_tokens of requests.", self.request_params_max_tokens),
            "vllm:request_params_n": ("n of requests.", self.request_params_n),
        }
        for name, (text, histogram) in histograms.items():
            family = HistogramMetricFamily(name, text, labels=LABELS)
            family.add_metric(self._labels, histogram.cumulative(), histogram.total)
            yield family
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens that a step processes.", labels=LABELS)
        bounds = (*(repr(float(bound)) for bound in STEP_TOKEN_BOUNDS), "+Inf")
        buckets = list(zip(bounds, accumulate(self.stats.steps_by_tokens_total), strict=True))
        steps.add_metric(self._labels, buckets, self.stats.token_rows_total - self.stats.padding_tokens_total)
        yield steps
