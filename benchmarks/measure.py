"""The workload of the benchmarks, as their command lines describe it."""

import argparse
from typing import Any

from jax_engine.server.bench.figures import WorkItem, mixed_workload


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `workload_from` reads."""
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    lengths: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("MIN", "MAX")}
    parser.add_argument("--num-requests", default=64, help="default: %(default)s", **count)
    parser.add_argument("--prompt-tokens", default=(8, 200), help="evenly drawn (default: 8 200)", **lengths)
    parser.add_argument("--output-tokens", default=(16, 128), help="evenly drawn (default: 16 128)", **lengths)
    parser.add_argument("--vocab-size", default=256, help="token ids are below it (default: %(default)s)", **count)
    parser.add_argument("--seed", type=int, default=0, help="of the workload (default: %(default)s)")


def workload_from(options: argparse.Namespace) -> list[WorkItem]:
    """The workload that the command line describes."""
    return mixed_workload(
        options.num_requests,
        prompt_tokens=tuple(options.prompt_tokens),
        output_tokens=tuple(options.output_tokens),
        vocab_size=options.vocab_size,
        seed=options.seed,
    )
