"""Online inference: requests come and go at any time, outputs stream, the engine core runs in its own process."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jax_engine.config import EngineConfig
from jax_engine.core.admin_client import is_named
from jax_engine.core.core_client import CoreConnection, EngineDeadError, OnProgress
from jax_engine.core.messages import AbortNamed
from jax_engine.core.replicas import Replicas, end_cores, start_cores, wait_until_ready
from jax_engine.core.stats import EngineStats, total
from jax_engine.frontend.beam_run import BeamRun
from jax_engine.frontend.beam_search import BeamSearchParams
from jax_engine.frontend.beam_stream import BeamStream
from jax_engine.frontend.output_processor import OutputProcessor, RequestState
from jax_engine.frontend.pooling_requests import prepare_request
from jax_engine.frontend.processor import InputProcessor, ModelText, PreparedRequest, Prompt, TextPrompt
from jax_engine.frontend.request_stream import RequestStream
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.lora_request import LoRARequest
from jax_engine.outputs import RequestOutput
from jax_engine.pooling_params import RequestParams
from jax_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokenizing takes about 1 µs a character: longer texts do it in a thread, so that no stream waits for more than this.
LONG_TEXT_CHARACTERS = 2000


class AsyncLLM:
    """An engine for serving: one core, or `data_parallel_size` of them, each request in one. Mutable; belongs to one
    event loop. Make it with `start`, or with `attach`.
    """

    def __init__(
        self, config: EngineConfig, cores: Sequence[CoreConnection], text: ModelText, *, number: int = 0, count: int = 1
    ) -> None:
        """Use `start` or `attach`."""
        self.config = config
        self._replicas = Replicas(cores, config)
        self.info = self._replicas.info
        self.model_path = text.path
        self.tokenizer = text.tokenizer
        self.dead_reason: str | None = None
        self._inputs = InputProcessor(
            text,
            self.info,
            seed=config.seed,
            scheduling_policy=config.scheduling_policy,
            max_logprobs=config.max_logprobs,
            enable_lora=config.enable_lora,
            numbers=itertools.count(number, count),
        )
        self.check_form = self._inputs.check_form  # for a thread: it takes as long as compiling a grammar
        self._outputs = OutputProcessor(text.tokenizer)
        self.token_texts = self._outputs.texts
        self._streams: dict[str, RequestStream] = {}
        self.admin, self.adapters = self._replicas.admin, self._replicas.adapters
        self.views = self._replicas.views  # of each replica
        self._dead_callbacks: list[Callable[[str], object]] = []
        self._receiving = [
            asyncio.create_task(self._receive(replica), name=f"outputs of engine {replica}")
            for replica in range(len(self._replicas))
        ]
        for task in self._receiving:
            task.add_done_callback(self._receiving_ended)

    @classmethod
    async def start(cls, config: EngineConfig, *, on_progress: OnProgress | None = None) -> "AsyncLLM":
        """Start the engine core and load the tokenizer meanwhile; returns when requests can be served. `on_progress` is
        told now and then how far the core is.

        Raises:
            ValueError: the model or the settings cannot be served.
            EngineDeadError: the core failed for another reason.
        """
        # First of all, so that a model of the hub is fetched once and not by both processes.
        await asyncio.to_thread(resolve_model_path, config.model, revision=config.revision)
        starting = asyncio.create_task(start_cores(config, on_progress))
        try:
            text = await asyncio.to_thread(ModelText.load, config)
            cores = await starting
        except BaseException:
            starting.cancel()
            await asyncio.wait({starting})
            if not starting.cancelled() and starting.exception() is None:
                await end_cores(starting.result(), timeout=0)
            raise
        return cls(config, cores, text)

    @classmethod
    async def attach(
        cls,
        config: EngineConfig,
        cores: Sequence[CoreConnection],
        *,
        number: int,
        count: int,
        on_progress: OnProgress | None = None,
    ) -> "AsyncLLM":
        """Front end `number` (from 0) of `count` to cores that someone else starts and ends; returns when they serve.
        `on_progress` is told now and then how far they are.

        Raises:
            ValueError: the model or the settings cannot be served.
            EngineDeadError: the core failed for another reason.
        """
        text, _ = await asyncio.gather(asyncio.to_thread(ModelText.load, config), wait_until_ready(cores, on_progress))
        return cls(config, cores, text, number=number, count=count)

    @property
    def is_dead(self) -> bool:
        """Whether no request can be served any more; `dead_reason` says why."""
        return self.dead_reason is not None

    async def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: RequestParams,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
    ) -> RequestStream:
        """Begin a request; its outputs come by the stream. With `PoolingParams` there is one, with `pooled`.

        Raises:
            ValueError: a bad prompt or parameter, or an id that a running request has.
            EngineDeadError: the engine core has died.
        """
        prepared = await self.prepare(request_id, prompt, params, lora_request, priority=priority)
        (stream,) = self.add_prepared([prepared])
        return stream

    async def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: RequestParams,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
    ) -> PreparedRequest:
        """Check and tokenize a request, for `add_prepared`; raises what `add_request` does."""
        self._check_alive()
        if lora_request is not None:
            await self.add_lora(lora_request)
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        is_long = isinstance(text, str) and len(text) > LONG_TEXT_CHARACTERS
        has_form = isinstance(params, SamplingParams) and params.structured_outputs is not None
        parts = self._inputs, self.config.pooling, request_id, prompt, params
        prepare = partial(prepare_request, *parts, priority=priority, lora=lora_request)
        if is_long or has_form:  # a grammar takes milliseconds to compile, or seconds
            return await asyncio.to_thread(prepare)
        return prepare()

    def add_prepared(self, requests: Sequence[PreparedRequest]) -> list[RequestStream]:
        """Begin requests together; when too many are in flight, none is, and each stream raises a QueueOverflowError.

        Raises:
            ValueError: more sequences than may ever be in flight, or an id that a running request has.
            EngineDeadError: the engine core has died.
        """
        self._check_alive()
        sequences = [sequence for request in requests for sequence in request.core_requests]
        limit = self.config.max_num_queued_reqs
        if limit is not None and len(sequences) > limit:
            raise ValueError(
                f"prompts and n make {len(sequences)} sequences, and max_num_queued_reqs={limit} may be in flight; "
                "ask for fewer at once"
            )
        streams: list[RequestStream] = []
        try:
            streams += map(self._stream, requests)
        except ValueError:
            for stream in streams:
                stream.abort()
            raise
        groups = [request.core_requests for request in requests]
        chosen = self._replicas.add(groups, lambda: self._inputs.vocabulary)
        for stream, replica in zip(streams, chosen, strict=True):
            stream.replica = replica
        return streams

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request as they come, with the errors of `add_request` and of the stream.

        Leaving the iterator early aborts the request.
        """
        stream = await self.add_request(request_id, prompt, sampling_params, lora_request, priority=priority)
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """One output, once the search has ended: its sequences as completions, the best first.

        Errors are those of `generate`; a full queue may end a search in its midst.
        """
        stream = await self.prepare_beam_search(request_id, prompt, params, lora_request, priority=priority)
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    async def prepare_beam_search(
        self,
        request_id: str,
        prompt: Prompt,
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
    ) -> BeamStream:
        """Check and tokenize a search, which runs as its stream is iterated; raises what `add_request` does."""
        self._check_alive()
        if lora_request is not None:
            await self.add_lora(lora_request)
        make = partial(BeamRun, self._inputs, self.tokenizer, request_id, prompt, params)
        run = await asyncio.to_thread(make, priority=priority, lora=lora_request)
        return BeamStream(run, self.add_prepared)

    async def abort(self, request_id: str) -> None:
        """Drop a request; its stream ends with the finish reason "abort". An unknown or finished id is ignored."""
        self._abort(request_id)

    async def reset_prefix_cache(self) -> bool:
        """Forget the keys and values of earlier prompts, as after a change of weights.

        Returns whether it was done: not while requests run. Raises EngineDeadError when the engine core has died.
        """
        self._check_alive()
        return await self.admin.reset_prefix_cache()

    async def add_lora(self, lora_request: LoRARequest) -> None:
        """Have an adapter in the core's host memory, as its first request would.

        Raises:
            ValueError: the adapter cannot be used, or the engine has none.
            EngineDeadError: the engine core has died.
        """
        self._check_alive()
        self._inputs.check_adapter(lora_request)
        await self.adapters.add(lora_request)

    async def remove_lora(self, lora_id: int) -> None:
        """Let go of the adapter of a number; requests that have it keep it. ValueError when there is none."""
        self._check_alive()
        await self.adapters.remove(lora_id)

    async def check_health(self) -> None:
        """Raise EngineDeadError when no request can be served any more."""
        self._check_alive()

    def on_dead(self, callback: Callable[[str], object]) -> None:
        """Call `callback(reason)` when the engine core dies (not at `shutdown`); at once if it has died already."""
        if self.dead_reason is not None:
            callback(self.dead_reason)
        else:
            self._dead_callbacks.append(callback)

    def stats(self) -> EngineStats:
        """The latest counters that the engine core sent; of several, their sums."""
        return total(self._replicas.stats)

    def stats_by_replica(self) -> list[EngineStats]:
        """The latest counters that each engine core sent."""
        return list(self._replicas.stats)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The Hugging Face tokenizer."""
        return self.tokenizer.hugging_face

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults, with what the model's generation_config.json sets of them."""
        return self._inputs.default_params

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TextPrompt:
        """The prompt of a chat, by the model's template or the one given; ValueError when it cannot be rendered."""
        text = self.tokenizer.render_chat(
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return {"prompt": text, "add_special_tokens": False}

    async def shutdown(self) -> None:
        """End the engine core, if it was started here; requests still running get an EngineDeadError."""
        self._dead_callbacks.clear()
        for task in self._receiving:
            task.cancel()
        await asyncio.wait(self._receiving)
        self._die("the engine was shut down")
        await self._replicas.shutdown()

    async def _receive(self, replica: int) -> None:
        """Pass a core's outputs on until it dies."""
        while True:
            step = await self._replicas.receive(replica)
            if isinstance(step, AbortNamed):
                for request_id in [name for name in self._streams if is_named(name, step.request_ids)]:
                    self._abort(request_id)
                continue
            processed = self._outputs.process(step.outputs)
            if processed.stopped:
                self._replicas.abort(processed.stopped)
            for state in processed.changed:
                self._wake(state)
            await asyncio.sleep(0)  # receiving does not wait while steps are queued, and readers must run too

    def _stream(self, request: PreparedRequest) -> RequestStream:
        request_id = request.request_id
        self._streams[request_id] = RequestStream(self._outputs.add(request), lambda: self._abort(request_id))
        return self._streams[request_id]

    def _wake(self, state: RequestState) -> None:
        request_id = state.request.request_id
        self._streams[request_id].wake()
        if state.finished:
            del self._streams[request_id]

    def _receiving_ended(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            return
        error = task.exception()
        if not isinstance(error, EngineDeadError):
            logger.error("the task that passes on the engine's outputs failed", exc_info=error)
            self._die(f"the front end failed: {type(error).__name__}: {error}")
        else:
            self._die(str(error))

    def _die(self, reason: str) -> None:
        """Fail what is running and refuse what comes; only the first reason counts."""
        if self.dead_reason is not None:
            return
        self.dead_reason = reason
        for stream in self._streams.values():
            stream.fail(EngineDeadError(reason))
        self._streams.clear()
        self._replicas.fail(reason)
        self._outputs.abort(self._outputs.request_ids())
        callbacks, self._dead_callbacks = self._dead_callbacks, []
        for callback in callbacks:
            callback(reason)

    def _check_alive(self) -> None:
        if self.dead_reason is not None:
            raise EngineDeadError(self.dead_reason)

    def _abort(self, request_id: str) -> None:
        if core_ids := self._outputs.abort([request_id]):
            self._replicas.abort(core_ids)
        if (stream := self._streams.pop(request_id, None)) is not None:
            stream.wake()
