"""The tokenizer, behind the few operations that the engine needs: text to ids, ids to text, chats to text."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_engine.frontend.chat_templates import failed_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of the renderer itself, which a template must not be given a second time under the same name.
RENDER_ARGUMENTS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length"}
    | {"messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"}
    | {"sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation"}
)


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer, read-only from here on, so that threads may share it."""

    hugging_face: "PreTrainedTokenizerBase"
    special_ids: frozenset[int]  # left out of the text with skip_special_tokens
    unknown_ids: frozenset[int]  # gaps among the ids
    num_ids: int  # the largest id plus one; a model's vocabulary is often padded past it
    added_texts: Mapping[int, str]  # tokens that were added to the vocabulary as they stand, by id

    @classmethod
    def wrap(cls, hugging_face: "PreTrainedTokenizerBase") -> "Tokenizer":
        known = hugging_face.get_vocab().values()
        num_ids = max(known, default=-1) + 1
        added = hugging_face.added_tokens_decoder.items()
        return cls(
            hugging_face=hugging_face,
            special_ids=frozenset(hugging_face.all_special_ids) | {id for id, token in added if token.special},
            unknown_ids=frozenset(range(num_ids)).difference(known),
            num_ids=num_ids,
            added_texts={id: token.content for id, token in added},
        )

    @property
    def eos_token_id(self) -> int | None:
        return self.hugging_face.eos_token_id

    def as_json(self) -> str:
        """The content of its tokenizer.json, which says all about it; ValueError when it has none."""
        if not self.hugging_face.is_fast:
            raise ValueError(
                "the model's tokenizer has no tokenizer.json, which structured_outputs need; leave them out"
            )
        return str(self.hugging_face.backend_tokenizer.to_str())

    def skipped_ids(self, *, skip_special_tokens: bool) -> frozenset[int]:
        """The ids below `num_ids` that add nothing to the text."""
        return self.unknown_ids | self.special_ids if skip_special_tokens else self.unknown_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; `add_special_tokens` puts what the tokenizer's own settings ask for around it (a BOS token).

        Raises:
            ValueError: `text` is not valid Unicode (it holds half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt holds {text[error.start]!r} at character {error.start}, half of a surrogate pair "
                "and no character; send valid Unicode"
            ) from error
        if self.hugging_face.is_fast:
            # The Rust tokenizer itself: the wrapper changes its truncation and padding on every call, which two threads
            # must not do at once. A batch of one: only batches are encoded without holding the interpreter's lock.
            rust = self.hugging_face.backend_tokenizer
            return list(rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        return list(self.hugging_face.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, special tokens included, nothing tidied up; bytes that are not UTF-8 become U+FFFD."""
        if self.hugging_face.is_fast:
            return str(self.hugging_face.backend_tokenizer.decode(token_ids, skip_special_tokens=False))
        return str(self.hugging_face.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode_without_spaces(self, token_ids: list[int]) -> str:
        """The same, but with nothing between two added tokens, special ones among them, that follow one another."""
        added = self.added_texts
        starts = [
            index for index in range(1, len(token_ids)) if token_ids[index] in added and token_ids[index - 1] in added
        ]
        if not starts:
            return self.decode(token_ids)
        text = self.decode(token_ids[: starts[0]])
        for start, end in zip(starts, (*starts[1:], len(token_ids)), strict=True):
            alone = self.decode(token_ids[start : start + 1])
            text += added[token_ids[start]] + self.decode(token_ids[start:end]).removeprefix(alone)
        return text

    def token(self, token_id: int) -> str:
        """A known id's entry in the vocabulary, in the tokenizer's own writing."""
        return str(self.hugging_face.convert_ids_to_tokens(token_id))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        content_format: str = "string",
    ) -> str:
        """Text of a chat by the tokenizer's template, or by `chat_template`, which gets the content of messages as one
        string, or with `content_format` "openai" as a list of parts.

        The text already holds the special tokens that the template writes: encode it without adding any.

        Raises:
            ValueError: messages of a wrong form, no template, or a template that fails on these messages.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "continue_final_message=True continues the last message and add_generation_prompt=True begins a new "
                "one; set one of them to False"
            )
        if chat_template is None and not self.hugging_face.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template, so messages cannot be rendered; pass chat_template, "
                "or render them yourself and send the text as a plain prompt"
            )
        extra = dict(chat_template_kwargs or {})
        if reserved := sorted(RENDER_ARGUMENTS.intersection(extra)):
            raise ValueError(
                f"chat_template_kwargs has {', '.join(reserved)}, which the renderer sets itself; remove it"
            )
        conversation = [_plain_message(index, message) for index, message in enumerate(_non_empty(messages))]
        if content_format == "openai":
            conversation = [
                _in_parts(plain, message.get("content")) for plain, message in zip(conversation, messages, strict=True)
            ]
        try:
            return str(
                self.hugging_face.apply_chat_template(
                    conversation,
                    tools=[dict(tool) for tool in tools] if tools else None,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **extra,
                )
            )
        except Exception as error:  # a template is a program of the model's or the user's: it can fail in any way
            line = failed_line(error)
            where = "" if line is None else f", at its line {line}"
            raise ValueError(
                f"the chat template failed on these messages{where}: {error or type(error).__name__}"
            ) from error


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder or of a Hugging Face name.

    Raises:
        ValueError: there is none, or its files cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and str(name).startswith((".", "/", "~")):
        raise ValueError(f"no tokenizer could be loaded from {str(name)!r}: the folder does not exist; check the path")
    # tokenizer.json is the whole tokenizer and taken as it is. The automatic choice of a class would build a similar
    # one from its vocabulary by that class's own rules, and import PyTorch, where it is installed, to find the class
    # (seconds).
    whole = (folder / "tokenizer.json").exists()
    factory = _import_transformers("PreTrainedTokenizerFast" if whole else "AutoTokenizer")
    source = str(folder) if folder.is_dir() else str(name)
    try:
        return Tokenizer.wrap(factory.from_pretrained(source, trust_remote_code=False))
    except Exception as error:  # the Rust tokenizer reports a broken file as a plain Exception
        raise ValueError(
            f"no tokenizer could be loaded from {str(name)!r} ({' '.join(str(error).split())}); it needs "
            "tokenizer.json and tokenizer_config.json (set tokenizer to a folder or hub name that has them)"
        ) from error


def _import_transformers(class_name: str) -> Any:
    """A class of transformers, imported without its advice to install PyTorch, which nothing here uses."""
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(keep)
    try:
        return getattr(import_module("transformers"), class_name)
    finally:
        logger.removeFilter(keep)


def _non_empty(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            f"messages={messages!r} must be a list of at least one message such as {{'role': 'user', 'content': 'Hi'}}"
        )
    return messages


def _plain_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """`message` as templates expect it: content parts joined to one text, tool arguments as an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{index}]={message!r} must be an object with a role such as 'user', and content")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list | tuple):
        plain["content"] = "\n".join(_part_text(index, part) for part in content)
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"messages[{index}].content={content!r} must be a string or a list of text parts")
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_tool_call(index, call) for call in plain["tool_calls"]]
    return plain


def _in_parts(plain: dict[str, Any], content: object) -> dict[str, Any]:
    """A checked message whose content, as it was given, is a list of text parts."""
    if plain.get("content") is None:
        return plain
    given = content if isinstance(content, list | tuple) else [plain["content"]]
    parts = [{"type": "text", "text": part if isinstance(part, str) else part["text"]} for part in given]
    return {**plain, "content": parts}


def _part_text(index: int, part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise ValueError(
        f"messages[{index}].content has a part of type {kind!r}; only 'text' parts with a text are supported"
    )


def _plain_tool_call(index: int, call: object) -> dict[str, Any]:
    """A tool call of an earlier answer; clients send its arguments as JSON text, templates print an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"messages[{index}].tool_calls has {call!r}; each needs a function with a name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(
                f"messages[{index}].tool_calls: the arguments of {function['name']!r} are not JSON ({error}); "
                "send an object"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}
