"""What the user gives, checked and turned into what the engine core takes: token ids and numbers."""

import hashlib
import itertools
import logging
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jax_engine.config import EngineConfig
from jax_engine.core.messages import CoreRequest, Ready, StructuredRequest, Vocabulary
from jax_engine.frontend.token_controls import bad_word_sequences, check_controls, token_controls
from jax_engine.frontend.tokenizer import Tokenizer, load_tokenizer
from jax_engine.grammar.grammar_checker import GrammarChecker
from jax_engine.grammar.thinking import thinking_request
from jax_engine.loading.model_files import (
    generation_config_folder,
    read_generation_config,
    read_model_config,
    resolve_model_path,
)
from jax_engine.lora_request import LoRARequest
from jax_engine.sampling_params import GENERATION_CONFIG_PARAMETERS, MAX_HELD_BACK_TOKENS, SamplingParams, integer

logger = logging.getLogger(__name__)

# What it may also set and this engine cannot do, with the values that ask for nothing.
UNSUPPORTED_GENERATION_CONFIG = {"no_repeat_ngram_size": (None, 0), "max_new_tokens": (None,)}


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    add_special_tokens: NotRequired[bool]  # False for text that already holds them, such as a rendered chat
    cache_salt: NotRequired[str | None]  # cached prefixes are shared only among prompts of one salt


class TokensPrompt(TypedDict):
    """A prompt as token ids, and its text if that is to be in the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str | None]
    cache_salt: NotRequired[str | None]


Prompt = str | list[int] | TextPrompt | TokensPrompt
Adapter = LoRARequest | None


@dataclass(frozen=True)
class ModelText:
    """What a model's folder says about text."""

    path: Path
    tokenizer: Tokenizer
    generation_config: Mapping[str, Any]  # the content of generation_config.json
    # What the default sampling parameters come from, where that is not the model's own file.
    sampling_defaults: Mapping[str, Any] | None = None

    @classmethod
    def load(cls, config: EngineConfig) -> "ModelText":
        """Read it from disk, or from the Hugging Face hub; takes seconds.

        Raises:
            ValueError: the model or its tokenizer cannot be found or read.
        """
        path = resolve_model_path(config.model, revision=config.revision)
        read_model_config(path)  # of a folder that is no model's, say that rather than that it has no tokenizer
        # A name of the hub is left to transformers, which fetches the tokenizer's files alone.
        tokenizer = path if config.tokenizer is None else config.tokenizer
        if config.tokenizer == "demo":
            tokenizer = resolve_model_path("demo")
        own = read_generation_config(path)
        given = {} if config.generation_config == "vllm" else own
        if config.generation_config not in ("auto", "vllm"):
            given = read_generation_config(generation_config_folder(config.generation_config))
        given = {**given, **(config.override_generation_config or {})}
        return cls(path, load_tokenizer(tokenizer), own, given)


@dataclass(frozen=True)
class PreparedRequest:
    """A checked request: `core_requests` has one sequence for each of the `n` completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    core_requests: tuple[CoreRequest, ...]


class InputProcessor:
    """Checks prompts and sampling parameters against one model. Threads may share it."""

    def __init__(
        self,
        text: ModelText,
        info: Ready,
        *,
        seed: int = 0,
        scheduling_policy: str = "fcfs",
        max_logprobs: int = 20,
        enable_lora: bool = False,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`seed` is the engine's, for requests without one. The `numbers` tell requests apart, in the core and in what
        unseeded ones draw: of several front ends of one core, each has its own.
        """
        self.eos_token_ids = end_of_sequence_ids(text.generation_config, text.tokenizer.eos_token_id)
        defaults = text.generation_config if text.sampling_defaults is None else text.sampling_defaults
        self.default_params = default_sampling_params(defaults)
        self._tokenizer = text.tokenizer
        self._vocabulary: Vocabulary | None = None
        self._checker: GrammarChecker | None = None
        self._checker_lock = threading.Lock()
        self._info = info
        self.hidden_size = info.hidden_size
        self._seed = seed
        self._scheduling_policy = scheduling_policy
        self.max_logprobs = info.vocab_size if max_logprobs < 0 else max_logprobs
        self._enable_lora = enable_lora
        self._numbers = itertools.count() if numbers is None else numbers

    def prepare(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0, lora: Adapter = None
    ) -> PreparedRequest:
        """Turn one prompt into what the core takes.

        Raises:
            ValueError: anything wrong with prompt or parameters, or a priority that this engine does not heed.
        """
        arrival_time = time.monotonic()
        self._check_priority(priority)
        self.check_adapter(lora)
        text, token_ids = self._tokenize(prompt)
        token_ids = self._truncate(token_ids, params)
        self._check_prompt(token_ids)
        self._check_stop_ids(params)
        self._check_logprobs(params)
        cache_salt = checked_salt(prompt)
        max_tokens = self._max_tokens(len(token_ids), params)
        structured = self._structured(params, max_tokens)
        check_controls(params, self._info, self.eos_token_ids)
        bad_words = bad_word_sequences(params, self._tokenizer)
        detection = params.repetition_detection
        repetition = detection if detection and detection.max_pattern_size else None
        number = next(self._numbers)
        return PreparedRequest(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            arrival_time=arrival_time,
            core_requests=tuple(
                CoreRequest(
                    # The number, and not the user's id, so that late output of an aborted request never reaches the
                    # next one of that id.
                    request_id=f"{number}.{index}",
                    prompt_token_ids=token_ids,
                    max_tokens=max_tokens,
                    min_tokens=0 if params.structured_outputs else params.min_tokens,
                    temperature=float(params.temperature),
                    top_k=max(0, params.top_k),
                    top_p=float(params.top_p),
                    min_p=float(params.min_p),
                    prng_key=self._prng_key(params.seed, number, index),
                    eos_token_ids=() if params.ignore_eos and not params.structured_outputs else self.eos_token_ids,
                    stop_token_ids=tuple(params.stop_token_ids or ()),
                    arrival_time=arrival_time,
                    prompt_group=f"{number}.0" if params.n > 1 else None,
                    cache_salt=cache_salt,
                    priority=priority,
                    needs_host=self._needs_host(params) or structured is not None or repetition is not None,
                    controls=token_controls(params, bad_words, index=index, vocab_size=self._info.vocab_size),
                    structured=structured,
                    lora=lora,
                    repetition=repetition,
                )
                for index in range(params.n)
            ),
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """What the core must be sent before the first request with a grammar."""
        with self._checker_lock:
            if self._vocabulary is None:
                size = max(self._info.vocab_size, self._tokenizer.num_ids)
                self._vocabulary = Vocabulary(self._tokenizer.as_json(), size, self.eos_token_ids)
            return self._vocabulary

    def _structured(self, params: SamplingParams, max_tokens: int) -> StructuredRequest | None:
        """The form that is asked for, as a grammar that works; ValueError for one that does not."""
        thinking = thinking_request(params, self._tokenizer)
        if params.structured_outputs is None:
            return StructuredRequest("", thinking=thinking) if thinking else None
        if not self.eos_token_ids:
            raise ValueError(
                "structured_outputs has a form, which an end-of-sequence token must end, and neither the model's "
                "generation_config.json nor its tokenizer names one; leave it out"
            )
        vocabulary = self.vocabulary
        with self._checker_lock:
            checker = self._checker = self._checker or GrammarChecker(vocabulary)
        return StructuredRequest(
            checker.grammar(params.structured_outputs),
            # A form that is complete ends; with `ignore_eos`, one that may go on does.
            min_tokens=max_tokens if params.ignore_eos else params.min_tokens,
            thinking=thinking,
        )

    def check_form(self, params: SamplingParams) -> None:
        """Raise a ValueError unless the form that is asked for, if any, can be followed. Takes as long as a grammar."""
        self._structured(params, max_tokens=1)

    def check_adapter(self, lora: LoRARequest | None) -> None:
        """Raise a ValueError unless this engine can run with what is given as an adapter."""
        if lora is None:
            return
        if not isinstance(lora, LoRARequest):
            raise ValueError(f"lora_request={lora!r} is none; give LoRARequest(lora_name, lora_int_id, lora_path)")
        if not self._enable_lora:
            raise ValueError(f"lora_request={lora.lora_name!r} needs an engine with enable_lora=True; leave it out")

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            return self._tokenize_mapping(prompt)
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, add_special_tokens=True)
        return None, token_id_list(prompt)

    def _tokenize_mapping(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        text = prompt.get("prompt")
        by_ids = "prompt_token_ids" in prompt
        allowed = {"cache_salt", "prompt", "prompt_token_ids" if by_ids else "add_special_tokens"}
        if unknown := sorted(set(prompt) - allowed):
            raise ValueError(
                f"prompt has the key {unknown[0]!r}; supported are {{'prompt': text}}, {{'prompt': text, "
                "'add_special_tokens': False}} and {'prompt_token_ids': ids}, each also with 'cache_salt'"
            )
        if by_ids:
            return text, token_id_list(prompt["prompt_token_ids"])
        if not isinstance(text, str):
            raise ValueError(f"prompt={text!r} must be a string; give token ids as {{'prompt_token_ids': ids}}")
        return text, self._encode(text, add_special_tokens=prompt.get("add_special_tokens", True))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not text:
            raise ValueError("prompt is empty; give at least one character or token id")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _truncate(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """What `truncate_prompt_tokens` leaves of a prompt."""
        kept, limit = params.truncate_prompt_tokens, self._info.max_model_len
        if kept is None:
            return token_ids
        if kept >= limit:
            raise ValueError(
                f"truncate_prompt_tokens={kept} must be at most {limit - 1}, which leaves one token to generate "
                f"(max_model_len={limit}); lower it, or send -1 for what fits"
            )
        return token_ids[-(kept if kept > 0 else max(1, limit - (params.max_tokens or 1))) :]

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("prompt is empty; give at least one character or token id")
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < self._info.vocab_size:
                raise ValueError(
                    f"prompt_token_ids holds {token}; the model's token ids are 0 to {self._info.vocab_size - 1}: "
                    "use ids of its own tokenizer"
                )
        if len(token_ids) >= self._info.max_model_len:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens; at most {self._info.max_model_len - 1} fit with one to generate "
                f"(max_model_len={self._info.max_model_len}): shorten it, or raise max_model_len if the model allows"
            )

    def _check_priority(self, priority: int) -> None:
        integer("priority", priority, low=-(2**31), high=2**31 - 1, remedy="the lowest runs first; 0 is the default")
        if priority and self._scheduling_policy != "priority":
            raise ValueError(
                f"priority={priority} needs scheduling_policy='priority', and this engine's is "
                f"{self._scheduling_policy!r}; leave it out or send 0"
            )

    def _check_logprobs(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name) or 0
            if wanted > self.max_logprobs or (wanted < 0 and self.max_logprobs < self._info.vocab_size):
                raise ValueError(
                    f"{name}={wanted} must be at most max_logprobs={self.max_logprobs}, and -1 is the whole "
                    "vocabulary; ask for fewer, or start the engine with a larger max_logprobs (-1: any number)"
                )

    def _check_stop_ids(self, params: SamplingParams) -> None:
        stop_ids = params.stop_token_ids or ()
        for token in stop_ids:
            if token >= self._info.vocab_size:
                raise ValueError(
                    f"stop_token_ids holds {token}; the model's ids are 0 to {self._info.vocab_size - 1}: remove it"
                )
        held_back = set(stop_ids) if params.ignore_eos else {*stop_ids, *self.eos_token_ids}
        if params.min_tokens and len(held_back) > MAX_HELD_BACK_TOKENS:
            raise ValueError(
                f"min_tokens={params.min_tokens} holds back {len(held_back)} tokens (stop_token_ids and the model's "
                f"end-of-sequence ids); at most {MAX_HELD_BACK_TOKENS} are supported: "
                "drop some stop_token_ids, or min_tokens"
            )

    def _needs_host(self, params: SamplingParams) -> bool:
        """Whether the request may end in a way that the device cannot see: by text, or by more ids than a row holds."""
        ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.eos_token_ids)}
        return bool(params.stop_strings) or len(ends) > MAX_HELD_BACK_TOKENS

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        limit = self._info.max_model_len
        room = limit - num_prompt_tokens
        if params.max_tokens is None:
            if params.min_tokens > room:
                raise ValueError(
                    f"min_tokens={params.min_tokens} and the prompt's {num_prompt_tokens} tokens exceed "
                    f"max_model_len={limit}; lower min_tokens to at most {room}, or shorten the prompt"
                )
            return room
        if params.max_tokens > room:
            raise ValueError(
                f"max_tokens={params.max_tokens} and the prompt's {num_prompt_tokens} tokens exceed "
                f"max_model_len={limit}; lower max_tokens to at most {room} (None: all that fits) or shorten the prompt"
            )
        return params.max_tokens

    def _prng_key(self, seed: int | None, number: int, index: int) -> tuple[int, int]:
        """Two uint32 words: by the request's own seed alone, or by the engine's and how many requests came before."""
        words = ("request", seed) if seed is not None else ("engine", self._seed, number)
        digest = hashlib.blake2b(repr((*words, index)).encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def checked_salt(prompt: Prompt) -> str | None:
    """The prompt's cache salt, None without one; ValueError for one that is no text or empty."""
    salt: object = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(
            f"cache_salt={salt!r} must be a non-empty string; leave it out to share cached prefixes with all requests"
        )
    return salt


def token_id_list(given: object) -> list[int]:
    """`given` as plain ints; a NumPy vector and other sequences of whole numbers will do.

    Raises:
        ValueError: it is something else.
    """
    wrong = ValueError(
        f"prompt of type {type(given).__name__} is none; give text, token ids such as [1, 2, 3], {{'prompt': text}} or "
        "{'prompt_token_ids': ids}, the ids being whole numbers"
    )
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise wrong
    items = list(given)
    if bool in set(map(type, items)):
        raise wrong
    try:
        return array("q", items).tolist()
    except (TypeError, OverflowError) as error:
        raise wrong from error


def end_of_sequence_ids(generation_config: Mapping[str, Any], tokenizer_eos_id: int | None) -> tuple[int, ...]:
    """All ids that end a sequence: those of generation_config.json and the tokenizer's own, without repeats."""
    given = generation_config.get("eos_token_id")
    ids = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    if tokenizer_eos_id is not None:
        ids.append(tokenizer_eos_id)
    return tuple(dict.fromkeys(ids))


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What generation_config.json recommends, for a call without sampling parameters of its own."""
    for name, neutral in UNSUPPORTED_GENERATION_CONFIG.items():
        if (value := generation_config.get(name)) not in neutral:
            logger.warning(
                "generation_config.json asks for %s=%s, which is not supported: it is not applied", name, value
            )
    given = {name: generation_config.get(name) for name in GENERATION_CONFIG_PARAMETERS}
    if generation_config.get("do_sample") is False and given["temperature"] is None:
        given["temperature"] = 0.0  # the model's makers say: greedy
    try:
        return SamplingParams.from_mapping({name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from error
