"""Offline inference: prompts in, finished completions out, the engine core in the caller's own process."""

import itertools
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from jax_engine.core.admin_client import checked_level, checked_tags, raise_for
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Abort, Add, AdminReply, IsSleeping, Profile, Sleep, StepOutputs, WakeUp
from jax_engine.core.stats import EngineStats
from jax_engine.frontend.beam_run import BeamRun
from jax_engine.frontend.beam_search import BeamSearchOutput, BeamSearchParams
from jax_engine.frontend.interrupts import interrupts_between_steps
from jax_engine.frontend.llm_settings import engine_config, prompt_list
from jax_engine.frontend.output_processor import EngineAsleepError, OutputProcessor
from jax_engine.frontend.pooling_requests import (
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
    paired,
    prepare_pooling,
)
from jax_engine.frontend.processor import InputProcessor, ModelText, PreparedRequest, Prompt
from jax_engine.frontend.progress import Progress
from jax_engine.lora_request import LoRARequest
from jax_engine.outputs import RequestOutput
from jax_engine.pooling_params import PoolingParams
from jax_engine.sampling_params import RequestOutputKind, SamplingParams, integer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Adapters = LoRARequest | Sequence[LoRARequest | None] | None


class LLM:
    """An engine for offline inference, with vLLM's names. Threads may share it; their calls take turns.

    Also a context manager, which shuts the engine down.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        """Load `model`: a folder, a Hugging Face name, or None for the built-in one.

        `settings` are those of `EngineConfig`, without `max_num_queued_reqs`: here the queue is what the caller gives.
        vLLM's others are accepted with the values that change nothing.

        Raises:
            ValueError: an unknown or unsupported setting, or a model that cannot be served.
        """
        config = engine_config({"model": model, **settings})
        if config.max_num_queued_reqs is not None:
            raise ValueError(
                f"max_num_queued_reqs={config.max_num_queued_reqs} bounds what clients may send to a server, and LLM "
                "runs all that it is given; leave it out"
            )
        if config.lora_modules:
            raise ValueError(
                f"lora_modules={config.lora_modules[0]} names an adapter for clients of a server; give lora_request to "
                "generate or chat instead"
            )
        text = ModelText.load(config)  # before the core: a mistake here shows before anything compiles
        self.config = config
        self.model_path = text.path
        self._tokenizer = text.tokenizer
        self._core: InProcessCore | None = InProcessCore(config)
        self.info = self._core.info
        self._inputs = InputProcessor(
            text,
            self.info,
            seed=config.seed,
            scheduling_policy=config.scheduling_policy,
            max_logprobs=config.max_logprobs,
            enable_lora=config.enable_lora,
        )
        self._outputs = OutputProcessor(text.tokenizer)
        self._request_ids = map(str, itertools.count())
        self._lock = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; returns finished outputs in the order of the prompts.

        Args:
            prompts: text, token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of such.
            sampling_params: one for all prompts, or one for each; None takes `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            lora_request: the adapter of all prompts, or that of each, None for those without; with `enable_lora`.
            priority: one for each prompt, the lowest first; with `scheduling_policy="priority"`.

        Raises:
            ValueError: a bad prompt or parameter; in a list, naming its index, and before anything has run.
            RequestFailedError: the engine core gave a request up.
            KeyboardInterrupt: Ctrl-C; what was running is aborted, and the engine can be used again.
        """
        prepared = self._prepare(prompt_list(prompts), sampling_params, "prompts", priority, lora_request)
        return self._run(prepared, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, rendered by the chat template; otherwise as `generate`."""
        many = bool(messages) and not isinstance(messages[0], Mapping | str)
        prompts: list[Prompt] = []
        for index, conversation in enumerate(messages if many else [messages]):
            try:
                rendered = self._tokenizer.render_chat(
                    conversation,  # type: ignore[arg-type]
                    tools=tools,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template_kwargs=chat_template_kwargs,
                )
            except ValueError as error:
                raise ValueError(f"conversations[{index}]: {error}" if many else str(error)) from error
            prompts.append({"prompt": rendered, "add_special_tokens": False})
        prepared = self._prepare(prompts, sampling_params, "conversations", None, lora_request)
        return self._run(prepared, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: Adapters = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest sequences that begin with each prompt, the best first; in the order of the prompts.

        Prompts are searched side by side, at most `concurrency_limit` at a time. Errors are those of `generate`.
        """
        if concurrency_limit is not None:
            integer("concurrency_limit", concurrency_limit, low=1, high=2**31 - 1, remedy="None searches all at once")
        given, runs = prompt_list(prompts), []
        adapters = self._adapters(lora_request, len(given), "prompts")
        for index, (prompt, lora) in enumerate(zip(given, adapters, strict=True)):
            try:
                runs.append(BeamRun(self._inputs, self._tokenizer, next(self._request_ids), prompt, params, lora=lora))
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}" if len(given) > 1 else str(error)) from error
        with tqdm(total=len(runs), desc="Beam search", dynamic_ncols=True, disable=not use_tqdm) as bar:
            for first in range(0, len(runs), concurrency_limit or max(len(runs), 1)):
                group = runs[first:][:concurrency_limit]
                while open_runs := [run for run in group if not run.done]:
                    self._advance(open_runs)
                    bar.update(sum(run.done for run in open_runs))
        return [run.sequences() for run in runs]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
    ) -> list[PoolingRequestOutput]:
        """A vector of each prompt, pooled from its hidden states; in the order of the prompts.

        What `pooling_params` leave out is the engine's `pooler_config`: by default the last token's, of length 1.
        Errors are those of `generate`.
        """
        params = (pooling_params or PoolingParams()).with_defaults(self.config.pooling)
        given = prompt_list(prompts)
        adapters, prepared = self._adapters(lora_request, len(given), "prompts"), []
        for index, (prompt, lora) in enumerate(zip(given, adapters, strict=True)):
            try:
                prepared.append(prepare_pooling(self._inputs, next(self._request_ids), prompt, params, lora=lora))
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}" if len(given) > 1 else str(error)) from error
        outputs = self._run(prepared, use_tqdm=use_tqdm)
        return [PoolingRequestOutput.of(output, params) for output in outputs]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Adapters = None,
    ) -> list[EmbeddingRequestOutput]:
        """The same with each vector as a list of numbers."""
        encoded = self.encode(prompts, pooling_params, use_tqdm=use_tqdm, lora_request=lora_request)
        return [EmbeddingRequestOutput.of(one) for one in encoded]

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike texts are, as the cosine between their vectors: one text with each of `data_2`, or pair by pair."""
        first, second = prompt_list(data_1), prompt_list(data_2)
        pairs = paired(len(first), len(second), ("data_1", "data_2"))
        encoded = self.encode([*first, *second], pooling_params, use_tqdm=use_tqdm, lora_request=lora_request)
        return [ScoringRequestOutput.of(encoded[one], encoded[len(first) + other]) for one, other in pairs]

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The Hugging Face tokenizer."""
        return self._tokenizer.hugging_face

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults, with what the model's generation_config.json sets of them."""
        return self._inputs.default_params

    def get_metrics(self) -> EngineStats:
        """Counters of the engine core."""
        return self._running_core().stats()

    def reset_prefix_cache(self) -> bool:
        """Forget the keys and values of earlier prompts, as after a change of weights; waits for calls that run.

        Returns whether it was done.
        """
        core = self._running_core()
        with self._lock:
            return core.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Give up the device memory until `wake_up`; waits for calls that run.

        Level 1 moves the weights to host memory, 2 drops them. Keys and values of earlier prompts are forgotten.
        """
        self._order(Sleep(checked_level(level)))

    def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Have the "weights", the "kv_cache" or, by default, both again; weights that were dropped are read anew."""
        self._order(WakeUp(checked_tags(tags)))

    def is_sleeping(self) -> bool:
        """Whether weights or KV cache are given up, and `generate` raises an EngineAsleepError."""
        return self._order(IsSleeping()).is_sleeping

    def start_profile(self) -> None:
        """Begin to record what the engine does, for XProf, into `profile_dir`."""
        if self.config.profile_dir is None:
            raise ValueError("profile_dir=None: there is no folder for a profile; make the LLM with one")
        self._order(Profile(start=True))

    def stop_profile(self) -> None:
        """Write what was recorded since `start_profile`."""
        if self.config.profile_dir is None:
            raise ValueError("profile_dir=None: there is no profile; make the LLM with one")
        self._order(Profile(start=False))

    def shutdown(self) -> None:
        """Release the device memory; the object cannot be used afterwards."""
        core, self._core = self._core, None
        if core is not None:
            core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _running_core(self) -> InProcessCore:
        if self._core is None:
            raise RuntimeError("this LLM was shut down; make a new one")
        return self._core

    def _order(self, order: Sleep | WakeUp | IsSleeping | Profile) -> AdminReply:
        core = self._running_core()
        with self._lock:
            reply = core.admin(order)
        raise_for(reply)
        return reply

    def _prepare(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        what: str,
        priority: Sequence[int] | None = None,
        lora_request: Adapters = None,
    ) -> list[PreparedRequest]:
        """Check everything, so that nothing runs when one of many is wrong."""
        given = self._inputs.default_params if sampling_params is None else sampling_params
        all_params = [given] * len(prompts) if isinstance(given, SamplingParams) else list(given)
        if wrong := [params for params in all_params if not isinstance(params, SamplingParams)]:
            raise ValueError(f"sampling_params holds {wrong[0]!r}; give SamplingParams(...), or a list of them")
        if len(all_params) != len(prompts):
            raise ValueError(
                f"sampling_params has {len(all_params)} entries for {len(prompts)} {what}; "
                "give one for each, or a single one for all"
            )
        priorities = [0] * len(prompts) if priority is None else list(priority)
        if len(priorities) != len(prompts):
            raise ValueError(f"priority has {len(priorities)} entries for {len(prompts)} {what}; give one for each")
        adapters = self._adapters(lora_request, len(prompts), what)
        prepared = []
        for index, (prompt, params, rank, lora) in enumerate(
            zip(prompts, all_params, priorities, adapters, strict=True)
        ):
            try:
                final = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
                prepared.append(self._inputs.prepare(next(self._request_ids), prompt, final, priority=rank, lora=lora))
            except ValueError as error:
                raise ValueError(f"{what}[{index}]: {error}" if len(prompts) > 1 else str(error)) from error
        return prepared

    def _advance(self, runs: Sequence[BeamRun]) -> None:
        """Take every search one step further."""
        requests = [run.requests() for run in runs]
        outputs = iter(self._run([request for some in requests for request in some], use_tqdm=False))
        for run, some in zip(runs, requests, strict=True):
            run.advance(list(itertools.islice(outputs, len(some))))

    def _adapters(self, given: Adapters, num_prompts: int, what: str) -> list[LoRARequest | None]:
        """The adapter of each prompt, read into host memory if it is not there."""
        if given is None or isinstance(given, LoRARequest):
            each = [given] * num_prompts
        elif isinstance(given, Sequence) and not isinstance(given, str):
            each = list(given)
        else:
            raise ValueError(f"lora_request={given!r} is none; give a LoRARequest, or a list of one for each of {what}")
        if len(each) != num_prompts:
            raise ValueError(f"lora_request has {len(each)} entries for {num_prompts} {what}; give one for each")
        for lora in dict.fromkeys(each):
            self._inputs.check_adapter(lora)
            if lora is not None:
                with self._lock:
                    self._running_core().load_adapter(lora)
        return each

    def _run(self, requests: list[PreparedRequest], *, use_tqdm: bool) -> list[RequestOutput]:
        core = self._running_core()
        with (
            self._lock,
            interrupts_between_steps() as deliver_interrupt,
            Progress(len(requests), show=use_tqdm) as progress,
        ):
            if core.admin(IsSleeping()).is_sleeping:
                raise EngineAsleepError("the engine is asleep; call wake_up first")
            states = [self._outputs.add(request) for request in requests]
            sequences = [sequence for request in requests for sequence in request.core_requests]
            if any(sequence.structured for sequence in sequences):
                core.send(self._inputs.vocabulary)
            core.send(Add(sequences))
            step_failed = False
            try:
                while self._outputs.num_requests:
                    step_failed = True
                    step = core.step()
                    step_failed = False
                    self._take(step, core, progress)
                    deliver_interrupt()
            finally:
                # Only when something was raised is there a request left to abort.
                if core_ids := self._outputs.abort(self._outputs.request_ids()):
                    core.send(Abort(core_ids))
                while core.has_work() and not step_failed:  # steps under way still hold pages
                    core.step()
        return [state.take() for state in states]

    def _take(self, step: StepOutputs, core: InProcessCore, progress: "Progress") -> None:
        """Pass a step's tokens on, stop strings back to the core, and what has finished to the progress bar."""
        processed = self._outputs.process(step.outputs)
        if processed.stopped:
            core.send(Abort(processed.stopped))
        for state in processed.changed:
            if state.error is not None:
                raise state.error
            progress.finish(state)
