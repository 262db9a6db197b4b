"""`jax-engine run-batch`: a file of requests through the server's own routes, without a server."""

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from tqdm import tqdm

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import EngineDeadError
from jax_engine.sampling_params import integer
from jax_engine.server.cli.batch_files import (
    BatchError,
    BatchResponse,
    BatchResult,
    InputLine,
    finished_keys,
    input_lines,
    keys_of,
)
from jax_engine.server.cli.in_process import Answer, InProcessServer, in_process_server
from jax_engine.server.service import EXIT_ENGINE_DEAD, EXIT_OK
from jax_engine.server.settings import ServerSettings

# The engine is kept full, with as many waiting as running; what more were read would only lie in memory.
REQUESTS_PER_SEQUENCE = 2
RETRY_SECONDS = 0.5


@dataclass
class Counts:
    """What has come of the lines so far. Mutable; owned by one run."""

    answered: int = 0
    failed: int = 0  # of those: refused by their route, or no requests at all
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, result: BatchResult) -> None:
        """Count a result, with the tokens that it says it used."""
        self.answered += 1
        if result.response is None or result.response.status_code != 200:
            self.failed += 1
            return
        body = result.response.body
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            self.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
            self.completion_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0

    def summary(self, *, kept: int, remaining: int, seconds: float) -> dict[str, Any]:
        """The figures of a run, in vLLM's words where it has them."""

        def rate(amount: int) -> float:
            return amount / seconds if seconds else 0.0

        return {
            "total_samples": self.answered,
            "failed_samples": self.failed,
            "kept_samples": kept,
            "remaining_samples": remaining,
            "inference_time_seconds": seconds,
            "throughput_samples_per_sec": rate(self.answered),
            "total_input_tokens": self.prompt_tokens,
            "total_output_tokens": self.completion_tokens,
            "input_tokens_per_sec": rate(self.prompt_tokens),
            "output_tokens_per_sec": rate(self.completion_tokens),
        }


class BatchRun:
    """One run over the lines that have no result yet. Mutable; owned by `run_batch`, in one event loop."""

    def __init__(self, lines: Iterator[InputLine], output: BinaryIO, counts: Counts, bar: "tqdm[Any]") -> None:
        self._lines = lines
        self._output = output
        self._counts = counts
        self._bar = bar

    async def work(self, server: InProcessServer) -> None:
        """Answer lines one after the other, as one of several workers.

        Raises:
            EngineDeadError: the engine has died; the line in hand has no result.
        """
        for line in self._lines:
            result = await self._answer(server, line)
            # One write a line, so that whatever ends this process leaves whole lines but for the last.
            self._output.write(msgspec.json.encode(result) + b"\n")
            self._output.flush()
            self._counts.add(result)
            self._bar.update(1)

    async def _answer(self, server: InProcessServer, line: InputLine) -> BatchResult:
        custom_id = line.custom_id
        try:
            request = line.request()
            body = bytes(request.body)
            check_not_streamed(body)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            problem = BatchError("invalid_line", f"line {line.number}: {error}")
            return BatchResult(id=line.result_id, custom_id=custom_id, error=problem)
        while True:
            answer = await server.post(request.url, body)
            server.check_alive()
            if answer.status != 503:  # otherwise the engine's queue is full: a batch has time
                break
            await asyncio.sleep(RETRY_SECONDS)
        response = BatchResponse(answer.status, answer.request_id, decoded(answer))
        return BatchResult(id=line.result_id, custom_id=custom_id, response=response)


def check_not_streamed(body: bytes) -> None:
    """ValueError for a body that asks for a stream, which a line of JSON cannot hold."""
    content = msgspec.json.decode(body)
    if isinstance(content, dict) and content.get("stream"):
        raise ValueError("body.stream=true has no place in a batch; leave it out")


def decoded(answer: Answer) -> Any:
    """The JSON of an answer; its text, when it is something else."""
    try:
        return msgspec.json.decode(answer.body)
    except msgspec.DecodeError:
        return answer.body.decode(errors="replace")


def run_batch(
    config: EngineConfig,
    settings: ServerSettings,
    input_file: Path,
    output_file: Path,
    *,
    summary_file: Path | None,
    max_concurrency: int | None,
) -> int:
    """Answer every line of the input that the output does not answer yet; returns the exit code.

    0: every line has a result, be it an error's; 1: the engine died, or the output cannot take more; 128 and the
    signal's number: stopped. In all of these cases the next run goes on where this one ended.

    Raises:
        ValueError: a file or a setting that nothing can be begun with.
    """
    if max_concurrency is not None:
        remedy = "leave it out for twice --max-num-seqs"
        integer("max_concurrency", max_concurrency, low=1, high=2**20, remedy=remedy)
    if input_file.resolve() == output_file.resolve():
        raise ValueError(f"--output-file {output_file} is the input; give another one")
    asked = keys_of(input_file)
    finished = finished_keys(output_file, asked)
    num_asked, kept = len(asked), len(finished)
    del asked
    lines = (line for line in input_lines(input_file) if line.key not in finished)
    counts = Counts()
    try:
        output = output_file.open("ab")
    except OSError as error:
        raise ValueError(f"--output-file {output_file} cannot be written: {error.strerror}") from error
    with output, tqdm(total=num_asked, initial=kept, desc="Answered", unit="line", disable=None) as bar:
        run = BatchRun(lines, output, counts, bar)
        num_workers = max_concurrency or REQUESTS_PER_SEQUENCE * config.max_num_seqs
        exit_code, seconds = (
            (EXIT_OK, 0.0)
            if kept == num_asked
            else asyncio.run(_run(run, config, settings, min(num_workers, num_asked - kept)))
        )
    summary = counts.summary(kept=kept, remaining=num_asked - kept - counts.answered, seconds=seconds)
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()
    print(text)
    if summary_file is not None:
        try:
            summary_file.write_text(text + "\n")
        except OSError as error:
            raise ValueError(f"--summary {summary_file} cannot be written: {error.strerror}") from error
    return exit_code


async def _run(run: BatchRun, config: EngineConfig, settings: ServerSettings, num_workers: int) -> tuple[int, float]:
    """(exit code, seconds of inference); a signal, or the engine's death, ends it early."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals: list[int] = []

    def stop(number: signal.Signals) -> None:
        signals.append(number)
        loop.remove_signal_handler(number)  # a second one ends the process at once
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    started = ended = time.monotonic()
    exit_code = EXIT_OK
    try:
        async with in_process_server(config, settings) as server:
            started = time.monotonic()
            workers = [asyncio.create_task(run.work(server)) for _ in range(num_workers)]
            try:
                await asyncio.gather(*workers)
            finally:
                ended = time.monotonic()
                for worker in workers:
                    worker.cancel()
                await asyncio.wait(workers)
    except (EngineDeadError, OSError) as error:  # of the output: its disk is full
        print(f"jax-engine run-batch: error: {error}", file=sys.stderr)
        exit_code = EXIT_ENGINE_DEAD
    except asyncio.CancelledError:
        if not signals:
            raise
        task.uncancel()
        exit_code = 128 + signals[0]
    return exit_code, max(0.0, ended - started)
