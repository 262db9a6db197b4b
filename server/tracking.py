"""What happens to one HTTP request and to each of its prompts, kept for its log line, its usage and the metrics."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from jax_engine.lora_request import LoRARequest
from jax_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jax_engine.pooling_params import RequestParams
from jax_engine.server.metrics.engine_metrics import EngineMetrics
from jax_engine.server.metrics.metrics import Metrics
from jax_engine.server.openai.reasoning_tokens import ReasoningCounter


class HasReplica(Protocol):
    """A stream of outputs."""

    @property
    def replica(self) -> int:
        """That they come from."""


class PromptTracker:
    """Counts one prompt's outputs on their way to the client. Mutable; owned by the handler of its request."""

    def __init__(
        self,
        metrics: Metrics,
        params: RequestParams,
        counter: ReasoningCounter | None = None,
        stream: HasReplica | None = None,
    ) -> None:
        """`counter` counts the reasoning of answers that may have some; `stream` says which replica gives the outputs,
        the first one if it is left out.
        """
        self.num_reasoning_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.output_tokens: Counter[int] = Counter()  # by completion
        self.first_token_time: float | None = None
        self.finish_reasons: dict[int, str] = {}
        self._all_metrics = metrics
        self._stream = stream
        self.params = params
        self._times: RequestMetrics | None = None  # the latest
        self._token_times: dict[int, float] = {}  # of each completion's latest token
        self._closed = False
        self._counter = counter
        self._texts: dict[int, list[str]] = {}  # of each completion that may have reasoning, and its tokens
        self._token_ids: dict[int, list[int]] = {}

    @property
    def num_output_tokens(self) -> int:
        """Of all completions."""
        return self.output_tokens.total()

    @property
    def _metrics(self) -> EngineMetrics:
        return self._all_metrics.engines[0 if self._stream is None else self._stream.replica]

    def take(self, output: RequestOutput) -> None:
        """Count an output that is about to be sent."""
        self.num_prompt_tokens = len(output.prompt_token_ids)
        self.num_cached_tokens = output.num_cached_tokens
        times = output.metrics
        assert times is not None
        self._times = times
        if self.first_token_time is None and times.first_token_time is not None:
            self.first_token_time = times.first_token_time
            self._metrics.time_to_first_token.observe(times.first_token_time - times.arrival_time)
        now = time.monotonic()
        for completion in output.outputs:
            self.output_tokens[completion.index] += len(completion.token_ids)
            self._observe_gaps(completion, times, now)
            self._count_reasoning(completion)
            if completion.finish_reason is not None and completion.index not in self.finish_reasons:
                self.finish_reasons[completion.index] = completion.finish_reason
                self._metrics.count_finished(completion.finish_reason)
        if output.finished:
            self._closed = True
            self._metrics.observe_finished(
                self.params,
                times,
                now,
                prompt_tokens=self.num_prompt_tokens,
                cached_tokens=self.num_cached_tokens,
                output_tokens=self.output_tokens.values(),
            )

    def latencies(self) -> dict[str, float]:
        """Seconds that the prompt and its completions spent, by vLLM's names; empty before the first token."""
        times = self._times
        if times is None:
            return {}
        scheduled, first, last = times.first_scheduled_time, times.first_token_time, times.last_token_time
        if scheduled is None or first is None or last is None:
            return {}
        return {
            "time_in_queue": scheduled - times.arrival_time,
            "time_in_model_prefill": first - scheduled,
            "time_in_model_decode": last - first,
            "time_in_model_inference": last - scheduled,
        }

    def close(self) -> None:
        """Count what was dropped: completions that never ended, because the client left or the engine failed."""
        if not self._closed:
            self._closed = True
            for _ in range(self.params.n - len(self.finish_reasons)):
                self._metrics.count_finished("abort")

    def refuse(self) -> None:
        """Count nothing: the engine did not take the prompt."""
        self._closed = True

    def _count_reasoning(self, completion: CompletionOutput) -> None:
        if self._counter is None:
            return
        texts = self._texts.setdefault(completion.index, [])
        token_ids = self._token_ids.setdefault(completion.index, [])
        texts.append(completion.text)
        token_ids += completion.token_ids
        if completion.finish_reason is not None:
            self.num_reasoning_tokens += self._counter.count("".join(texts), token_ids)
            del self._texts[completion.index], self._token_ids[completion.index]

    def _observe_gaps(self, completion: CompletionOutput, times: RequestMetrics, now: float) -> None:
        """Time between tokens. Those that come together, or all at the end of an unstreamed answer, share it evenly."""
        num_new = len(completion.token_ids)
        if not num_new:
            return
        previous = self._token_times.get(completion.index)
        if previous is not None:
            self._metrics.inter_token_latency.observe((now - previous) / num_new, num_new)
        elif num_new > 1 and times.first_token_time is not None and times.last_token_time is not None:
            gap = (times.last_token_time - times.first_token_time) / (num_new - 1)
            self._metrics.inter_token_latency.observe(gap, num_new - 1)
        self._token_times[completion.index] = now


@dataclass
class RequestRecord:
    """One HTTP request, for its log line. Mutable; owned by the `Gate`, filled in by the handlers."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    trackers: list[PromptTracker] = field(default_factory=list)
    note: str | None = None  # why it did not end as it should
    adapter: LoRARequest | None = None  # that its `model` named
    counter: ReasoningCounter | None = None  # where answers may have reasoning

    def usage(self) -> dict[str, Any]:
        """OpenAI's token counts, all prompts together; a prompt counts once however many completions it has."""
        prompt_tokens = sum(tracker.num_prompt_tokens for tracker in self.trackers)
        output_tokens = sum(tracker.num_output_tokens for tracker in self.trackers)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(tracker.num_cached_tokens for tracker in self.trackers)},
        }
        if self.counter is not None:  # of completions that have ended
            reasoning = sum(tracker.num_reasoning_tokens for tracker in self.trackers)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage

    def fields(self, method: str, path: str, status: int | None) -> dict[str, Any]:
        """What the log says of the request, where there is something to say. Times are in seconds."""
        fields: dict[str, Any] = {
            "method": method,
            "path": path,
            "status": status,
            "request_id": self.request_id,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        if self.trackers:
            usage = self.usage()
            fields |= {"prompt_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
            firsts = [tracker.first_token_time for tracker in self.trackers if tracker.first_token_time is not None]
            if firsts:
                fields["first_token"] = round(min(firsts) - self.started, 3)
            reasons = {reason for tracker in self.trackers for reason in tracker.finish_reasons.values()}
            if reasons:
                fields["finish"] = ",".join(sorted(reasons))
        if self.note:
            fields["note"] = self.note
        return fields

    def line(self, fields: dict[str, Any]) -> str:
        """The log line with those fields."""
        parts = [f"{fields['method']} {fields['path']} {fields['status'] or '-'} id={self.request_id}"]
        parts.append(f"time={fields['seconds']:.3f}s")
        parts += [f"{name}={fields[name]}" for name in ("prompt_tokens", "output_tokens") if name in fields]
        if "first_token" in fields:
            parts.append(f"first_token={fields['first_token']:.3f}s")
        if "finish" in fields:
            parts.append(f"finish={fields['finish']}")
        if self.note:
            parts.append(f"({self.note})")
        return " ".join(parts)
