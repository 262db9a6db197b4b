"""Step programs and their executables: the only place that compiles.

The largest program is compiled first, and from then on the engine serves, because every step can be padded into it.
The others follow in background threads, in the order in which they help most. A step never waits for a compile: it
takes the smallest program that is ready and large enough. Programs of the FULL sampling mode come last: most engines
are never asked for it.

An executable for a CPU takes some 40 memory maps for each layer that is not scanned. Linux lets a process have 65,530
by default, and where there are no more XLA's compiler crashes; compiling ends before that.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import jax

from jax_engine.execution.step_program import Program
from jax_engine.sampling.sampler import LOOPING_MODES, SamplingMode

logger = logging.getLogger(__name__)

MAX_DEFAULT_THREADS = 4  # a compile of a large program takes gigabytes of host memory
MOST_MEMORY_MAPS = 0.75  # of those that Linux allows: the rest is for arrays, threads and the compiler itself


class Agree(Protocol):
    """See `group.Group.agree`."""

    def __call__(self, number: int, *, ok: bool) -> bool: ...


class CompiledSteps:
    """Programs, compiled once each. Mutable; owned by the runner; background threads add to it."""

    def __init__(
        self,
        programs: Iterable[Program],
        lower: Callable[[Program], jax.stages.Lowered],
        *,
        threads: int | None = None,
        most_memory_maps: float = MOST_MEMORY_MAPS,
        load: Callable[[Program], jax.stages.Compiled] | None = None,
        agree: Agree | None = None,
    ) -> None:
        """`programs` are all there will be, of each size one in SAMPLE mode at least; `lower` traces one; `threads`
        compile at once (None: half of the processor's cores, `MAX_DEFAULT_THREADS` at most), until the process
        has the share `most_memory_maps` of those it may have. With `load`, executables come from there instead: nothing
        is traced or compiled, and `seconds` stays 0. Of several processes that run the same programs, each says by
        `agree` which it has and which it never will, and one is in use once all have it.
        """
        self._lower = lower
        self._load = load
        self._agree = agree
        self._most_memory_maps = most_memory_maps
        self.programs = compile_order(programs)
        self._numbers = {program: number for number, program in enumerate(self.programs)}
        self._loops = sorted(program for program in self.programs if program.num_steps > 1)
        self._can_draft: set[bool] = set()  # in the FULL mode, or not
        self._with_drafts = [program for program in self.programs if program.draft_rows and not program.is_draw]
        own = [program for program in self.programs if not program.num_drafts and not program.is_draw]
        self._all_draw_behind_drafts = len(own) == len(self._with_drafts)
        self._of_draft_model = sorted(program for program in self.programs if program.num_drafts)
        self.num_threads = threads or min(MAX_DEFAULT_THREADS, max(1, (os.cpu_count() or 1) // 2))
        self._executables: dict[Program, jax.stages.Compiled] = {}
        self._seconds: dict[Program, float] = {}
        self._by_mode: dict[SamplingMode, list[Program]] = {}
        self._queue: deque[Program] = deque()
        self._left_out: set[Program] = set()
        self._at_hand: set[Program] = set()  # of background threads
        # Tracing holds the interpreter's lock, which steps need too: one thread at a time, while others compile.
        self._tracing = threading.Lock()
        self._changing = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure: jax.errors.JaxRuntimeError | None = None  # the first
        self._started = self._last_done = 0.0
        self._num_done = self._num_queued = 0
        self.seconds = 0.0
        self.num_in_request_path = 0

    @property
    def largest(self) -> Program:
        return self.programs[0]

    @property
    def num_ready(self) -> int:
        return len(self._executables)

    @property
    def executables(self) -> dict[Program, tuple[jax.stages.Compiled, float]]:
        """What is ready, each with the seconds that it took to trace and compile."""
        with self._changing:
            return {program: (compiled, self._seconds[program]) for program, compiled in self._executables.items()}

    @property
    def eta(self) -> float:
        """Seconds until the last program is ready, by the pace so far; 0 once nothing is being compiled."""
        left = self._num_queued - self._num_done
        if not left or self._stop.is_set():
            return 0.0
        if self._num_done:
            pace = (self._last_done - self._started) / self._num_done
            since = time.monotonic() - self._last_done
        else:  # as for the largest
            pace, since = self.seconds / max(self.num_ready, 1) / self.num_threads, time.monotonic() - self._started
        return max(pace * left - since, 0.1)

    def compile_largest(self) -> jax.stages.Compiled:
        """Compile the program that every step fits in, and what draws behind it."""
        return [self._compile(part) for part in self.largest.parts][-1]

    def compile_largest_of_each(self) -> list[jax.stages.Compiled]:
        """Compile the largest program, that which loops, that for drafts and that of the FULL mode, with what draws
        behind it: one of them takes the most memory.
        """
        full = [program for program in self.programs if program.can_do(SamplingMode.FULL)]
        chosen = dict.fromkeys((self.largest, *self._loops[-1:], *self._with_drafts[:1], *full[:1]))
        return [self._compile(part) for program in chosen for part in program.parts]

    def leave_out(self, programs: Iterable[Program]) -> None:
        """Do not compile these with the rest: their steps are padded into larger ones. For measuring, and before the
        first is compiled.
        """
        self._left_out |= set(programs)

    def compile_rest(self, *, background: bool) -> None:
        """Compile the remaining programs, by themselves or before returning.

        In the background a program that does not compile is only missed: the larger ones serve its steps.

        Raises:
            jax.errors.JaxRuntimeError: a program did not compile, and not in the background.
        """
        unwanted = {*self._executables, *self._left_out}
        self._queue.extend(program for program in self.programs if program not in unwanted)
        self._num_queued = len(self._queue)
        self._started = self._last_done = time.monotonic()
        # Not daemons: the interpreter must not end while the compiler runs, so they watch for the end themselves.
        self._threads = [
            threading.Thread(target=self._compile_queue, name=f"compile {number}")
            for number in range(self.num_threads if background else self.num_threads - 1)
        ]
        for thread in self._threads:
            thread.start()
        if background:
            return
        try:
            self._compile_queue()
        finally:  # interrupted: the other threads are to end too
            self._stop.set()
            self.wait()
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until background compilation has ended."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """End background compilation after the programs it is at."""
        self._stop.set()
        self.wait()

    def num_steps(self, num_decodes: int) -> int:
        """How many steps a program can loop over for so many decodes: 1 while that of their bucket is not compiled."""
        widest = LOOPING_MODES[-1]
        fitting = [loop for loop in self._loops if loop.mode is widest and loop.bucket.num_sequences >= num_decodes]
        if not fitting or fitting[0] not in self._executables:
            return 1
        return fitting[0].num_steps

    def can_draft(self, *, full: bool) -> bool:
        """Whether the programs for steps with drafts are there, in the FULL mode or the one before it: all, so that no
        step is padded into one far larger.
        """
        if full not in self._can_draft:
            of_mode = [program for program in self._with_drafts if (program.mode is SamplingMode.FULL) == full]
            programs = (of_mode or self._with_drafts) + self._of_draft_model
            if not programs or not all(map(self._is_ready, programs)):
                return False
            self._can_draft.add(full)
        return True

    def find(
        self, num_tokens: int, num_sequences: int, mode: SamplingMode, *, num_steps: int = 1, draft_rows: int = 0
    ) -> tuple[Program, jax.stages.Compiled]:
        """The smallest program that is ready and can run a step of this size and mode; `num_steps` above 1, which
        `num_steps` has allowed, loops; `draft_rows` above 0, which `can_draft` has allowed, are drawn from.
        """
        least_rows = max(draft_rows, self._all_draw_behind_drafts)
        for program in self._by_mode.get(mode, ()):
            if program.holds(num_tokens, num_sequences, num_steps, least_rows):
                return program, self._executables[program]
        assert (num_steps, draft_rows) == (1, 0), "no program loops over so many steps, or has so many drafts, yet"
        largest = self._largest_of(mode)
        assert largest.bucket.holds(num_tokens, num_sequences), "the scheduler's limits and the lattice disagree"
        if not self._is_ready(largest):
            self.num_in_request_path += 1
            for part in largest.parts:
                if part not in self._executables:
                    self._compile(part, everywhere=False)
        return largest, self._executables[largest]

    def find_draft(self, num_tokens: int, num_sequences: int) -> tuple[Program, jax.stages.Compiled]:
        """The smallest program of the draft model that holds so much, which `can_draft` has allowed."""
        fitting = (program for program in self._of_draft_model if program.bucket.holds(num_tokens, num_sequences))
        program = next(fitting)
        return program, self._executables[program]

    def number_of(self, program: Program) -> int:
        """Its place in `programs`."""
        return self._numbers[program]

    def executable(self, number: int) -> jax.stages.Compiled:
        """That of a program, which `find` has given here or in the process that leads, by its number."""
        program = self.programs[number]
        if program not in self._executables:  # there it was compiled in the path of a request
            self._compile(program, everywhere=False)
        return self._executables[program]

    def is_coming(self, mode: SamplingMode) -> bool:
        """Whether no program is ready for steps of a mode and a background thread compiles one, next from now on. Steps
        of that mode can wait for it while others run.
        """
        largest = self._largest_of(mode)
        with self._changing:
            if self._is_ready(largest) or self._stop.is_set():
                return False
            parts = [part for part in largest.parts if part not in self._executables]
            for part in parts:
                if part in self._queue:
                    self._queue.remove(part)
                    self._queue.appendleft(part)
            return all(part in self._queue or part in self._at_hand for part in parts)

    def _is_ready(self, program: Program) -> bool:
        """Whether it is there, and so is what draws behind it."""
        return all(part in self._executables for part in program.parts)

    def _largest_of(self, mode: SamplingMode) -> Program:
        """The program that every step of a mode fits in."""
        return next(program for program in self.programs if program.can_do(mode))

    def _compile_queue(self) -> None:
        """Compile what is queued until nothing is left, or `stop` is called, or the interpreter ends."""
        while not self._stop.is_set() and threading.main_thread().is_alive():
            with self._changing:
                if not self._queue:
                    return
                program = self._queue.popleft()
                self._at_hand.add(program)
            if (share := share_of_memory_maps()) > self._most_memory_maps:
                self._leave_out(program, share)
                return
            try:
                self._compile(program)
            except jax.errors.JaxRuntimeError as error:
                logger.exception("the step program %s did not compile; its steps are padded to a larger one", program)
                self._failure = self._failure or error
                self._never_have(program)
            finally:
                with self._changing:
                    self._at_hand.remove(program)
                    self._num_done += 1
                    self._last_done = time.monotonic()
                    self._log_progress()

    def _leave_out(self, program: Program, share: float) -> None:
        """Compile no more, and say why."""
        self._never_have(*(other for other in self.programs if other not in self._executables))
        with self._changing:
            if not self._stop.is_set():
                logger.warning(
                    "%d of %d step programs stay uncompiled, such as %s, and their steps are padded to larger ones: "
                    "the process has %.0f %% of the memory maps it may have; raise vm.max_map_count (sysctl), or set "
                    "scan_layers=True for smaller programs",
                    len(self.programs) - self.num_ready,
                    len(self.programs),
                    program,
                    100 * share,
                )
            self._stop.set()

    def _log_progress(self) -> None:
        if self._num_done == self._num_queued:
            logger.info(
                "%d of %d step programs %s, in %.1f s",
                self.num_ready,
                len(self.programs),
                "compiled" if self._load is None else "loaded",
                self._last_done - self._started,
            )
            return
        logger.log(
            logging.INFO if self._num_done % 4 == 0 else logging.DEBUG,
            "compiled %d of %d step programs, about %.0f s left",
            self.num_ready,
            len(self.programs),
            self.eta,
        )

    def _never_have(self, *programs: Program) -> None:
        """Have no process use them."""
        for program in programs:
            if self._agree is not None:
                self._agree(self._numbers[program], ok=False)

    def _compile(self, program: Program, *, everywhere: bool = True) -> jax.stages.Compiled:
        """Compile a program and put it to use: `everywhere`, once all processes have it, if they all will."""
        if self._load is not None:
            executable, seconds = self._load(program), 0.0
        else:
            with self._tracing:
                start = time.monotonic()
                lowered = self._lower(program)
            executable = lowered.compile()
            seconds = time.monotonic() - start
        if everywhere and self._agree is not None and not self._agree(self._numbers[program], ok=True):
            return executable
        with self._changing:
            self.seconds += seconds
            self._seconds[program] = seconds
            self._executables[program] = executable
            # A program serves its own mode and those it contains. New lists: `find` never sees one half-sorted.
            modes = list(SamplingMode)
            for mode in modes:
                ready = [other for other in self._executables if other.can_do(mode) and self._is_ready(other)]
                self._by_mode[mode] = sorted(ready, key=lambda other: (other.bucket, modes.index(other.mode)))
        return executable


def share_of_memory_maps() -> float:
    """This process's memory maps, as a share of those that Linux allows it; 0 where that cannot be told."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        return Path("/proc/self/maps").read_bytes().count(b"\n") / limit
    except OSError:  # not Linux
        return 0.0


def compile_order(programs: Iterable[Program]) -> list[Program]:
    """The largest first, and then always one in the middle of the widest gap: any step soon has a program not much
    larger than itself. A mode that can do more serves the others too, so it goes before them; then come loops, what has
    drafts, and at last the FULL mode, each with what draws behind it.
    """
    ascending, modes = sorted(program for program in programs if not program.is_draw), list(SamplingMode)
    has_others = any(program.mode is not SamplingMode.FULL and not program.num_drafts for program in ascending)

    def kind(program: Program) -> tuple[bool, bool, bool, int, int]:
        is_full, drafts = has_others and program.mode is SamplingMode.FULL, program.num_drafts > 0
        return is_full, drafts or program.draft_rows > 0, drafts, program.num_steps, -modes.index(program.mode)

    ordered = [
        program
        for one in sorted({kind(program) for program in ascending})
        for program in _by_halves([other for other in ascending if kind(other) == one])
    ]
    return list(dict.fromkeys(part for program in ordered for part in reversed(program.parts)))


def _by_halves(ascending: Sequence[Program]) -> list[Program]:
    """The last, the first, the one in the middle, those in the middle of the halves, and so on."""
    order = [*ascending[-1:], *ascending[:1]] if len(ascending) > 1 else list(ascending)
    gaps = deque([(0, len(ascending) - 1)])
    while gaps:
        low, high = gaps.popleft()
        middle = (low + high) // 2
        if low < middle < high:
            order.append(ascending[middle])
            gaps += [(low, middle), (middle, high)]
    return order
