"""The progress bar of offline inference."""

import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from jax_engine.output_processor import RequestState


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
