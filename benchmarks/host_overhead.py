"""What the host costs: microseconds a step of every stage, and streamed tokens a second through HTTP.

    python benchmarks/host_overhead.py                                   # both parts
    python benchmarks/host_overhead.py --part core --sequences 256 --contexts 1024 32768
    python benchmarks/host_overhead.py --part http --streams 256 -- --api-server-count 2

The model is one whose step does almost nothing (`counting_model.py`), so that what is measured is scheduling, packing,
launching, collecting, detokenizing and serving. Every answer is checked, token by token. What follows `--` goes to the
started server.
"""

import argparse
import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from counting_model import CountingModel
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Abort, Add, CoreRequest, StepOutputs
from jax_engine.frontend.output_processor import OutputProcessor, RequestState
from jax_engine.frontend.processor import InputProcessor, ModelText
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.server.bench.client import Target
from jax_engine.server.bench.figures import format_table, write_json
from jax_engine.server.bench.metrics import metrics
from jax_engine.server.bench.process import running_server
from jax_engine.server.metrics.metrics import Metrics
from jax_engine.server.openai.frames import CompletionFrames, Piece
from jax_engine.server.tracking import PromptTracker
from light_client import streamed_texts

CORE_STAGES = ("schedule", "pack", "launch", "collect", "encode")
TEXT_STAGES = ("decode", "detokenize", "SSE")
PROMPT_TOKENS = 16  # of each stream through HTTP
SLACK = 256  # steps that filling the batch may take
USUAL_MODEL_LEN = 36 * 1024  # the same for all but longer runs, so that they find their compiled programs


@dataclass(frozen=True)
class StepCosts:
    """Median microseconds a step by stage, while `sequences` of about `context` tokens decode together.

    `wait` is the host idle while the device works; it is no cost.
    """

    sequences: int
    context: int
    stages: dict[str, float]

    @property
    def core(self) -> float:
        """What the core process's thread does."""
        return sum(self.stages[stage] for stage in CORE_STAGES)

    @property
    def text(self) -> float:
        """What the front end does, without its event loop and sockets."""
        return sum(self.stages[stage] for stage in TEXT_STAGES)


@dataclass(frozen=True)
class StreamRates:
    """Streamed completions through HTTP, `streams` of them at once."""

    streams: int
    seconds: float
    tokens: int
    events: int
    front_end_seconds: float  # of CPU time, all front ends together


def main() -> None:
    options = parse_arguments()
    report: dict[str, Any] = {}
    longest = max(*options.contexts, PROMPT_TOKENS) + max(options.steps + SLACK, options.output_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = CountingModel.write(Path(folder), max_model_len=max(longest, USUAL_MODEL_LEN))
        if options.part != "http":
            costs = measure_core(model, options.sequences, options.contexts, steps=options.steps)
            print(format_table(["us/step", *(f"{c.sequences} x {c.context}" for c in costs)], core_rows(costs)))
            report["core"] = [{**msgspec.to_builtins(c), "core": c.core, "text": c.text} for c in costs]
        if options.part != "core":
            rates = measure_http(model, options.streams, options.output_tokens, options.server_arguments)
            print(format_table(["streams", *(str(r.streams) for r in rates)], http_rows(rates)))
            report["http"] = [msgspec.to_builtins(r) for r in rates]
    if options.json:
        write_json(options.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--part", choices=("both", "core", "http"), default="both")
    parser.add_argument("--sequences", default=[1, 64, 256, 1024], help="at once (default: 1 64 256 1024)", **counts)
    parser.add_argument("--contexts", default=[1024, 32768], help="tokens of each (default: 1024 32768)", **counts)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="measured (default: %(default)s)")
    parser.add_argument("--streams", default=[1, 64, 256], help="streams at once (default: 1 64 256)", **counts)
    parser.add_argument("--output-tokens", type=int, default=512, metavar="N", help="a stream (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("server_arguments", nargs="*", metavar="-- FLAGS", help="passed to the started server")
    return parser.parse_args()


def measure_core(
    model: CountingModel, sequences: Sequence[int], contexts: Sequence[int], *, steps: int
) -> list[StepCosts]:
    """The stages of a decode step, for every number of sequences and every context."""
    config = EngineConfig(
        model=str(model.folder),
        max_num_seqs=max(sequences),
        max_num_batched_tokens=max(*sequences, 64),
        kv_cache_memory_bytes=64 * 2**20,  # enough: the sequences share their prompt's pages
    )
    core = InProcessCore(config)
    core.wait_until_compiled()
    gc.freeze()  # as the core process does once it is ready
    pipeline = Pipeline(core, config)
    try:
        return [pipeline.measure(model, count, context, steps) for context in contexts for count in sequences]
    finally:
        core.shutdown()


class Pipeline:
    """The engine from scheduler to frame, in one thread, each stage timed. Mutable; owned by `measure_core`."""

    def __init__(self, core: InProcessCore, config: EngineConfig) -> None:
        text = ModelText.load(config)
        self._core = core
        self._inputs = InputProcessor(text, core.info)
        self._tokenizer = text.tokenizer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(StepOutputs)
        self._metrics = Metrics("counting")
        self._frames = CompletionFrames(response_id="cmpl-0", model="counting", include_usage=False)

    def measure(self, model: CountingModel, count: int, context: int, steps: int) -> StepCosts:
        """Run `count` equal requests, and time `steps` steps in which each of them gets a token."""
        outputs = OutputProcessor(self._tokenizer)
        params = SamplingParams(
            temperature=0, max_tokens=steps + SLACK, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        prompt = model.prompt(context)
        requests = [self._inputs.prepare(str(number), {"prompt_token_ids": prompt}, params) for number in range(count)]
        streams = [Stream(outputs.add(request), PromptTracker(self._metrics, params)) for request in requests]
        by_state = {id(stream.state): stream for stream in streams}
        adds = [request.core_requests[0] for request in requests]
        self._fill(outputs, adds[:1], running=1)
        self._fill(outputs, adds[1:], running=count)  # they find the first one's pages
        samples: dict[str, list[float]] = {}
        for _ in range(steps):
            for stage, microseconds in self._step(outputs, by_state):
                samples.setdefault(stage, []).append(microseconds)
        self._core.send(Abort([add.request_id for add in adds]))
        while self._core.has_work():
            self._core.step()
        return StepCosts(count, context, {stage: statistics.median(values) for stage, values in samples.items()})

    def _fill(self, outputs: OutputProcessor, adds: list[CoreRequest], *, running: int) -> None:
        """Start requests, and step until that many get a token in one step."""
        self._core.send(Add(adds))
        produced = 0
        while adds and produced < running:
            assert self._core.has_work(), "requests ended before all were running"
            step = self._core.step()
            for state in outputs.process(step.outputs).changed:
                state.take()
            produced = len(step.outputs)

    def _step(self, outputs: OutputProcessor, streams: dict[int, "Stream"]) -> Iterator[tuple[str, float]]:
        """One step; yields each stage's name and microseconds."""
        before = self._core.stats().host_time
        step = self._core.step()
        after = self._core.stats().host_time
        for stage in (*CORE_STAGES[:-1], "wait"):
            yield stage, getattr(after, stage) - getattr(before, stage)
        assert len(step.outputs) == len(streams), "a sequence got no token"
        with timed() as spent:
            message = self._encoder.encode(step)
        yield "encode", spent[0]
        with timed() as spent:
            received = self._decoder.decode(message)
        yield "decode", spent[0]
        with timed() as spent:
            taken = [(streams[id(state)], state.take()) for state in outputs.process(received.outputs).changed]
        yield "detokenize", spent[0]
        assert len(taken) == len(streams), "a stream got nothing"
        with timed() as spent:
            for stream, output in taken:
                stream.tracker.take(output)
                for completion in output.outputs:
                    self._frames.write(Piece(completion.index, completion.text))
        yield "SSE", spent[0]


@dataclass(frozen=True)
class Stream:
    """One request on its way to its client."""

    state: RequestState
    tracker: PromptTracker


@contextmanager
def timed() -> Iterator[list[float]]:
    """The microseconds that a block took, in a list once it has ended."""
    spent: list[float] = []
    start = time.perf_counter()
    yield spent
    spent.append((time.perf_counter() - start) * 1e6)


def core_rows(costs: Sequence[StepCosts]) -> list[list[object]]:
    """A row a stage, then the sums, also for each sequence."""
    rows: list[list[object]] = [[stage, *(c.stages[stage] for c in costs)] for stage in (*CORE_STAGES, *TEXT_STAGES)]
    return [
        *rows,
        ["core", *(c.core for c in costs)],
        ["core, a sequence", *(c.core / c.sequences for c in costs)],
        ["text side", *(c.text for c in costs)],
        ["text side, a sequence", *(c.text / c.sequences for c in costs)],
        ["(wait for the device)", *(c.stages["wait"] for c in costs)],
    ]


def measure_http(
    model: CountingModel, streams: Sequence[int], output_tokens: int, server_arguments: Sequence[str]
) -> list[StreamRates]:
    """Tokens a second through a server of its own, for every number of streams."""
    arguments = ["--max-num-seqs", str(max(streams)), "--max-num-batched-tokens", str(max(*streams, 64))]
    arguments += ["--kv-cache-memory-bytes", "64M", "--no-enable-log-requests", *server_arguments]
    with running_server(str(model.folder), arguments) as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as run:
        target = Target(url)
        run.run(offer(target, model, max(streams), 32))  # warms every part up
        return [run.run(offer(target, model, count, output_tokens)) for count in streams]


async def offer(target: Target, model: CountingModel, streams: int, output_tokens: int) -> StreamRates:
    """Stream that many completions at once, and check each of them."""
    body = {
        "prompt": model.prompt(PROMPT_TOKENS),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    before = await metrics(target)
    start = time.perf_counter()
    answers = await streamed_texts(target, "/v1/completions", [body] * streams)
    seconds = time.perf_counter() - start
    after = await metrics(target)
    expected = model.answer(PROMPT_TOKENS, output_tokens)
    for answer in answers:
        assert answer.text == expected, f"a stream's text is wrong: {answer.text[:100]!r}"
    cpu = "process_cpu_seconds_total"
    return StreamRates(
        streams=streams,
        seconds=seconds,
        tokens=sum(answer.num_tokens for answer in answers),
        events=sum(answer.num_events for answer in answers),
        front_end_seconds=after[cpu] - before[cpu],
    )


def http_rows(rates: Sequence[StreamRates]) -> list[list[object]]:
    return [
        ["output tokens/s", *(r.tokens / r.seconds for r in rates)],
        ["events/s", *(r.events / r.seconds for r in rates)],
        ["ms between a stream's tokens", *(1e3 * r.seconds * r.streams / r.tokens for r in rates)],
        ["front end CPU, us/token", *(1e6 * r.front_end_seconds / r.tokens for r in rates)],
    ]


if __name__ == "__main__":
    main()
