"""Ten thousand requests under memory pressure, many of whose clients leave: nothing is lost, wrong or left behind.

    python benchmarks/soak.py
    python benchmarks/soak.py --num-requests 1000 -- --kv-cache-memory-bytes 8M

Starts `jax-engine serve` with the built-in model and too few KV pages for its running requests, so that they preempt
each other. Requests are drawn from a few hundred different ones: greedy or seeded, some with stop strings, some of two
completions, some not streamed. What each must answer is known from a run without pressure, prefix caching or company.
A share of the clients leave, in the middle of an answer or before it. Checked are

- every answer: each completion ends once, with the known text and finish reason; what a leaving client has read is
  the beginning of the known text;
- the server's own account: a finish reason for every completion, and not one more;
- at the end no request runs or waits, no page is in use, and no compile was waited for;
- memory: neither process has grown since a quarter of the requests were done, beyond an allowance.

Requests are the same for the same seed. Programs of other sizes may round a logit otherwise, so that now and then a
seeded answer draws another token; with `--deterministic` none does. Ends with status 1 if a check failed. What follows
`--` goes to the server.
"""

import argparse
import asyncio
import collections
import random
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax_engine import LLM, SamplingParams
from jax_engine.server.bench.client import Target, post, stream
from jax_engine.server.bench.figures import format_table, write_json
from jax_engine.server.bench.metrics import metrics
from jax_engine.server.bench.process import running_server

PRESSURE = (
    *("--kv-cache-memory-bytes", "4M", "--max-num-seqs", "48", "--max-model-len", "512"),
    "--enable-prefix-caching",  # which servers of the other benchmarks go without
)
ZERO_AT_THE_END = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "jax_engine:kv_pages_in_use"),
    "jax_engine:compiles_in_request_path_total",
)
WORDS = "the cat saw an old red house by a river and nine small boats near some green hills".split()
STOPS = (" and", ".", "the", "\n", "ed ")
ALLOWED_GROWTH = 0.03  # of a process's memory, and
ALLOWED_GROWTH_MIB = 16
SETTLE_SECONDS = 30


@dataclass(frozen=True)
class Spec:
    """One of the different requests."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool
    n: int

    def params(self) -> SamplingParams:
        return SamplingParams(**{name: value for name, value in asdict(self).items() if name != "prompt"})


@dataclass(frozen=True)
class Answer:
    """One completion: its text, and why it ended (None: the client had left)."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Visit:
    """One request: which one, and what its client does."""

    spec: int
    streamed: bool
    leaves_after: int | None  # pieces of the answer; 0: before the first one; None: stays


def draw_specs(count: int, rng: random.Random) -> list[Spec]:
    """`count` different requests; prompts of up to some 150 tokens, a third of them with a beginning in common."""
    specs = []
    for number in range(count):
        start = "Here is a story that begins like many others do, " * 3 if rng.random() < 0.33 else f"{number}: "
        words = rng.choices(WORDS, k=rng.randint(1, 40))
        specs.append(
            Spec(
                prompt=start + " ".join(words),
                max_tokens=int(min(200, 1 + rng.expovariate(1 / 30))),
                temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
                seed=rng.randrange(2**31),
                stop=tuple(rng.sample(STOPS, 1)) if rng.random() < 0.2 else (),
                ignore_eos=rng.random() < 0.7,
                n=2 if rng.random() < 0.1 else 1,
            )
        )
    return specs


def draw_visits(count: int, num_specs: int, rng: random.Random) -> list[Visit]:
    """`count` requests; an eighth of the clients leave early, a tenth do not stream."""
    visits = []
    for _ in range(count):
        leaves_after = rng.choice([0, 1, rng.randint(2, 30)]) if rng.random() < 0.125 else None
        streamed = leaves_after is not None or rng.random() < 0.9
        visits.append(Visit(rng.randrange(num_specs), streamed, leaves_after))
    return visits


def known_answers(specs: Sequence[Spec], max_model_len: int, *, deterministic: bool) -> list[list[Answer]]:
    """What each request must answer: each run to its end alone, with all the memory it wants."""
    llm = LLM(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_model_len=max_model_len,
        enable_prefix_caching=False,
        deterministic=deterministic,
    )
    try:
        outputs = llm.generate([spec.prompt for spec in specs], [spec.params() for spec in specs], use_tqdm=False)
    finally:
        llm.shutdown()
    return [[Answer(choice.text, choice.finish_reason) for choice in output.outputs] for output in outputs]


async def visit(target: Target, spec: Spec, plan: Visit) -> list[Answer]:
    """Send one request and read what its client reads.

    Raises:
        ValueError: a completion ended twice.
    """
    body: dict[str, Any] = {"model": "demo", **asdict(spec), "stream": plan.streamed}
    if not plan.streamed:
        choices = (await post(target, "/v1/completions", body))["choices"]
        return [Answer(choice["text"], choice["finish_reason"]) for choice in choices]
    if plan.leaves_after == 0:
        return await leave_at_once(target, body, spec.n)
    texts, reasons = [""] * spec.n, collections.defaultdict[int, list[str]](list)
    async with aclosing(stream(target, "/v1/completions", body)) as events:
        pieces = 0
        async for _, event in events:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                if choice["finish_reason"] is not None:
                    reasons[choice["index"]].append(choice["finish_reason"])
            pieces += 1
            if pieces == plan.leaves_after:
                break
    if any(len(ends) > 1 for ends in reasons.values()):
        raise ValueError(f"a completion ended more than once: {dict(reasons)}")
    return [Answer(text, next(iter(reasons[index]), None)) for index, text in enumerate(texts)]


async def leave_at_once(target: Target, body: dict[str, Any], count: int) -> list[Answer]:
    """Send a request and hang up shortly after, whatever has come by then."""
    events = stream(target, "/v1/completions", body)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.wait([waiting], timeout=0.02)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await events.aclose()
    return [Answer("", None)] * count


def complaint(spec: Spec, plan: Visit, got: Sequence[Answer], known: Sequence[Answer]) -> str | None:
    """What is wrong with an answer, in one line."""
    for index, (answer, right) in enumerate(zip(got, known, strict=True)):
        if answer == right or (
            plan.leaves_after is not None and answer.finish_reason is None and right.text.startswith(answer.text)
        ):
            continue
        return f"completion {index} of {spec}: {answer} instead of {right}"
    return None


@dataclass
class Memory:
    """Resident memory of the server's processes over the run. Mutable; owned by `soak`."""

    samples: list[dict[str, float]]  # process name -> MiB

    def measure(self) -> None:
        """Take a sample of every process that `jax-engine serve` of this machine's started server consists of."""
        self.samples.append(resident_mib())

    def complaints(self) -> list[str]:
        first, last = self.samples[0], self.samples[-1]
        return [
            f"{name} grew from {first[name]:.0f} to {last[name]:.0f} MiB"
            for name in first
            if last.get(name, 0.0) > first[name] * (1 + ALLOWED_GROWTH) + ALLOWED_GROWTH_MIB
        ]


def resident_mib() -> dict[str, float]:
    """Resident MiB of this process's descendants: the server and, below it, its engine core."""
    sizes: dict[str, float] = {}

    def visit_children(pid: str) -> None:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                status = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
                sizes[f"{status['Name'].strip()} {child}"] = int(status.get("VmRSS", "0 kB").split()[0]) / 1024
                visit_children(child)

    visit_children("self")
    return sizes


async def soak(
    target: Target, specs: Sequence[Spec], visits: Sequence[Visit], known: Sequence[Sequence[Answer]], concurrency: int
) -> tuple[dict[str, Any], list[str]]:
    """Make all visits; the figures of the run, and what went wrong."""
    before, start = await metrics(target), time.perf_counter()
    queue = collections.deque(visits)
    complaints: list[str] = []
    memory = Memory([])

    async def client() -> None:
        while queue:
            plan = queue.popleft()
            if len(queue) in (3 * len(visits) // 4, len(visits) // 2, len(visits) // 4, 0):
                memory.measure()
            try:
                got = await visit(target, specs[plan.spec], plan)
            except (OSError, EOFError, ValueError, RuntimeError) as error:
                complaints.append(f"{plan}: {type(error).__name__}: {error}")
                continue
            if wrong := complaint(specs[plan.spec], plan, got, known[plan.spec]):
                complaints.append(wrong)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    after = await settled(target)
    growth = {name: after[name] - before.get(name, 0.0) for name in after}
    complaints += memory.complaints() + leftovers(after) + miscounts(growth, specs, visits)
    figures: dict[str, Any] = {
        "requests": len(visits),
        "seconds": seconds,
        "output tokens/s": growth["vllm:generation_tokens_total"] / seconds,
        "clients that left": sum(plan.leaves_after is not None for plan in visits),
        "preemptions": int(growth["vllm:num_preemptions_total"]),
        "prefix cache hits, % of tokens": 100
        * growth["vllm:prefix_cache_hits_total"]
        / max(1.0, growth["vllm:prefix_cache_queries_total"]),
        **{f"{name}, MiB at a quarter": size for name, size in memory.samples[0].items()},
        **{f"{name}, MiB at the end": size for name, size in memory.samples[-1].items()},
        "complaints": len(complaints),
    }
    return figures, complaints


async def settled(target: Target) -> dict[str, float]:
    """The server's metrics once nothing runs or waits, or when it has had the time for it."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (samples := await metrics(target)) and leftovers(samples) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return samples


def leftovers(samples: dict[str, float]) -> list[str]:
    """What should be zero at the end and is not."""
    return [f"{name} is {samples[name]:.0f} at the end" for name in ZERO_AT_THE_END if samples[name]]


def miscounts(growth: dict[str, float], specs: Sequence[Spec], visits: Sequence[Visit]) -> list[str]:
    """Whether the server ended as many completions as were asked of it.

    A client that hangs up at once may do so before its request has been read.
    """
    asked = sum(specs[plan.spec].n for plan in visits)
    unsure = sum(specs[plan.spec].n for plan in visits if plan.leaves_after == 0)
    ended = int(growth["vllm:request_success_total"])
    if asked - unsure <= ended <= asked:
        return []
    return [f"{ended} completions ended of {asked}, {unsure} of which had a client that hung up at once"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--num-different", type=int, default=400, metavar="N", help="requests (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=96, metavar="N", help="open at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="bitwise equal numbers in any batch, and so certainly equal answers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and complaint there too")
    parser.add_argument("server_arguments", nargs="*", metavar="-- FLAGS", help="passed to the server")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    rng = random.Random(options.seed)
    specs = draw_specs(options.num_different, rng)
    visits = draw_visits(options.num_requests, len(specs), rng)
    known = known_answers(specs, max_model_len=512, deterministic=options.deterministic)
    exactness = ["--deterministic"] if options.deterministic else []
    with running_server(None, [*PRESSURE, *exactness, *options.server_arguments]) as url:
        figures, complaints = asyncio.run(soak(Target(url), specs, visits, known, options.concurrency))
    print(format_table(["", "soak"], [[name, value] for name, value in figures.items()]))
    if options.json:
        write_json(options.json, {**figures, "complaints": complaints})
    if complaints:
        sys.exit("\n".join([f"{len(complaints)} complaints; the first:", *complaints[:10]]))


if __name__ == "__main__":
    main()
