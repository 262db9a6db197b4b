"""Offering requests to a server: streamed completions at a rate and a concurrency, each timed piece by piece."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax_engine.server.bench.client import RequestError, Target, stream
from jax_engine.server.bench.figures import RequestTiming, WorkItem


@dataclass(frozen=True)
class Load:
    """How requests are offered: at `rate` a second (infinite: at once), at most `concurrency` of them open.

    The time from one to the next is a gamma distribution's, whose shape is `burstiness`: 1 is Poisson's, less comes in
    bursts.
    """

    rate: float
    concurrency: int
    seed: int
    burstiness: float = 1.0

    def send_times(self, count: int) -> list[float]:
        """Seconds after the start at which each request is due."""
        rng, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            if not math.isinf(self.rate):
                now += rng.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
        return times


@dataclass(frozen=True)
class Asking:
    """What is asked for, and where: token ids to be continued, or, by a chat, as many words of text."""

    model: str
    endpoint: str = "/v1/completions"
    ignore_eos: bool = True  # exactly as many tokens as asked for, or it is a failure

    def body(self, item: WorkItem) -> dict[str, Any]:
        """The request for one item, greedy and streamed."""
        prompt: dict[str, Any] = {"prompt": list(item.prompt_token_ids)}
        if self.endpoint.endswith("/chat/completions"):
            words = " ".join(str(token % 10) for token in item.prompt_token_ids)
            prompt = {"messages": [{"role": "user", "content": words}]}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": item.output_tokens,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def offer(
    target: Target,
    asking: Asking,
    workload: Sequence[WorkItem],
    load: Load,
    finished: Callable[[], object] = lambda: None,
) -> list[RequestTiming | str]:
    """Send every request when it is due; each ends in its timing, or in what went wrong, and a call of `finished`."""
    free = asyncio.Semaphore(load.concurrency)
    start = time.perf_counter()

    async def one(item: WorkItem, due: float) -> RequestTiming | str:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        async with free:
            try:
                return await complete(target, asking, item)
            except (RequestError, OSError, EOFError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                finished()

    due_times = load.send_times(len(workload))
    return await asyncio.gather(*(one(item, due) for item, due in zip(workload, due_times, strict=True)))


async def complete(target: Target, asking: Asking, item: WorkItem) -> RequestTiming:
    """One streamed answer; connecting counts, as it does for a user."""
    sent, arrivals, pieces, usage = time.perf_counter(), [], [], None
    async for arrival, event in stream(target, asking.endpoint, asking.body(item)):
        usage = event.get("usage") or usage
        texts = [piece_of(choice) for choice in event["choices"]]
        # A last chunk without text only says why the answer ended, and a chat's first one who speaks.
        if any(text is not None for text in texts):
            arrivals.append(arrival)
            pieces += [text or "" for text in texts]
    if not arrivals or usage is None:
        raise RequestError(f"the stream ended after {len(arrivals)} pieces, with usage {usage}")
    if asking.ignore_eos and usage["completion_tokens"] != item.output_tokens:
        raise RequestError(f"{usage['completion_tokens']} tokens came, {item.output_tokens} were asked for")
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return RequestTiming(sent, tuple(arrivals), *counts, text="".join(pieces))


def piece_of(choice: dict[str, Any]) -> str | None:
    """The text of a chunk's choice; None for one that has no part of the answer."""
    delta = choice.get("delta")
    if delta is None:
        text: str = choice["text"]
        return text if text or choice["finish_reason"] is None else None
    if "role" in delta or not delta:
        return None
    return delta.get("content") or delta.get("reasoning_content") or ""
