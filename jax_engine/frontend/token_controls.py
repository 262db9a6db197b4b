"""What a request asks of the FULL sampling mode, checked against the model and turned into token ids."""

from jax_engine.core.messages import NO_CONTROLS, Ready, TokenControls
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.sampling_params import MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS, SamplingParams


def check_controls(params: SamplingParams, info: Ready, eos_token_ids: tuple[int, ...]) -> None:
    """Raise a ValueError for ids that the model lacks, arguments that no logits processor takes, or nothing left to
    draw.
    """
    _check_ids("logit_bias", list(params.bias), info.vocab_size)
    _check_ids("allowed_token_ids", list(params.allowed_token_ids or ()), info.vocab_size)
    _check_something_is_left(params, eos_token_ids)
    _check_arguments(params, info)


def token_controls(
    params: SamplingParams, bad_words: tuple[tuple[int, ...], ...], *, index: int, vocab_size: int
) -> TokenControls | None:
    """What completion `index` of a prompt asks of the FULL sampling mode, None if nothing; the first one alone,
    log-probabilities of the prompt.
    """
    allowed = params.allowed_token_ids
    controls = TokenControls(
        allowed_token_ids=None if allowed is None else tuple(allowed),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logit_bias=params.bias,
        bad_words=bad_words,
        processor_arguments={name: float(value) for name, value in (params.extra_args or {}).items()},
        num_logprobs=vocab_size if params.logprobs == -1 else params.logprobs,
        num_prompt_logprobs=None if index else vocab_size if params.prompt_logprobs == -1 else params.prompt_logprobs,
    )
    return None if controls == NO_CONTROLS else controls


def bad_word_tokens(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """How a word may come in an output: without a space in front, and with one where that makes another first token of
    no more tokens, as vLLM has it.
    """
    bare, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
    return [bare, spaced] if len(spaced) == len(bare) and spaced[:1] != bare[:1] else [bare]


def _check_ids(name: str, tokens: list[int], vocab_size: int) -> None:
    for token in tokens:
        if token >= vocab_size:
            raise ValueError(f"{name} holds {token}; the model's token ids are 0 to {vocab_size - 1}: remove it")


def _check_something_is_left(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> None:
    held_back = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)}
    if params.min_tokens and params.allowed_token_ids is not None and held_back >= set(params.allowed_token_ids):
        raise ValueError(
            f"min_tokens={params.min_tokens} holds back all of allowed_token_ids={list(params.allowed_token_ids)}, "
            "which are stop ids or end the sequence; allow another token, or drop min_tokens"
        )


def bad_word_sequences(params: SamplingParams, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The request's bad words as tokens; ValueError for those that a device row has no room for."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in params.bad_words or ():
        for tokens in bad_word_tokens(word, tokenizer):
            if len(tokens) > MAX_BAD_WORD_TOKENS:
                raise ValueError(
                    f"bad_words has the entry {word!r} of {len(tokens)} tokens; at most {MAX_BAD_WORD_TOKENS} are "
                    "supported: give a shorter part of it"
                )
            sequences[tokens] = None
    if len(sequences) > MAX_BAD_WORD_SEQUENCES:
        raise ValueError(
            f"bad_words are {len(sequences)} sequences of tokens (each word without and with a space in front); at "
            f"most {MAX_BAD_WORD_SEQUENCES} are supported: drop some"
        )
    return tuple(sequences)


def _check_arguments(params: SamplingParams, info: Ready) -> None:
    known = info.processor_arguments
    for name in params.extra_args or {}:
        if name not in known:
            hint = f"there are {', '.join(known)}" if known else "no processor that takes any is registered"
            raise ValueError(f"extra_args has the key {name!r}, which no logits processor takes; {hint}: remove it")
