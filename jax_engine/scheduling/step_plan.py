"""What a step computes, as the scheduler plans it, and within which limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from jax_engine.core.messages import TokenLogprobs
from jax_engine.kv_cache.host_pool import NO_COPIES, PageCopies
from jax_engine.kv_cache.page_hashes import Digest, digest_function
from jax_engine.kv_cache.page_partitions import UNCUT, PagePartitions
from jax_engine.lora_request import LoRARequest
from jax_engine.scheduling.request import NO_POSITIONS, Request

TAKE_DRAFT = -2  # in place of a draft: the first token that the draft model drafts for the request; -3 the second, ...


class Chunk(msgspec.Struct, frozen=True, gc=False):  # made for every sequence of every step: a dataclass costs 5 times
    """A range of one request's tokens, `start` to `start + length`, and the pages it is the first to need."""

    request: Request
    slot: int
    start: int
    length: int
    num_draws: int  # 0: the range ends before the request's last token; more than 1: the step draws and goes on, alone
    first_new_page: int  # place in the request's pages; 0 when the request has just taken its slot
    new_pages: list[int]  # those that enter the block tables, cached ones included
    scored: range = NO_POSITIONS  # of the prompt's tokens whose log-probabilities it finds, from the rows before them
    drafts: Sequence[int] = ()  # the range's tokens behind its first, which are guessed: one is drawn behind each
    fill: range = NO_POSITIONS  # of the request's tokens that the draft model takes in, to draft behind them


class ChunkFindings(msgspec.Struct, frozen=True, gc=False):
    """What a step found for one chunk beside its tokens."""

    drawn: list[TokenLogprobs] | None = None  # log-probabilities of the tokens drawn, if the request asks
    prompt: list[TokenLogprobs] | None = None  # of the prompt's tokens at `Chunk.scored`
    pooled: bytes | None = None  # the vector of a pooling request, float32


NO_FINDINGS = ChunkFindings()


@dataclass(frozen=True)
class StepPlan:
    """What one step computes. Each of its figures is found once: a step looks at them several times."""

    chunks: Sequence[Chunk]
    copies: PageCopies = NO_COPIES  # of whole pages, before the chunks
    adapter_loads: Sequence[tuple[int, LoRARequest]] = ()  # slots and the adapters that take them, before the chunks

    @cached_property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @cached_property
    def num_steps(self) -> int:
        """How often the device runs the model: once, or as often as the longest of its decodes draws."""
        return max(1, *(chunk.num_draws - len(chunk.drafts) for chunk in self.chunks))

    @cached_property
    def num_draft_rows(self) -> int:
        """Rows that tokens are drawn from, where a range has several; 0: none has."""
        if not any(chunk.drafts for chunk in self.chunks):
            return 0
        return sum(chunk.num_draws for chunk in self.chunks)

    @cached_property
    def waits_for_host(self) -> bool:
        """Whether a request's next step can only be planned when this one's tokens for it are on the host."""
        return any(chunk.drafts for chunk in self.chunks)

    @property
    def draws_later(self) -> bool:
        """Whether a mask for it follows from a token that is still on its way: for as long as its tokens are not drawn,
        the step before is to be collected.
        """
        return any(
            chunk.num_draws and chunk.request.constraint is not None and chunk.request.num_pending > chunk.num_draws
            for chunk in self.chunks
        )


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that the memory plan and the configuration set."""

    num_pages: int
    page_size: int
    max_num_seqs: int
    token_budget: int
    watermark: float = (
        0.01  # share of the pages that admission leaves to running requests, so that it does not preempt at once
    )
    enable_prefix_caching: bool = True
    policy: str = "fcfs"  # of waiting_queue.POLICIES
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step, which the budget must hold
    long_prefill_token_threshold: int = 0  # longest chunk; 0: the budget
    hash_algorithm: str = "sha256"
    partitions: PagePartitions = UNCUT  # of the pages
    num_host_pages: int = 0
    seconds_per_loaded_page: float = 0.0  # from host memory; 0 loads whatever is there
    step_sizes: tuple[int, ...] = ()  # token counts that steps are padded to, ascending, the last the token budget
    windows: tuple[int, ...] = (0,)  # of each cache group, in tokens; 0: none
    draft_sizes: tuple[int, ...] = ()  # token counts that steps with drafts are padded to, ascending
    draft_context: int = 0  # tokens of a sequence that a draft model can see

    @property
    def digest(self) -> Digest:
        """What pages are known by."""
        return digest_function(self.hash_algorithm)
