"""What it costs to tell the followers of an engine over several hosts what a step is: microseconds an order.

    python benchmarks/broadcast.py [--processes 2 4] [--tokens 64 512 8192] [--orders 2000]

Real processes on this machine, without devices. `send` is what process 0 does in a step's path, encoding included;
`round trip` ends when every follower has decoded the order and its answer is back.
"""

import argparse
import json
import multiprocessing
import socket
import time
from pathlib import Path

import numpy as np

from jax_engine.execution.orders import ORDERS, Step
from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.hosts.group_leader import Leader
from jax_engine.hosts.group_member import Member

HOST = "127.0.0.1"


def follow(port: int, rank: int) -> None:
    """Answer each order once it is decoded."""
    member = Member(HOST, port, rank, ORDERS)
    member.join({}, 60)
    while (order := member.receive()) is not None:
        member.agree(order.number, ok=True)
    member.close()


def measure(num_processes: int, num_tokens: int, num_orders: int) -> dict[str, float]:
    """The medians for a step of so many token rows, 64 sequences of them at most."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    followers = [spawn.Process(target=follow, args=(port, rank)) for rank in range(1, num_processes)]
    for follower in followers:
        follower.start()
    leader = Leader(HOST, port, num_processes)
    leader.gather({}, 60)
    layout = BatchLayout(Bucket(num_tokens, min(64, num_tokens)), page_size=64, num_slots=64)
    buffer = np.zeros(layout.size, np.int32)
    sends, trips = [], []
    for number in range(num_orders):
        start = time.perf_counter()
        leader.send(Step(number, buffer))
        sends.append(time.perf_counter() - start)
        waiting = num_processes - 1
        while waiting:
            waiting -= len(leader._take())
        trips.append(time.perf_counter() - start)
    leader.close()
    for follower in followers:
        follower.join()
    return {
        "processes": num_processes,
        "bytes": buffer.nbytes,
        "send_us": 1e6 * float(np.median(sends)),
        "round_trip_us": 1e6 * float(np.median(trips)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 8192], metavar="N", help="rows of a step")
    parser.add_argument("--orders", type=int, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    figures = [measure(n, tokens, options.orders) for n in options.processes for tokens in options.tokens]
    print("processes     bytes   send us   round trip us")
    for row in figures:
        print(f"{row['processes']:9} {row['bytes']:9} {row['send_us']:9.1f} {row['round_trip_us']:15.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
