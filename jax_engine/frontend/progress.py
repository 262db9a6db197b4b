"""What is shown, in a terminal, of things that take long: compiling at the start, and offline inference."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

from jax_engine.frontend.output_processor import RequestState

if TYPE_CHECKING:
    from jax_engine.compilation.compiled_steps import CompiledSteps

REPORT_SECONDS = 0.5  # how often is looked at what is being compiled


@contextmanager
def reports_of_start(tell: "Callable[[int, int, float], object]") -> "Iterator[Callable[[CompiledSteps], None]]":
    """Until the block ends, tell now and then how far the step programs are that its function is given: how many are
    compiled, how many there are to be, and seconds until the last one, 0 where nobody knows. `tell` is called in a
    thread.
    """
    watched: list[CompiledSteps] = []
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(REPORT_SECONDS):
            for compiled in watched:
                tell(compiled.num_ready, len(compiled.programs), compiled.eta)

    thread = threading.Thread(target=report, name="reports of the start")
    thread.start()
    try:
        yield watched.append
    finally:
        ended.set()
        thread.join()


class CompileBar:
    """A bar of step programs, from the first report until the engine serves; only in a terminal. Mutable; owned by
    whoever starts the engine.
    """

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._shown = (0, 0)

    def update(self, num_compiled: int, num_planned: int, eta_seconds: float) -> None:
        """Show what is known by now; drawn again only when it has changed, since other bars may be there."""
        if self._bar is None:
            layout = "{desc}: {n_fmt}/{total_fmt} |{bar:30}| {elapsed}{postfix}"
            self._bar = tqdm(
                total=num_planned, desc="compiling step programs", bar_format=layout, leave=False, disable=None
            )
        elif (num_compiled, round(eta_seconds)) != self._shown:
            self._bar.n = num_compiled
            self._bar.set_postfix_str(f"about {eta_seconds:.0f} s left" if eta_seconds else "", refresh=True)
        self._shown = (num_compiled, round(eta_seconds))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """A progress bar over prompts, with token rates. Mutable; owned by one run."""

    def __init__(self, num_prompts: int, *, show: bool) -> None:
        self._bar = tqdm(
            total=num_prompts,
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not show,
            postfix="est. speed input: 0.00 toks/s, output: 0.00 toks/s",
        )
        self._start = time.monotonic()
        self._num_input_tokens = self._num_output_tokens = 0

    def finish(self, state: RequestState) -> None:
        """Count one prompt as done."""
        self._num_input_tokens += len(state.request.prompt_token_ids)
        self._num_output_tokens += state.num_tokens
        elapsed = max(time.monotonic() - self._start, 1e-9)
        self._bar.postfix = (
            f"est. speed input: {self._num_input_tokens / elapsed:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed:.2f} toks/s"
        )
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
