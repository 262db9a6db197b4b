"""Start-up: seconds from the command to the first answer over HTTP, with an empty compilation cache and a filled one.

    python benchmarks/startup.py                     # the built-in model
    python benchmarks/startup.py --repeats 5 -- --max-num-seqs 8
    python benchmarks/startup.py --model DIR --json out.json

Cold is a start with an empty compilation cache, warm one with the cache that the cold start filled; both begin with the
process and end with the last byte of a short greedy answer. What follows `--` goes to `jax-engine serve`.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from http_client import RequestError, Target, stream
from measure import format_table, write_json
from serving import START_SECONDS, ended_afterwards, free_port, metrics

BODY = {"prompt": "What is 17 + 25?", "max_tokens": 8, "temperature": 0, "stream": True}
POLL_SECONDS = 0.02
ENGINE = str(Path(sys.executable).with_name("jax-engine"))


@dataclass(frozen=True)
class Start:
    """One start of a server, in seconds since its command began."""

    listening: float  # any HTTP answer, also one that says to wait
    first_answer: float
    all_compiled: float  # the last step program is ready


def main() -> None:
    options = parse_arguments()
    arguments = [*([options.model] if options.model else []), *options.server_arguments]
    help_seconds = [command_seconds([ENGINE, "--help"]) for _ in range(options.repeats)]
    cold, warm = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(start(arguments, cache))
            warm.append(start(arguments, cache))
    print(format_table(["", "cold, s", "warm, s"], table_rows(cold, warm, help_seconds)))
    if options.json:
        report = {"help": help_seconds, "cold": [asdict(run) for run in cold], "warm": [asdict(run) for run in warm]}
        write_json(options.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face name (default: the built-in model)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="starts of each kind (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("server_arguments", nargs="*", metavar="-- FLAGS", help="passed to the started server")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    return options


def table_rows(cold: Sequence[Start], warm: Sequence[Start], help_seconds: Sequence[float]) -> list[list[object]]:
    """The median of each figure, and the whole range of the one that a user waits for."""

    def median(runs: Sequence[Start], name: str) -> float:
        return statistics.median(asdict(run)[name] for run in runs)

    labels = {
        "listening": "HTTP answers that the engine is starting",
        "first_answer": "first answer",
        "all_compiled": "every step program compiled",
    }
    rows: list[list[object]] = [[text, median(cold, name), median(warm, name)] for name, text in labels.items()]
    for text, pick in (("first answer, quickest start", min), ("first answer, slowest start", max)):
        rows.append([text, *(pick(run.first_answer for run in runs) for runs in (cold, warm))])
    return [*rows, ["jax-engine --help", None, statistics.median(help_seconds)]]


def command_seconds(command: Sequence[str]) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def start(arguments: Sequence[str], cache: str) -> Start:
    """Start a server with the compilation cache `cache`, time it until all is compiled, and end it."""
    port = free_port()
    command = [ENGINE, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen([*command, "--compilation-cache-dir", cache], stdout=log, stderr=subprocess.STDOUT)
        with ended_afterwards(process):
            try:
                return asyncio.run(watch(Target(f"http://127.0.0.1:{port}"), process, begin))
            except TimeoutError:
                log.seek(0)
                sys.exit(f"the server did not answer; its log ends:\n{log.read()[-4000:]}")


async def watch(target: Target, process: "subprocess.Popen[bytes]", begin: float) -> Start:
    """Ask until the server answers, then until everything is compiled.

    Raises:
        TimeoutError: the process has ended, or `START_SECONDS` are over.
    """
    listening = first_answer = None
    while process.poll() is None and time.perf_counter() - begin < START_SECONDS:
        try:
            if first_answer is None:
                async for _ in stream(target, "/v1/completions", BODY):
                    pass
                first_answer = time.perf_counter() - begin
            elif await all_compiled(target):
                assert listening is not None
                return Start(listening, first_answer, time.perf_counter() - begin)
            else:
                await asyncio.sleep(10 * POLL_SECONDS)
        except RequestError:  # 503: not ready
            listening = listening or time.perf_counter() - begin
            await asyncio.sleep(POLL_SECONDS)
        except (OSError, EOFError):  # not even listening
            await asyncio.sleep(POLL_SECONDS)
    raise TimeoutError


async def all_compiled(target: Target) -> bool:
    """Whether the server's metrics say so."""
    samples = await metrics(target)
    return samples["jax_engine:programs_compiled"] == samples["jax_engine:programs_planned"] > 0


if __name__ == "__main__":
    main()
