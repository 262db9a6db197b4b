"""What a request's grammar lets come next, as bitmasks.

A request with a grammar waits until it is compiled. From then on each of its steps is planned when the token of the
step before is on the host and the mask that follows from it is made (`GrammarConstraint.is_ready`).

Most masks take a few microseconds, less than it takes to wake a thread: they are made at once. Those of a grammar whose
latest one took long are made in a thread.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jax_engine.core.messages import CoreRequest, Vocabulary
from jax_engine.grammar.bitmasks import ALL_TOKENS, has_bit, num_words, pack_bits
from jax_engine.grammar.grammars import error_of, make_mask, new_matcher
from jax_engine.grammar.thinking import Thinking
from jax_engine.scheduling.request import Request

if TYPE_CHECKING:
    from llguidance import LLMatcher

STACK_BYTES = 64 * 2**20  # what compiles on the stack of `grammar_process` does so on this one
NUM_KEPT_MATCHERS = 64
SLOW_SECONDS = 1e-3
MADE: Future[None] = Future()
MADE.set_result(None)


class GrammarConstraint:
    """A grammar, and the thinking before it, as far as one request's output has come. Mutable; owned by its `Request`.

    Only an end-of-sequence id ends the output, and it is allowed exactly where the grammar accepts; before `min_tokens`
    it is not allowed where the grammar can go on, nor are the request's stop ids.
    """

    def __init__(self, matcher: "LLMatcher | None", asked: CoreRequest, vocabulary: Vocabulary) -> None:
        """`matcher` is None where only the thinking before the output is to be minded."""
        assert asked.structured is not None
        self.error: str | None = None  # why it cannot be followed any further
        self.matcher = matcher
        self._min_tokens = asked.structured.min_tokens
        self._vocab_size = vocabulary.size
        self.num_words = num_words(vocabulary.size)  # of a mask
        ends = {*asked.eos_token_ids, *asked.stop_token_ids}
        self._goes_on = ~pack_bits(tuple(ends), vocabulary.size)
        asked_thinking = asked.structured.thinking
        held_back = asked.eos_token_ids if matcher is not None else ()  # what is to have a form does not end before it
        self._thinking = Thinking(asked_thinking, vocabulary.size, held_back) if asked_thinking else None
        self._num_tokens = 0
        self._new_tokens: list[int] = []
        self.is_slow = False  # the latest mask took long
        # The next mask: a row of those that were made together.
        self._masks, self._row = self._goes_on[None], 0
        self._making: Future[None] | None = None

    @property
    def is_quick(self) -> bool:
        """Whether the next mask is expected to take a short time."""
        return not self.is_slow

    @property
    def allows_drafts(self) -> bool:
        """Whether the masks behind drafts can be made, and take no long time."""
        is_thinking = self._thinking is not None and not self._thinking.is_over
        return self.matcher is not None and not is_thinking and not self.is_slow

    @property
    def is_behind(self) -> bool:
        """Whether the mask of the next token is neither made nor being made."""
        return self._making is None

    @property
    def is_ready(self) -> bool:
        """Whether the mask of the next token is made."""
        return self._making is not None and self._making.done()

    def made(self) -> tuple[NDArray[np.uint32], int]:
        """The bitmask of the tokens that may come next, as a row of an array `[..., words]`; waits until it is made."""
        assert self._making is not None
        if self._making is not MADE:
            self._making.result()
        return self._masks, self._row

    def fill(self, rows: NDArray[np.uint32], drafts: Sequence[int]) -> None:
        """Write that bitmask, and those of the tokens behind each draft, as far as they are allowed."""
        masks, row = self.made()
        matcher, mask = self.matcher, masks[row]
        rows[0] = mask[: rows.shape[1]]
        assert matcher is not None and (self._thinking is None or self._thinking.is_over), "`allows_drafts` said so"
        start, num_taken = time.perf_counter(), 0
        for draft in drafts:
            # One that ends the output needs nothing behind it.
            if not has_bit(mask & self._goes_on, draft) or not matcher.consume_token(draft):
                break
            num_taken += 1
            mask = self._held(make_mask(matcher, self._vocab_size), self._num_tokens + num_taken)
            rows[num_taken] = mask[: rows.shape[1]]
        if num_taken:
            matcher.rollback(num_taken)
            self.is_slow = time.perf_counter() - start > num_taken * SLOW_SECONDS

    def advance(self, tokens: list[int]) -> None:
        """Take tokens that the request was given; the next mask is made by `Constraints.make_masks`."""
        self._new_tokens += tokens
        self._num_tokens += len(tokens)
        self._making = None

    def expect(self, making: "Future[None]") -> None:
        """The next mask is made, or being made. For `Constraints`."""
        self._making = making

    def make(self, masks: NDArray[np.uint32], row: int, address: int) -> None:
        """Take the new tokens into account, and make the next mask, in a row of an array and at that row's address. For
        `Constraints`.
        """
        new, self._new_tokens = self._new_tokens, []
        if self._thinking is not None:
            new = self._thinking.take(new)
        matcher = self.matcher
        if matcher is None:
            masks[row] = ALL_TOKENS
        else:
            if new and not matcher.consume_tokens(new):
                self.error = error_of(matcher) or "the grammar does not allow the token that was drawn"
            matcher.unsafe_compute_mask_ptr(address, 4 * self.num_words)
            if matcher.is_error():
                self.error = self.error or error_of(matcher)
        if self._num_tokens < self._min_tokens:
            masks[row] = self._held(masks[row], self._num_tokens)
        if self._thinking is not None and not self._thinking.is_over:
            masks[row] = self._thinking.mask(masks[row].copy())  # it keeps what the form allows
        self._masks, self._row = masks, row

    def _held(self, mask: NDArray[np.uint32], num_tokens: int) -> NDArray[np.uint32]:
        """A mask without what ends the output, before `min_tokens` and where others are left."""
        if num_tokens < self._min_tokens and (held := mask & self._goes_on).any():
            return held
        return mask


class Constraints:
    """Compiles the grammars of new requests and makes the masks of running ones. Mutable; owned by the engine core."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None
        self._compiling: dict[str, tuple[CoreRequest, Future[GrammarConstraint]]] = {}  # in the order they came
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None  # one compiles, one makes masks
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()  # at their start; the compiler thread's
        self._making: Future[None] | None = None

    def __len__(self) -> int:
        """Requests whose grammars are being compiled."""
        return len(self._compiling)

    def take_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Have what the grammars of requests that come later are about; all front ends send the same."""
        self._vocabulary = vocabulary
        if self._threads is None:
            self._threads = _thread("grammars"), _thread("masks")

    def begin(self, asked: CoreRequest) -> None:
        """Compile a request's grammar."""
        assert self._threads is not None and self._vocabulary is not None, "the vocabulary comes first"
        future = self._threads[0].submit(self._compile, asked, self._vocabulary)
        self._compiling[asked.request_id] = asked, future

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget those among these requests whose grammars are being compiled."""
        for request_id in request_ids:
            self._compiling.pop(request_id, None)

    def take_compiled(self) -> list[tuple[CoreRequest, GrammarConstraint | str]]:
        """The requests whose grammars are ready, in the order they came; or why one is not."""
        ready: list[tuple[CoreRequest, GrammarConstraint | str]] = []
        while self._compiling:
            request_id, (asked, future) = next(iter(self._compiling.items()))
            if not future.done():
                break
            del self._compiling[request_id]
            error = future.exception()
            ready.append((asked, future.result() if error is None else f"its grammar cannot be followed: {error}"))
        self.make_masks([constraint for _, constraint in ready if not isinstance(constraint, str)])
        return ready

    def go_on(self, requests: Iterable[Request]) -> None:
        """Begin to make the next masks of those that have a grammar and were given a token."""
        self.make_masks(
            [
                constraint
                for request in requests
                if (constraint := request.constraint) is not None
                and isinstance(constraint, GrammarConstraint)
                and constraint.is_behind
                and request.finish_reason is None
            ]
        )

    def make_masks(self, constraints: Sequence[GrammarConstraint]) -> None:
        """Make the next masks of these, or begin to, for their `fill`."""
        slow = [constraint for constraint in constraints if constraint.is_slow]
        if slow:
            assert self._threads is not None
            self._making = self._threads[1].submit(_make, slow)
            for constraint in slow:
                constraint.expect(self._making)
            constraints = [constraint for constraint in constraints if constraint not in slow]
        _make(constraints)
        for constraint in constraints:
            constraint.expect(MADE)

    def wait_for_masks(self, seconds: float) -> None:
        """Return when the masks are made, or after that many seconds."""
        if self._making is not None and not self._making.done():
            wait([self._making], seconds)

    def wait(self, seconds: float) -> None:
        """Return when the masks are made, or else the next grammar is compiled, or after that many seconds."""
        self.wait_for_masks(seconds)
        if self._compiling and (self._making is None or self._making.done()):
            wait([next(iter(self._compiling.values()))[1]], seconds)

    def shutdown(self) -> None:
        """Let the threads end."""
        for thread in self._threads or ():
            thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, asked: CoreRequest, vocabulary: Vocabulary) -> GrammarConstraint:
        assert asked.structured is not None
        grammar = asked.structured.grammar
        if not grammar:
            return GrammarConstraint(None, asked, vocabulary)
        if grammar not in self._matchers:
            self._matchers[grammar] = new_matcher(grammar, vocabulary)
            self._matchers[grammar].compute_bitmask()  # which takes longer than the next ones; its copies have it
            if len(self._matchers) > NUM_KEPT_MATCHERS:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(grammar)
        return GrammarConstraint(self._matchers[grammar].deep_copy(), asked, vocabulary)


def _make(constraints: Sequence[GrammarConstraint]) -> None:
    """Make masks, one behind another in one array: looking for an array's address takes as long as some masks."""
    if not constraints:
        return
    masks = np.zeros((len(constraints), constraints[0].num_words), np.uint32)
    address, stride, clock = masks.ctypes.data, masks.strides[0], time.perf_counter
    start = clock()
    for row, constraint in enumerate(constraints):
        constraint.make(masks, row, address + row * stride)
        end = clock()
        constraint.is_slow = end - start > SLOW_SECONDS
        start = end


def _thread(name: str) -> ThreadPoolExecutor:
    """One thread, with a large stack."""
    usual = threading.stack_size(STACK_BYTES)
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    pool.submit(int).result()  # it starts with what it is given first
    threading.stack_size(usual)
    return pool
