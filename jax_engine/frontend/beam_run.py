"""A beam search in an engine: each step, one request for each beam, of one token and the likeliest in its place.

A beam's request begins with all that the beam has so far, and finds the pages of that in the prefix cache, the one that
it ends in included (`tail_pages`): it computes its newest token, and beams share the pages of what they have in common.
Without prefix caching, the whole beam is computed again each step.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from jax_engine.frontend.beam_search import (
    BeamSearch,
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    Hypothesis,
)
from jax_engine.frontend.detokenizer import IncrementalDetokenizer
from jax_engine.frontend.processor import InputProcessor, PreparedRequest, Prompt, TokensPrompt, checked_salt
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.lora_request import LoRARequest
from jax_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jax_engine.sampling_params import SamplingParams


class BeamRun:
    """The search from one prompt. Mutable; owned by whoever runs its requests: until `done`, those of `requests`, whose
    finished outputs go to `advance`.
    """

    def __init__(
        self,
        inputs: InputProcessor,
        tokenizer: Tokenizer,
        request_id: str,
        prompt: Prompt,
        params: BeamSearchParams,
        *,
        priority: int = 0,
        lora: LoRARequest | None = None,
    ) -> None:
        """Raises ValueError for a bad prompt, or for a search that is too wide or too long for the engine."""
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._params = params
        self._search = BeamSearch(params, inputs.eos_token_ids)
        spare = inputs.max_logprobs - self._search.num_logprobs
        if spare < 0:
            raise ValueError(
                f"beam_width={params.beam_width} needs the {self._search.num_logprobs} likeliest tokens of each beam, "
                f"and max_logprobs={inputs.max_logprobs}; lower it to at most {params.beam_width + spare}, or start "
                "the engine with a larger max_logprobs"
            )
        # How a beam is gone on with: of its next token, no more is asked than which are the likeliest.
        self._step = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=self._search.num_logprobs)
        self._priority = priority
        self._lora = lora
        whole = replace(self._step, max_tokens=params.max_tokens)
        self._prompt = inputs.prepare(request_id, prompt, whole, priority=priority, lora=lora)
        self._salt = checked_salt(prompt)
        self._num_requests = 0
        self._first: RequestOutput | None = None
        self._last: RequestOutput | None = None

    @property
    def done(self) -> bool:
        return not self._search.beams

    def requests(self) -> list[PreparedRequest]:
        """One for each beam, with ids that begin with the search's own."""
        return [self._request([*self._prompt.prompt_token_ids, *beam.token_ids]) for beam in self._search.beams]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Take the outputs of the latest requests, in their order."""
        positions = [(output.outputs[0].logprobs or [{}])[0] for output in outputs]
        self._search.advance(positions)
        self._first, self._last = self._first or outputs[0], outputs[0]

    def output(self) -> RequestOutput:
        """The result as completions, the best first."""
        assert self._first is not None and self._last is not None and self.done
        first, last = self._first.metrics, self._last.metrics
        assert first is not None and last is not None
        return RequestOutput(
            request_id=self._prompt.request_id,
            prompt=self._prompt.prompt,
            prompt_token_ids=self._prompt.prompt_token_ids,
            outputs=[self._completion(index, found) for index, found in enumerate(self._search.hypotheses)],
            finished=True,
            metrics=RequestMetrics(
                arrival_time=self._prompt.arrival_time,
                first_scheduled_time=first.first_scheduled_time,
                first_token_time=first.first_token_time,
                last_token_time=last.last_token_time,
            ),
            num_cached_tokens=self._first.num_cached_tokens,
        )

    def sequences(self) -> BeamSearchOutput:
        """The result as vLLM's sequences, which begin with the prompt."""
        output = self.output()
        prompt = output.prompt if output.prompt is not None else self._tokenizer.decode(output.prompt_token_ids)
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    tokens=[*output.prompt_token_ids, *completion.token_ids],
                    logprobs=completion.logprobs or [],
                    cum_logprob=found.beam.cumulative_logprob,
                    text=prompt + completion.text,
                    finish_reason=found.finish_reason,
                    stop_reason=completion.stop_reason,
                    score=found.score,
                )
                for found, completion in zip(self._search.hypotheses, output.outputs, strict=True)
            ]
        )

    def _request(self, token_ids: list[int]) -> PreparedRequest:
        given: TokensPrompt = {"prompt_token_ids": token_ids}
        if self._salt is not None:
            given["cache_salt"] = self._salt
        self._num_requests += 1
        name = f"{self._prompt.request_id}-{self._num_requests}"
        prepared = self._inputs.prepare(name, given, self._step, priority=self._priority, lora=self._lora)
        (core_request,) = prepared.core_requests
        return replace(prepared, core_requests=(msgspec.structs.replace(core_request, branches=True),))

    def _completion(self, index: int, found: Hypothesis) -> CompletionOutput:
        token_ids, end = list(found.beam.token_ids), None
        if found.finish_reason == "stop":
            end = token_ids[-1]
            if not self._params.include_stop_str_in_output:
                token_ids.pop()
        prompt = self._prompt.prompt_token_ids
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=True, prompt_token_ids=prompt)
        return CompletionOutput(
            index=index,
            text=detokenizer.push(token_ids) + detokenizer.flush(),
            token_ids=token_ids,
            finish_reason=found.finish_reason,
            stop_reason=end,
            cumulative_logprob=found.beam.cumulative_logprob,
            logprobs=list(found.beam.logprobs[: len(token_ids)]),
        )
