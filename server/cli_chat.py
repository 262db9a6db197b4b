"""`jax-engine chat`: a conversation in the terminal, with an engine of its own or with a running server."""

import asyncio
import http.client
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from jax_engine.async_llm import AsyncLLM
from jax_engine.config import EngineConfig
from jax_engine.core_client import EngineDeadError
from jax_engine.output_processor import RequestFailedError
from jax_engine.outputs import RequestOutput
from jax_engine.processor import TextPrompt
from jax_engine.request_stream import RequestStream
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.server.chat_format import chat_format
from jax_engine.server.message_parts import ContentDelta, ReasoningDelta
from jax_engine.server.settings import ServerSettings

Messages = list[dict[str, str]]
Piece = ReasoningDelta | ContentDelta
Answer = Generator[Piece, None, None]
HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"
CONNECT_SECONDS = 600.0


class Partner(Protocol):
    """Whom one talks to."""

    def answer(self, messages: Messages) -> Answer:
        """The answer to a conversation, piece by piece; leaving the iterator stops it. ValueError: it cannot answer."""

    def close(self) -> None:
        """Say goodbye."""


class LocalPartner:
    """An engine in a process of our own. Mutable; owned by `chat`. Its event loop runs while an answer is awaited."""

    def __init__(self, config: EngineConfig, given: Mapping[str, Any]) -> None:
        self._runner = asyncio.Runner()
        self._engine = self._runner.run(AsyncLLM.start(config))
        defaults = self._engine.get_default_sampling_params()
        settings: dict[str, Any] = {"max_tokens": None, **given, "output_kind": RequestOutputKind.DELTA}
        self._params: SamplingParams = replace(defaults, **settings)
        self._format = chat_format(ServerSettings(), self._engine.tokenizer)

    def answer(self, messages: Messages) -> Answer:
        try:
            prompt = self._engine.render_chat(messages)
            parser = self._format.message_format(prompt["prompt"]).parser()
            stream = self._runner.run(self._begin(prompt))
            try:
                finished = False
                while not finished:
                    output = self._runner.run(_next_output(stream))
                    finished, text = output.finished, output.outputs[0].text
                    parts = parser.finish(text) if finished else parser.feed(text)
                    yield from (part for part in parts if isinstance(part, Piece))
            finally:
                stream.abort()
        except (EngineDeadError, RequestFailedError) as error:
            raise ValueError(str(error)) from error

    def close(self) -> None:
        self._runner.run(self._engine.shutdown())
        self._runner.close()

    async def _begin(self, prompt: TextPrompt) -> RequestStream:
        return await self._engine.add_request(uuid.uuid4().hex, prompt, self._params)


async def _next_output(stream: RequestStream) -> RequestOutput:
    return await anext(stream)


class RemotePartner:
    """A server with OpenAI's chat completions. Mutable; owned by `chat`."""

    def __init__(self, url: str, api_key: str | None, model: str | None, given: Mapping[str, Any]) -> None:
        base = url.rstrip("/")
        self._url = f"{base if base.endswith('/v1') else base + '/v1'}/chat/completions"
        self._body = {**given, "stream": True, **({"model": model} if model else {})}
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def answer(self, messages: Messages) -> Answer:
        body = msgspec.json.encode({**self._body, "messages": messages})
        try:
            request = urllib.request.Request(self._url, body, self._headers, method="POST")
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        yield from _pieces(msgspec.json.decode(line[len(b"data: ") :]))
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self._url} answered {error.code}: {_error_message(error.read())}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the connection to {self._url} failed: {error}") from error

    def close(self) -> None:
        """Nothing is kept open between answers."""


def _pieces(chunk: dict[str, Any]) -> Iterator[Piece]:
    if "error" in chunk:
        raise ValueError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
            yield ReasoningDelta(reasoning)
        if content := delta.get("content"):
            yield ContentDelta(content)


def _error_message(body: bytes) -> str:
    """OpenAI's error message if `body` holds one, else its beginning."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def chat(
    config: EngineConfig, *, url: str | None, api_key: str | None, system: str | None, given: Mapping[str, Any]
) -> int:
    """Talk until /exit or the end of the input; returns the exit code. ValueError when it cannot begin."""
    partner: Partner
    if url is not None:
        partner = RemotePartner(url, api_key, config.model, given)
    else:
        print("loading the model ...", file=sys.stderr)
        try:
            partner = LocalPartner(config, given)
        except EngineDeadError as error:
            print(f"jax-engine chat: error: {error}", file=sys.stderr)
            return 1
    try:
        converse(partner, [{"role": "system", "content": system}] if system else [])
    finally:
        partner.close()
    return 0


def converse(partner: Partner, opening: Messages) -> None:
    """Read a line, answer it, again and again; an answer that fails or is stopped leaves the conversation usable."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # line editing and history for input()

        print(HELP, file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            messages = exchange(partner, [*messages, {"role": "user", "content": line}])


def exchange(partner: Partner, messages: Messages) -> Messages:
    """Print the answer to the last message; returns the conversation with it, or without that message if it failed.

    What was thought before it is printed, and does not stay in the conversation.
    """
    pieces: list[str] = []
    answer = partner.answer(messages)
    thinks = False
    try:
        for piece in answer:
            if thinks != isinstance(piece, ReasoningDelta):
                print("\n</think>" if thinks else "<think>")
                thinks = not thinks
            if isinstance(piece, ContentDelta):
                pieces.append(piece.text)
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return messages[:-1]
    finally:
        answer.close()
    print()
    return [*messages, {"role": "assistant", "content": "".join(pieces)}]
