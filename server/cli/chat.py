"""`jax-engine chat` and `complete`: a conversation, and texts to be continued, in the terminal."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import EngineDeadError
from jax_engine.server.cli.partners import Chunks, LocalPartner, Partner, RemotePartner
from jax_engine.server.cli.terminal import display
from jax_engine.server.settings import ServerSettings

Messages = list[dict[str, str]]
HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"
COMPLETE_HELP = "a line is continued; Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    config: EngineConfig,
    settings: ServerSettings,
    *,
    url: str | None,
    api_key: str | None,
    system_prompt: str | None,
    quick: str | None,
    given: Mapping[str, Any],
) -> int:
    """Talk until /exit or the end of the input, or say `quick` alone; returns the exit code.

    Raises:
        ValueError: it cannot begin, or has no answer to `quick`.
    """
    opening: Messages = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def talk(partner: Partner) -> None:
        if quick is None:
            converse(partner, opening, given)
        else:
            asked = [*opening, {"role": "user", "content": quick}]
            show(partner.stream("/v1/chat/completions", {**given, "messages": asked}))

    return _with_partner("chat", config, settings, url, api_key, talk)


def complete(
    config: EngineConfig,
    settings: ServerSettings,
    *,
    url: str | None,
    api_key: str | None,
    quick: str | None,
    given: Mapping[str, Any],
) -> int:
    """Continue each line of the input, or `quick` alone; returns the exit code. ValueError as in `chat`."""

    def talk(partner: Partner) -> None:
        if quick is not None:
            show(partner.stream("/v1/completions", {**given, "prompt": quick}))
            return
        for line in typed_lines(COMPLETE_HELP):
            try:
                show(partner.stream("/v1/completions", {**given, "prompt": line}))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)

    return _with_partner("complete", config, settings, url, api_key, talk)


def _with_partner(
    command: str,
    config: EngineConfig,
    settings: ServerSettings,
    url: str | None,
    api_key: str | None,
    talk: Callable[[Partner], None],
) -> int:
    partner: Partner
    if url is not None:
        partner = RemotePartner(url, api_key, config.model)
    else:
        print("loading the model ...", file=sys.stderr)
        try:
            partner = LocalPartner(config, settings)
        except EngineDeadError as error:
            print(f"jax-engine {command}: error: {error}", file=sys.stderr)
            return 1
    try:
        talk(partner)
    finally:
        partner.close()
    return 0


def converse(partner: Partner, opening: Messages, given: Mapping[str, Any]) -> None:
    """Read a line, answer it, again and again; an answer that fails or is stopped leaves the conversation usable."""
    messages = list(opening)
    for line in typed_lines(HELP):
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        else:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                text = show(partner.stream("/v1/chat/completions", {**given, "messages": asked}))
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
            else:
                messages = [*asked, {"role": "assistant", "content": text}]


def typed_lines(help_text: str) -> Iterator[str]:
    """The lines of standard input that are not blank, with a prompt and editing in a terminal."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # line editing and history for input()

        print(help_text, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def show(chunks: Chunks) -> str:
    """Show an answer as it comes; returns its text, of which Ctrl-C leaves what there is. ValueError: it failed."""
    shown, text, note, began = display(), "", "", False
    try:
        for chunk in chunks:
            for choice in chunk.get("choices", ()):
                delta = choice.get("delta") or {}
                thought, piece = delta.get("reasoning_content"), delta.get("content") or choice.get("text")
                began = began or bool(thought or piece)
                if thought:
                    shown.reason(thought)
                if piece:
                    text += piece
                    shown.write(piece)
    except KeyboardInterrupt:
        note = " [stopped]"
    finally:
        chunks.close()
        if began or note:
            shown.end(note)
    return text
