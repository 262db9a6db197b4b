"""What form a request's output must have; vLLM's names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import msgspec

MAX_BYTES = 2**17  # of a schema, grammar or tag description: what follows a grammar must not outlast a step
MAX_REGEX_BYTES = 2**14  # its automaton's states are as large as the regular expression
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class ReasoningParams:
    """The texts around what a model thinks before its output has the form; `begins_inside`: the prompt has begun it.

    Raises:
        ValueError: an empty text.
    """

    start: str = "<think>"
    end: str = "</think>"
    begins_inside: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"reasoning.{name}={value!r} must be the text that the model writes there")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A form that the output is held to, token by token: exactly one of the first six fields.

    An output that ends by itself (finish reason "stop", without stop strings or stop ids) has the form; one that
    `max_tokens` or a stop string cuts off is the beginning of one that has it. Keywords of JSON schema that cannot be
    enforced are refused.

    Raises:
        ValueError: not exactly one form, one of a wrong type or size, or an option of another form. Whether a grammar
            can be followed turns out when the request is made.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # of the whole output; Rust's syntax, which has neither look-around nor back-references
    choice: tuple[str, ...] | list[str] | None = None  # one of these texts
    grammar: str | None = None  # context-free: Lark, or the EBNF of vLLM and llama.cpp (GBNF), which has `::=`
    json_object: bool | None = None  # any JSON object
    # Text in which whatever begins like a tag is one: JSON with "structures" of {begin, schema, end}, and "triggers".
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False  # JSON in one line, without blanks between its parts
    disable_additional_properties: bool = False  # objects whose schema lists properties have no others
    whitespace_pattern: str | None = None  # between the parts of JSON, a regular expression; None: up to 20 blanks

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {' and '.join(given) or 'none of its forms'}; give exactly one of "
                f"{', '.join(KINDS)}"
            )
        self._check_types(given[0])
        self._check_options(given[0])
        try:
            msgspec.json.encode(self)  # as it travels
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"structured_outputs.{given[0]} is no JSON in Unicode ({error}); correct it") from error
        limit = MAX_REGEX_BYTES if given[0] == "regex" else MAX_BYTES
        if (size := len(msgspec.json.encode(self.form[1]))) > limit:
            raise ValueError(
                f"structured_outputs.{given[0]} has {size} bytes as JSON; at most {limit} are allowed: simplify it"
            )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "StructuredOutputsParams":
        """Build from untrusted names and values, refusing unknown names."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"structured_outputs has the field {unknown[0]!r}; supported are {', '.join(known)}")
        return cls(**given)

    @property
    def form(self) -> tuple[str, Any]:
        """The name of the form that is given, and its value as it would stand in JSON."""
        name = next(name for name in KINDS if getattr(self, name) not in (None, False))
        return name, getattr(self, name)

    def _check_types(self, name: str) -> None:
        value = getattr(self, name)
        text_or_object = name in ("json", "structural_tag") and isinstance(value, str | Mapping)
        text = name in ("regex", "grammar") and isinstance(value, str)
        texts = name == "choice" and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        wanted = {
            "json": "a JSON schema, as an object or as text",
            "regex": "a string",
            "choice": "a list of at least one string",
            "grammar": "a string",
            "json_object": "true",
            "structural_tag": "an object with structures and triggers, or such as JSON text",
        }[name]
        if not (text_or_object or text or texts or (name == "json_object" and value is True)):
            raise ValueError(f"structured_outputs.{name}={value!r} must be {wanted}")
        if not value and name != "json":
            raise ValueError(f"structured_outputs.{name} is empty; it must be {wanted}")

    def _check_options(self, name: str) -> None:
        of_json = name in ("json", "json_object")
        for option in ("disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, option)
            if not isinstance(value, bool):
                raise ValueError(f"structured_outputs.{option}={value!r} must be true or false")
            if value and not (of_json if option == "disable_any_whitespace" else name == "json"):
                raise ValueError(f"structured_outputs.{option}=True is for JSON, and the form is {name}; leave it out")
        pattern = self.whitespace_pattern
        if pattern is None:
            return
        if not isinstance(pattern, str) or not pattern or len(pattern) > MAX_REGEX_BYTES:
            raise ValueError(f"structured_outputs.whitespace_pattern={pattern!r} must be a regular expression")
        if not of_json or self.disable_any_whitespace:
            raise ValueError(
                f"structured_outputs.whitespace_pattern={pattern!r} is for JSON with whitespace; leave it out"
            )
