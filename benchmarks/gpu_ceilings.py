"""What this device can do at most, as XLA makes it do: bytes and operations a second, and what a launch costs."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpu_attention import backends
from gpu_jobs import Report
from gpu_timing import Chain, compiled_as_steps, time_calls

NUM_SMALL_KERNELS = 100
NUM_DISPATCHES = 200


def measure(report: Report, *, tiny: bool) -> None:
    """The job: what the device is, and every ceiling, each a case. Later jobs take the best of each kind."""
    platform = jax.default_backend()
    tiny = tiny or platform != "gpu"
    figures = {"platform": platform, "tiny": tiny, "backends": backends(platform), "jax": jax.__version__}
    report.add("device", note=describe_device(tiny=tiny), figures=figures)
    for name, run, num_bytes in streams(2**22 if tiny else 2**31):
        with report.case(name):
            timing = time_calls(run)
            rate = num_bytes / timing.seconds
            report.add(name, value=rate / 1e9, unit="GB/s", figures={**timing.figures, "bytes_per_second": rate})
    for size in (128,) if tiny else (4096, 8192):
        name = f"{size}^3 bfloat16 product"
        with report.case(name):
            timing = time_calls(product(size))
            rate = 2 * size**3 / timing.seconds
            report.add(name, value=rate / 1e12, unit="TFLOP/s", figures={**timing.figures, "flops_per_second": rate})
    for name, measured in (("dispatch", dispatch_seconds), ("round trip", round_trip_seconds)):
        name = f"empty program, {name}"
        with report.case(name):
            seconds = measured()
            report.add(name, value=seconds * 1e6, unit="us", figures={"seconds": seconds})
    name = "a kernel more in a program"
    with report.case(name):
        timing = time_calls(small_kernels(NUM_SMALL_KERNELS))
        seconds = timing.seconds / NUM_SMALL_KERNELS
        report.add(name, value=seconds * 1e6, unit="us", note="the mean", figures=timing.figures)


def describe_device(*, tiny: bool) -> str:
    """What JAX runs on, and whether figures say how fast it is."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = f", {limit / 2**30:.0f} GiB for JAX" if limit else ""
    where = f"{device.device_kind}, platform {device.platform}{memory}, jax {jax.__version__}"
    return f"a dry run in toy sizes, whose figures mean nothing: {where}" if tiny else where


def streams(num_bytes: int) -> Iterator[tuple[str, Callable[[], Array], int]]:
    """(name, run, bytes moved) of programs that do nothing but read and write main memory, on random data."""
    values = partial(jax.random.normal, shape=(num_bytes // 4,), dtype=jnp.float32)
    first = jax.block_until_ready(jax.jit(values)(jax.random.key(0, impl="rbg")))
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    yield "copy", Chain(copy, first + 0), 2 * num_bytes
    yield "read", partial(jax.jit(jnp.sum), first), num_bytes
    half = first[: first.size // 2]
    triad = jax.jit(lambda a, b: a + 0.5 * b)
    yield "triad", partial(triad, half, half[::-1] + 0), 3 * half.nbytes


def product(size: int) -> Callable[[], Array]:
    """A product of square random matrices: of zeros it would run faster."""
    left, right = (jax.random.normal(jax.random.key(seed, impl="rbg"), (size, size), jnp.bfloat16) for seed in (0, 1))
    run = jax.jit(partial(jnp.dot, preferred_element_type=jnp.bfloat16))
    return partial(run, left, right)


def _next(x: Array) -> Array:
    return x + 1


def dispatch_seconds() -> float:
    """Host time of one call of a compiled program that does next to nothing, while the device is not waited for."""
    program = jax.jit(_next).lower(jnp.zeros(8)).compile()
    x = jax.block_until_ready(program(jnp.zeros(8)))
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(NUM_DISPATCHES):
            x = program(x)
        rounds.append((time.perf_counter() - start) / NUM_DISPATCHES)
        jax.block_until_ready(x)
    return median(rounds)


def round_trip_seconds() -> float:
    """From the call of such a program to its result on the host."""
    program = jax.jit(_next).lower(jnp.zeros(8)).compile()
    x = jax.block_until_ready(program(jnp.zeros(8)))
    trips = []
    for _ in range(NUM_DISPATCHES):
        start = time.perf_counter()
        x = jax.block_until_ready(program(x))
        trips.append(time.perf_counter() - start)
    return median(trips)


def small_kernels(count: int) -> Callable[[], Array]:
    """A program of so many kernels that need each other and cannot be fused."""

    def run(x: Array) -> Array:
        for _ in range(count):
            x = lax.optimization_barrier(jnp.sin(x))
        return x

    return Chain(compiled_as_steps(run), jnp.ones(1024))
