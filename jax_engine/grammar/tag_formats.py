"""Structural tags as grammars: JSON among fixed and free text, described in the terms of vLLM's `structural_tag`.

A format is an object with a `type`: `const_string`, `json_schema`, `regex`, `any_text`, `sequence`, `or`, `tag`,
`triggered_tags` or `tags_with_separator`. The older description by `structures` and `triggers` is `triggered_tags`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Between the parts of JSON unless a request says otherwise: indentation has room. Without a bound, small models go on
# with blanks until their tokens are spent.
WHITESPACE = r"[ \t\r\n]{1,20}"

Format = Mapping[str, Any]
TAG_KEYS = {"begin", "content", "end"}


def tags_grammar(given: Any, special_ids: Mapping[str, int]) -> str:
    """The grammar of a structural tag, in Lark's notation as llguidance has it; `special_ids` are the tokens that are
    no text to it.

    Raises:
        ValueError: the description has another form; the message says where.
    """
    if not isinstance(given, Mapping) or given.get("type", "structural_tag") != "structural_tag":
        raise ValueError('it must be {"type": "structural_tag", "format": {...}}')
    if "format" not in given:
        given = {"format": _of_structures(given)}
    elif given.keys() - {"type", "format"}:
        raise ValueError(f"it has {min(given.keys() - {'type', 'format'})!r} beside its format; leave that out")
    return _Lark(special_ids).grammar(given["format"])


def schemas_of(given: Any) -> list[Any]:
    """The JSON schemas of a description of a good form, in order."""
    if isinstance(given, Mapping):
        if given.get("type") == "json_schema":
            return [given["json_schema"]]
        if "structures" in given:
            return [structure["schema"] for structure in given["structures"]]
        return [schema for value in given.values() for schema in schemas_of(value)]
    return [schema for value in given for schema in schemas_of(value)] if isinstance(given, list) else []


def _of_structures(given: Mapping[str, Any]) -> Format:
    if {"type", *given} != {"type", "structures", "triggers"}:
        raise ValueError('it must be {"type": "structural_tag", "structures": [...], "triggers": [...]}')
    structures, triggers = given["structures"], given["triggers"]
    if not _is_list(structures) or not _is_list(triggers):
        raise ValueError("type must be structural_tag, and structures and triggers lists of at least one entry")
    tags = []
    for index, structure in enumerate(structures):
        if not isinstance(structure, Mapping) or set(structure) != {"begin", "schema", "end"}:
            raise ValueError(f"structures[{index}] must be an object of begin, schema and end")
        content = {"type": "json_schema", "json_schema": structure["schema"]}
        tags.append({"begin": structure["begin"], "content": content, "end": structure["end"]})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Lark:
    """A grammar that grows rule by rule. Mutable; owned by `tags_grammar`."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids
        self._rules: list[str] = []

    def grammar(self, form: Any) -> str:
        start = self._expression(form, "format")
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules, r"TEXT: /(.|\n)*/", ""])

    def _expression(self, form: Any, where: str) -> str:
        """What stands for a format in a rule; `where` names it."""
        kinds = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }
        if not isinstance(form, Mapping) or form.get("type") not in kinds:
            raise ValueError(f"{where} must be an object whose type is one of {', '.join(kinds)}")
        return kinds[form["type"]](form, where)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """A text to the letter; special tokens in it are those tokens."""
        pieces, begin, at = [], 0, 0
        while at < len(text):
            token = max((token for token in self._special_ids if text.startswith(token, at)), key=len, default=None)
            if token is None:
                at += 1
                continue
            pieces += [json.dumps(text[begin:at], ensure_ascii=False), f"<[{self._special_ids[token]}]>"]
            begin = at = at + len(token)
        pieces.append(json.dumps(text[begin:], ensure_ascii=False))
        return " ".join(piece for piece in pieces if piece != '""') or '""'

    def _const_string(self, form: Format, where: str) -> str:
        return self._literal(_text(form, "value", where))

    def _json_schema(self, form: Format, where: str) -> str:
        schema = form.get("json_schema")
        if not isinstance(schema, dict):
            raise ValueError(f"{where}.json_schema must be an object")
        options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
        return self._rule(f"%json {json.dumps({**schema, 'x-guidance': options})}")

    def _regex(self, form: Format, where: str) -> str:
        pattern = _text(form, "pattern", where).replace("/", r"\/").replace("\n", r"\n")
        return self._rule(f"/{pattern}/")

    def _any_text(self, form: Format, where: str) -> str:
        return "TEXT"

    def _sequence(self, form: Format, where: str) -> str:
        elements = _entries(form, "elements", where)
        return " ".join(self._expression(one, f"{where}.elements[{index}]") for index, one in enumerate(elements))

    def _or(self, form: Format, where: str) -> str:
        elements = _entries(form, "elements", where)
        ways = [self._expression(one, f"{where}.elements[{index}]") for index, one in enumerate(elements)]
        return f"({' | '.join(ways)})"

    def _tag(self, form: Format, where: str, *, skipped: int = 0) -> str:
        """A tag, without the first characters of its beginning that were written already."""
        if TAG_KEYS - form.keys():
            raise ValueError(f"{where} must have {', '.join(sorted(TAG_KEYS))}")
        begin, end, content = _text(form, "begin", where), _text(form, "end", where), form["content"]
        if isinstance(content, Mapping) and content.get("type") == "any_text" and end:
            return f"{self._literal(begin[skipped:])} {self._text_up_to(end)}"
        inside = self._expression(content, f"{where}.content")
        return f"{self._literal(begin[skipped:])} {inside} {self._literal(end)}"

    def _text_up_to(self, literal: str) -> str:
        """Text, and the first `literal` after it."""
        first = next((token for token in self._special_ids if literal.startswith(token)), None)
        if first is not None:
            return f"TEXT {self._literal(literal)}"
        return self._rule(f"TEXT {json.dumps(literal, ensure_ascii=False)}", "[lazy]")

    def _triggered_tags(self, form: Format, where: str) -> str:
        tags = _entries(form, "tags", where)
        triggers = _entries(form, "triggers", where)
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise ValueError("triggers must be non-empty strings")
        ways: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for index, tag in enumerate(tags):
            place = f"{where}.tags[{index}]"
            begin = _text(tag, "begin", place) if isinstance(tag, Mapping) else ""
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"{place} begins with {begin!r}, and with none of the triggers")
            ways[trigger].append(self._tag(tag, place, skipped=len(trigger)))
        triggered = " | ".join(
            f"{self._text_up_to(trigger)} ({' | '.join(found)})" for trigger, found in ways.items() if found
        )
        if form.get("stop_after_first"):
            return f"({triggered})" if form.get("at_least_one") else f"(TEXT | {triggered})"
        return f"({triggered}){'+' if form.get('at_least_one') else '*'} TEXT"

    def _tags_with_separator(self, form: Format, where: str) -> str:
        tags = _entries(form, "tags", where)
        ways = " | ".join(self._tag(tag, f"{where}.tags[{index}]") for index, tag in enumerate(tags))
        one = self._rule(f"{ways}")
        separator = self._literal(_text(form, "separator", where))
        several = one if form.get("stop_after_first") else f"{one} ({separator} {one})*"
        return f"({several})" if form.get("at_least_one") else f"({several})?"


def _text(form: Mapping[str, Any], name: str, where: str) -> str:
    value = form.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}.{name} must be a string")
    return value


def _entries(form: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    value = form.get(name)
    if not _is_list(value):
        raise ValueError(f"{where}.{name} must be a list of at least one entry")
    assert isinstance(value, list)
    return value


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0
