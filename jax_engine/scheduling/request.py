"""A request as the scheduler sees it: tokens, pages, and how far it has got."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jax_engine.core.messages import CoreRequest, TokenLogprobs
from jax_engine.kv_cache.page_hashes import Digest, chained_hash, first_hash, sha256

Urgency = tuple[float, int]  # the lower, the sooner; no two requests have the same
NO_POSITIONS = range(0)


class Constraint(Protocol):
    """Which tokens may come next, as a state that goes along with a request's output."""

    error: str | None  # why that can no longer be told; ends the request

    @property
    def is_ready(self) -> bool:
        """Whether `made` need not wait."""

    @property
    def is_quick(self) -> bool:
        """Whether the next mask takes a short time to make, once the token that it follows from is known."""

    @property
    def allows_drafts(self) -> bool:
        """Whether `fill` can tell what may come behind drafts, in a short time."""

    def made(self) -> tuple[NDArray[np.uint32], int]:
        """The bitmask of the tokens that may come next, as a row of an array `[..., words]`: bit v % 32 of word v // 32
        for token v.
        """

    def fill(self, rows: NDArray[np.uint32], drafts: Sequence[int]) -> None:
        """Write that bitmask, and those of what may come behind each of some drafts, `[1 + drafts, words]`. Rows behind
        a draft that may not come are left as they are.
        """

    def advance(self, tokens: list[int]) -> None:
        """Take tokens that the request was given."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence in the engine core. Mutable; owned by the `Scheduler`.

    `tokens` are those known on the host (prompt, then output). Steps that have been launched and not collected add up
    to `num_pending` tokens that exist on the device only: fewer only if one of them ends the request. Step ranges cover
    both.
    """

    asked: CoreRequest
    order: int  # of arrival
    digest: Digest = sha256
    urgency: Urgency = (0.0, 0)  # by the scheduling policy; set once, and kept when it is preempted
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    length_limit: int = field(init=False)  # tokens, prompt and output, at which the request ends
    # Block tables of all cache groups, interleaved: the first pages of all groups, then the second ones (see
    # `KVCacheManager`).
    pages: list[int] = field(default_factory=list)
    # By window: tokens at the front that had left it when its pages were last given up. Those they fill are not held.
    num_outside: dict[int, int] = field(default_factory=dict)
    owner: int = 0  # the partition that its pages are in, where sequences have one (see `PagePartitions`)
    slot: int = -1  # row of the device state while running
    adapter_slot: int = -1  # of its adapter while running
    num_computed: int = 0  # tokens whose keys and values are in the cache once the launched steps have run
    num_once_computed: int = 0  # the most that `num_computed` has been: what lies below is computed again
    num_pending: int = 0
    num_own: int = 0  # tokens up to which its pages are its own to write, from `num_computed` on
    first_scheduled_time: float | None = None
    num_preemptions: int = 0
    num_registered: int = 0  # full pages of tokens, from the first, whose content the pool was told, or knew already
    num_cached_tokens: int = 0  # prompt tokens that the first admission found in the cache
    finish_reason: str | None = None
    constraint: Constraint | None = None  # what its next token has to meet beside `asked`
    num_scored: int = 0  # prompt tokens after the first whose log-probabilities the launched steps find
    prompt_logprobs: list[TokenLogprobs] | None = None  # those found so far, until they are sent; None if nobody asks
    _page_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.asked.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.length_limit = self.num_prompt + self.asked.max_tokens
        controls = self.asked.controls
        if controls is not None and controls.num_prompt_logprobs is not None:
            self.prompt_logprobs = []

    @property
    def length(self) -> int:
        """Tokens known or on their way."""
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next range could cover; 0 when the last token it may have is already on its way."""
        length = len(self.tokens) + self.num_pending
        return length - self.num_computed if length < self.length_limit else 0

    @property
    def num_undrawn(self) -> int:
        """Tokens it may still have beside those known or on their way."""
        return self.length_limit - self.length

    @property
    def waits_for_mask(self) -> bool:
        """Whether its next step cannot be planned for want of a mask: one that takes long, and is not there."""
        if self.constraint is None:
            return False
        return not (self.constraint.is_quick if self.num_pending else self.constraint.is_ready)

    @property
    def is_unscored(self) -> bool:
        """Whether tokens of the prompt have to be run for their log-probabilities, even if the cache has them."""
        return self.prompt_logprobs is not None and self.num_scored < self.num_prompt - 1

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether all of the prompt is to be run, even if the cache has it."""
        controls = self.asked.controls
        return self.is_unscored or (controls is not None and controls.pooling in ("MEAN", "CLS"))

    def score(self, start: int, length: int) -> range:
        """Which prompt tokens' log-probabilities a planned range finds that no step before has: each is found once."""
        if not self.is_unscored:
            return NO_POSITIONS
        assert start <= self.num_scored, "a prompt is scored from its beginning, without gaps"
        first = self.num_scored + 1
        self.num_scored = max(self.num_scored, min(start + length, self.num_prompt - 1))
        return range(first, self.num_scored + 1)

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """All of them, once."""
        found, self.prompt_logprobs = self.prompt_logprobs, None
        return found

    def page_hash(self, index: int, page_size: int) -> bytes:
        """What is known of page `index` by: a hash of its tokens, of all before them, and of the request's salt
        and adapter.

        Its tokens must be known. Hashes are kept, so that each token is hashed once; tokens never change.
        """
        hashes = self._page_hashes
        while len(hashes) <= index:
            start = len(hashes) * page_size
            before = hashes[-1] if hashes else first_hash(self.asked.cache_salt, self.asked.lora, self.digest)
            hashes.append(chained_hash(before, self.tokens[start : start + page_size], self.digest))
        return hashes[index]

    def tail_hash(self, num_tokens: int, page_size: int) -> bytes:
        """What is known of a page that only the last of the request's first `num_tokens` are in, and do not fill. No
        full page's: those have more tokens.
        """
        count = num_tokens // page_size
        before = (
            self.page_hash(count - 1, page_size)
            if count
            else first_hash(self.asked.cache_salt, self.asked.lora, self.digest)
        )
        return chained_hash(before, self.tokens[count * page_size : num_tokens], self.digest)

    def take(self, tokens: Sequence[int], num_draws: int) -> str | None:
        """Take the tokens that a step drew, one by one; the finish reason if the last one ends the request.

        The device has stopped at that one, too, short of the `num_draws` that were asked of it.
        """
        if num_draws == 1 and len(tokens) == 1:
            reason = self.append(tokens[0])
        else:
            reasons = [self.append(token) for token in tokens]
            ends = next((index for index, reason in enumerate(reasons, 1) if reason is not None), num_draws)
            assert len(tokens) == ends <= num_draws, f"host and device disagree on where {self.asked.request_id} ends"
            reason = reasons[-1]
        if reason is not None:
            # Its last token was not run, whatever the step had room for: its keys and values may not be there.
            self.num_computed = min(self.num_computed, len(self.tokens) - 1)
        return reason

    def append(self, token: int) -> str | None:
        """Take one new token from the device; the finish reason if it is the last."""
        self.tokens.append(token)
        asked = self.asked
        num_output = len(self.tokens) - self.num_prompt
        if self.constraint is not None and self.constraint.error is not None:
            self.finish_reason = "error"
        elif num_output >= asked.min_tokens and (token in asked.eos_token_ids or token in asked.stop_token_ids):
            self.finish_reason = "stop"
        elif num_output >= asked.max_tokens:
            self.finish_reason = "stop" if asked.pools else "length"
        elif (
            asked.repetition is not None
            and num_output >= asked.min_tokens
            and asked.repetition.found_in(self.tokens, self.num_prompt)
        ):
            self.finish_reason = "repetition"
        elif self.constraint is not None:
            self.constraint.advance([token])
        return self.finish_reason
