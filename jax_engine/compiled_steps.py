"""Step programs and their executables: the only place that compiles.

The largest program is compiled first, and from then on the engine serves, because every step can be padded into it.
The others follow in the background, in the order in which they help most. A step never waits for a compile: it takes
the smallest program that is ready and large enough.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

import jax

from jax_engine.sampler import SamplingMode
from jax_engine.step_batch import Bucket
from jax_engine.step_program import Program

logger = logging.getLogger(__name__)


class CompiledSteps:
    """Programs, compiled once each. Mutable; owned by the runner; a background thread adds to it."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        lower: Callable[[Program], jax.stages.Lowered],
        modes: Collection[SamplingMode] = tuple(SamplingMode),
    ) -> None:
        """`lower` traces a program; `buckets` is the whole lattice, compiled in each of `modes`, the one that can do
        everything among them.
        """
        self._lower = lower
        # The mode that can do everything comes first at each size: it serves until the narrower one is there.
        ordered = sorted(modes, key=list(SamplingMode).index, reverse=True)
        self.programs = [Program(bucket, mode) for bucket in sorted(buckets, reverse=True) for mode in ordered]
        self._executables: dict[Program, jax.stages.Compiled] = {}
        self._by_mode: dict[SamplingMode, list[Program]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.seconds = 0.0
        self.num_in_request_path = 0

    @property
    def largest(self) -> Program:
        return self.programs[0]

    @property
    def num_ready(self) -> int:
        return len(self._executables)

    def compile_largest(self) -> jax.stages.Compiled:
        """Compile the program that every step fits in."""
        return self._compile(self.largest)

    def compile_rest(self, *, background: bool) -> None:
        """Compile the remaining programs, in a thread or before returning."""
        # Small steps gain most from a program of their own size, so they come next.
        rest = sorted(program for program in self.programs if program not in self._executables)
        if not background:
            self._compile_all(rest)
            return
        # Not a daemon: the interpreter must not end while the compiler runs, so the thread watches for the end itself.
        self._thread = threading.Thread(target=self._compile_in_background, args=(rest,), name="compile")
        self._thread.start()

    def wait(self) -> None:
        """Until background compilation has ended."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """End background compilation after the program it is at."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def find(self, num_tokens: int, num_sequences: int, mode: SamplingMode) -> tuple[Program, jax.stages.Compiled]:
        """The smallest program that is ready and can run a step of this size and mode."""
        for program in self._by_mode.get(mode, ()):
            if program.bucket.holds(num_tokens, num_sequences):
                return program, self._executables[program]
        assert self.largest.bucket.holds(num_tokens, num_sequences), "the scheduler's limits and the lattice disagree"
        if self.largest not in self._executables:
            self.num_in_request_path += 1
            self._compile(self.largest)
        return self.largest, self._executables[self.largest]

    def _compile_in_background(self, programs: Sequence[Program]) -> None:
        try:
            self._compile_all(programs)
        except jax.errors.JaxRuntimeError:
            # The larger programs still serve every step.
            logger.exception("a step program did not compile; steps are padded to the %d that did", self.num_ready)

    def _compile_all(self, programs: Sequence[Program]) -> None:
        start = time.monotonic()
        for done, program in enumerate(programs, 1):
            if self._stop.is_set() or not threading.main_thread().is_alive():
                return
            self._compile(program)
            left = (time.monotonic() - start) / done * (len(programs) - done)
            level = logging.INFO if done % 4 == 0 else logging.DEBUG
            logger.log(
                level, "compiled %d of %d step programs, about %.0f s left", self.num_ready, len(self.programs), left
            )
        logger.info("all %d step programs compiled, %.1f s in all", len(self.programs), self.seconds)

    def _compile(self, program: Program) -> jax.stages.Compiled:
        start = time.monotonic()
        executable = self._lower(program).compile()
        self.seconds += time.monotonic() - start
        self._executables[program] = executable
        # A program serves its own mode and the modes it contains. New lists, so that `find` never sees one half-sorted.
        modes = list(SamplingMode)
        for mode in modes[: modes.index(program.mode) + 1]:
            ready = [other for other in self._executables if modes.index(other.mode) >= modes.index(mode)]
            self._by_mode[mode] = sorted(ready, key=lambda other: (other.bucket, modes.index(other.mode)))
        return executable
