"""Forms of output as grammars of llguidance, which follows them token by token.

The package is imported when the first request needs it. Its own limits bound the work of a step; a grammar that can
do harm all the same is found by `grammar_checker.py`, in a process of its own.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from jax_engine.core.messages import Vocabulary
from jax_engine.grammar.bitmasks import num_words
from jax_engine.grammar.tag_formats import WHITESPACE, tags_grammar
from jax_engine.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_ERROR_CHARACTERS = 400


def grammar_text(params: StructuredOutputsParams, special_ids: Mapping[str, int]) -> str:
    """The grammar of a form, in llguidance's own notation; whether it is a good one, only `new_matcher` tells.
    `special_ids`: see `special_token_ids`.

    Raises:
        ValueError: what is given is not JSON, EBNF or a description of tags.
    """
    from llguidance import LLMatcher

    name, value = params.form
    if name == "regex":
        return LLMatcher.grammar_from_regex(value)
    if name == "choice":
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        )
    if name == "grammar":
        return LLMatcher.grammar_from_lark(_lark(value))
    given = json.loads(value) if isinstance(value, str) else value
    if name == "structural_tag":
        return LLMatcher.grammar_from_lark(tags_grammar(given, special_ids))
    schema = {"type": "object"} if name == "json_object" else given
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object")
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: JsonCompileOptions = {
        "whitespace_flexible": not params.disable_any_whitespace,
        "whitespace_pattern": None if params.disable_any_whitespace else params.whitespace_pattern or WHITESPACE,
    }
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def new_matcher(grammar: str, vocabulary: Vocabulary) -> "LLMatcher":
    """What follows a grammar, at its start; ValueError with the reason when it cannot be followed."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(llguidance_tokenizer(vocabulary), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(error_of(matcher))
    return matcher


def make_mask(matcher: "LLMatcher", vocab_size: int) -> NDArray[np.uint32]:
    """The bitmask of the tokens that may come next: [words]."""
    mask = np.zeros(num_words(vocab_size), np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return mask


@lru_cache(maxsize=2)  # of one engine there is one; building takes a second for a large vocabulary
def llguidance_tokenizer(vocabulary: Vocabulary) -> "LLTokenizer":
    """The vocabulary as llguidance wants it; threads may share it."""
    from llguidance import LLTokenizer

    return LLTokenizer(vocabulary.tokenizer, n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_token_ids))


def special_token_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The tokens that are no text to llguidance, by content: also those of the form `<name>` that a tokenizer shows."""
    tokenizer = llguidance_tokenizer(vocabulary)
    tokens = msgspec.json.decode(vocabulary.tokenizer).get("added_tokens") or ()
    return {token["content"]: token["id"] for token in tokens if tokenizer.is_special_token(token["id"])}


def error_of(matcher: "LLMatcher") -> str:
    """Why a matcher cannot go on, in one line; empty when it can."""
    return " ".join(matcher.get_error().split())[:MAX_ERROR_CHARACTERS]


def _lark(grammar: str) -> str:
    """A grammar in Lark's notation, which an EBNF is rewritten to."""
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return any_to_lark(grammar)
    except (GbnfToLarkError, AssertionError, IndexError, KeyError, RecursionError) as error:
        raise ValueError(f"as EBNF it cannot be read: {error or type(error).__name__}") from error


def _closed(schema: Any) -> Any:
    """A schema whose objects have no properties but those it lists."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if {"properties", "patternProperties"} & schema.keys():
        closed.setdefault("additionalProperties", False)
    return closed
