"""Device time of programs: many calls in a row, so that the device need not wait for the host; medians of rounds."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jax_engine.compilation.gpu_settings import compiler_options

ROUNDS = 7
ROUND_SECONDS = 0.03  # that a round takes at least, where calls allow it
MAX_CALLS = 400
_TRACING = threading.Lock()


@dataclass(frozen=True)
class Ceilings:
    """What this device was measured to do at most, in the same run; None where that was not measured."""

    bytes_per_second: float | None = None
    flops_per_second: float | None = None

    def shares(self, seconds: float, *, num_bytes: float | None = None, flops: float | None = None) -> dict[str, Any]:
        """`bandwidth` and `flops` of a record: what was moved and computed in some seconds, as shares of the most."""
        found: dict[str, Any] = {}
        if num_bytes is not None and self.bytes_per_second:
            found["bandwidth"] = num_bytes / seconds / self.bytes_per_second
        if flops is not None and self.flops_per_second:
            found["flops"] = flops / seconds / self.flops_per_second
        return found

    @classmethod
    def of(cls, figures: Mapping[str, float | None]) -> "Ceilings":
        """From the arguments of a job."""
        return cls(**figures)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over rounds, and how far the rounds lie apart."""

    seconds: float
    spread: float  # of the slowest round over the quickest, less 1
    calls: int  # a round

    @property
    def figures(self) -> dict[str, float]:
        return {"seconds": self.seconds, "spread": self.spread, "calls_a_round": self.calls, "rounds": ROUNDS}


def time_calls(run: Callable[[], Any], *, max_calls: int = MAX_CALLS, round_seconds: float = ROUND_SECONDS) -> Timing:
    """Time a function that starts something on the device and returns its arrays; two calls before warm it up."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    once = time.perf_counter() - start
    calls = max(1, min(max_calls, round(round_seconds / max(once, 1e-6))))
    rounds = [_round(run, calls) for _ in range(ROUNDS)]
    return Timing(statistics.median(rounds), max(rounds) / min(rounds) - 1, calls)


def _round(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / calls


def compiled_as_steps(function: Callable[..., Any], **given: Any) -> jax.stages.Wrapped:
    """`jax.jit`, with the compiler's options that an engine's steps are compiled with on this device."""
    if jax.default_backend() != "gpu":
        return jax.jit(function, **given)
    options = dict(compiler_options(jax.devices()[:1], deterministic=False))
    return jax.jit(function, compiler_options=options, **given)


def compiled(run: jax.stages.Wrapped, **arguments: Any) -> Callable[..., Any]:
    """A jitted function's executable for arguments, or their shapes. One thread at a time traces, since that holds the
    interpreter's lock, while others compile: so the first that began is the first that is done.
    """
    with _TRACING:
        lowered = run.lower(**arguments)
    return lowered.compile()


class Chain:
    """Calls of which each takes over the arrays that the one before it has returned. Mutable; owned by its timing."""

    def __init__(self, step: Callable[[Any], Any], state: Any) -> None:
        """`step` may donate what it is given."""
        self._step = step
        self.state = state

    def __call__(self) -> Any:
        self.state = self._step(self.state)
        return self.state
