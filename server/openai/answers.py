"""What a route writes of a completion besides its ending: its text, and its log-probabilities in the route's form."""

from collections.abc import Sequence
from typing import Any

from jax_engine.frontend.token_texts import TokenTexts
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.outputs import CompletionOutput, LogprobsAtPosition, RequestOutput
from jax_engine.sampling_params import SamplingParams

LOWEST = -9999.0  # in place of minus infinity, which JSON lacks


class Answers:
    """The completions of one HTTP request, as POST /generate shows them. Mutable; owned by the handler.

    Outputs are whole completions or, in a stream, what is new of them; each is shown once, in order.
    """

    def __init__(
        self, texts: TokenTexts, params: SamplingParams, *, prompt_logprobs: bool = False, token_ids: bool = False
    ) -> None:
        """`prompt_logprobs` and `token_ids` say whether the client wants to see them."""
        self._texts = texts
        self._params = params
        self._asks = params.logprobs is not None
        self._prompt_logprobs = prompt_logprobs
        self._token_ids = token_ids

    def text(self, index: int, output: RequestOutput, completion: CompletionOutput) -> str:
        """The text of completion `index`."""
        return completion.text

    def of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """vLLM's fields of a prompt that are asked for; its log-probabilities are a dictionary by token id each, and
        come with its first output.
        """
        fields: dict[str, Any] = {"prompt_token_ids": output.prompt_token_ids} if self._token_ids else {}
        return fields | ({"prompt_logprobs": output.prompt_logprobs} if self._prompt_logprobs else {})

    def fields(self, completion: CompletionOutput) -> dict[str, Any]:
        """vLLM's other fields of a completion that are asked for; empty where there is nothing new."""
        return {"token_ids": completion.token_ids} if self._token_ids and completion.token_ids else {}

    def logprobs(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        """Its log-probabilities, for JSON; None if nobody asks, or there are no new ones."""
        return completion.logprobs or None if self._asks else None


class ChatAnswers(Answers):
    """OpenAI's form for chats: a list of tokens, each with its bytes and the likeliest in its place."""

    def logprobs(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        if not completion.logprobs or not self._asks:
            return None
        count = self._params.logprobs or 0
        content = []
        for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
            likeliest = sorted(position, key=lambda other: -position[other].logprob)[: None if count < 0 else count]
            top = [self._entry(other, position) for other in likeliest]
            content.append({**self._entry(token, position), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, position: LogprobsAtPosition) -> dict[str, Any]:
        return {
            "token": self._texts.text(token),
            "logprob": finite(position[token].logprob),
            "bytes": list(self._texts.utf8(token)),
        }


class CompletionAnswers(Answers):
    """OpenAI's form for completions: parallel lists of tokens, and with `echo` the prompt before its completion."""

    def __init__(
        self,
        texts: TokenTexts,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        echo: bool = False,
        prompt_logprobs: bool = False,
        token_ids: bool = False,
    ) -> None:
        super().__init__(texts, params, prompt_logprobs=prompt_logprobs, token_ids=token_ids)
        self._tokenizer = tokenizer
        self._echo = echo
        self._shown: set[int] = set()  # completions whose prompt was shown
        # Of each request, whose completions begin one after another in a stream.
        self._echoed_logprobs: dict[str, list[LogprobsAtPosition | None]] = {}
        self._offsets: dict[int, int] = {}  # characters of each completion that were shown with log-probabilities

    def text(self, index: int, output: RequestOutput, completion: CompletionOutput) -> str:
        if not self._echo or index in self._shown:
            return completion.text
        self._shown.add(index)
        return self._prompt(output) + completion.text

    def logprobs(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        if not self._asks or completion.logprobs is None or not (completion.logprobs or self._is_first(index)):
            return None
        if output.prompt_logprobs is not None:
            self._echoed_logprobs[output.request_id] = output.prompt_logprobs
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._is_first(index):
            self._offsets[index] = 0
            if self._echo:
                positions = self._echoed_logprobs[output.request_id]
                self._extend(result, index, output.prompt_token_ids, positions)
                self._offsets[index] = len(self._prompt(output))
        self._extend(result, index, completion.token_ids, completion.logprobs)
        return result

    def _is_first(self, index: int) -> bool:
        return index not in self._offsets

    def _prompt(self, output: RequestOutput) -> str:
        return output.prompt if output.prompt is not None else self._tokenizer.decode(output.prompt_token_ids)

    def _extend(
        self,
        result: dict[str, list[Any]],
        index: int,
        token_ids: Sequence[int],
        positions: Sequence[LogprobsAtPosition | None],
    ) -> None:
        skipped = self._tokenizer.skipped_ids(skip_special_tokens=self._params.skip_special_tokens)
        for token, position in zip(token_ids, positions, strict=True):
            top = {self._key(other): finite(entry.logprob) for other, entry in (position or {}).items()}
            result["tokens"].append(self._key(token))
            result["token_logprobs"].append(None if position is None else finite(position[token].logprob))
            result["top_logprobs"].append(None if position is None else top)
            result["text_offset"].append(self._offsets[index])
            if token not in skipped:
                self._offsets[index] += num_characters(self._texts.utf8(token))

    def _key(self, token: int) -> str:
        """A token's text; OpenAI's `bytes:\\xe2\\x80` for one that holds part of a character."""
        text, utf8 = self._texts.text(token), self._texts.utf8(token)
        return text if text.encode() == utf8 else "bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8)


def num_characters(utf8: bytes) -> int:
    """How many characters begin in a piece of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in utf8)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)
