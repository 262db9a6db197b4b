"""Structured output on random weights, which follow no form by themselves: every output has the one asked for."""

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plans import Untimed
from tiny_engine import TINY, core_request

from jax_engine import (
    LLM,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jax_engine.core.messages import StructuredRequest, Vocabulary
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.grammar import constraints, grammar_checker
from jax_engine.grammar.bitmasks import ALL_TOKENS, has_bit, ids_of
from jax_engine.grammar.constraints import GrammarConstraint
from jax_engine.grammar.grammar_checker import GrammarChecker
from jax_engine.grammar.grammars import new_matcher
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.scheduling.request import Request
from random_schemas import is_met, random_schema

EOS = 3  # of the built-in tokenizer
PROMPTS = ["Hello", "A list of things that are not there:", "x"]
NUMBERED = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TAGS = {"structures": [{"begin": "<f>", "schema": NUMBERED, "end": "</f>"}], "triggers": ["<f>"]}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(load_tokenizer(resolve_model_path("demo")).as_json(), 1024, (EOS,))


@pytest.fixture(scope="module")
def checker(vocabulary: Vocabulary) -> GrammarChecker:
    return GrammarChecker(vocabulary)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small engine over random weights, with the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY | {"vocab_size": 1024, "num_hidden_layers": 1}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model_path("demo") / name, folder)
    return {
        "model": str(folder),
        "load_format": "dummy",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "block_size": 8,
        "kv_cache_memory_bytes": 32 * 2**10,  # 32 pages: one sequence of the longest, or a few short ones
        "compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
    }


@pytest.fixture(scope="module")
def llm(settings: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**settings) as llm:
        yield llm


def held(form: dict[str, Any], **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 120, "seed": 1, "structured_outputs": form} | fields)


def completions(llm: LLM, params: list[SamplingParams]) -> list[tuple[str | None, str]]:
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [(completion.finish_reason, completion.text) for output in outputs for completion in output.outputs]


def test_outputs_of_random_schemas_parse_and_mean_what_their_schemas_do(llm):
    schemas = [random_schema(number) for number in range(30)]
    forms = [{"json": schema, "disable_any_whitespace": True} for schema in schemas]
    outputs = completions(llm, [held(form, max_tokens=200, seed=seed) for seed, form in enumerate(forms)])
    for schema, (reason, text) in zip(schemas, outputs, strict=True):
        assert reason == "stop"
        assert is_met(json.loads(text), schema), (text, schema)


def test_the_judge_of_schemas_is_no_pushover():
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1, "maxLength": 2}}} | {
        "required": ["a"]
    }
    assert is_met({"a": "x"}, schema)
    for wrong in ({}, {"a": ""}, {"a": "xyz"}, {"a": 1}, {"a": "x", "b": 1}, [], None):
        assert not is_met(wrong, schema)


FORMS = [
    ({"regex": "[a-c]{3}-(x|yy)"}, "[a-c]{3}-(x|yy)"),
    ({"choice": ["yes", "no", 'quo"ted\n']}, '(yes|no|quo"ted\n)'),
    ({"grammar": 'root ::= "(" root ")" | "a"'}, r"\(*a\)*"),
    ({"grammar": 'start: "a" mid "z"\nmid: /[0-9]{2}/ | "-"'}, "a([0-9]{2}|-)z"),
    ({"json_object": True, "disable_any_whitespace": True}, r"\{.*\}"),
    ({"json": NUMBERED, "disable_additional_properties": True, "whitespace_pattern": "_"}, r'\{_?"n"_?:_?-?\d+_?\}'),
]


@pytest.mark.parametrize(
    ("form", "expected"), FORMS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_every_kind_of_form(llm, form, expected):
    for temperature in (0.0, 1.0):
        ((reason, text),) = completions(llm, [held(form, temperature=temperature, max_tokens=200)])
        if reason == "stop":
            assert re.fullmatch(expected, text, re.DOTALL), text
        else:  # cut off: the beginning of one
            assert form.keys() & {"json_object", "grammar"} or "n" in text
            assert reason == "length"


def test_text_is_free_until_it_begins_like_a_tag(vocabulary, checker):
    """Random weights hardly ever begin one, so the matcher is led by hand."""
    matcher = new_matcher(checker.grammar(StructuredOutputsParams(structural_tag=TAGS)), vocabulary)
    encode = load_tokenizer(resolve_model_path("demo")).encode
    assert matcher.consume_tokens(encode("any text < of { course", add_special_tokens=False))
    assert matcher.is_accepting()
    assert matcher.consume_tokens(encode(' <f>{"n":', add_special_tokens=False))
    assert not matcher.is_accepting()
    assert not matcher.validate_tokens(encode("free", add_special_tokens=False))
    assert matcher.consume_tokens(encode("1}</f> and text", add_special_tokens=False))
    assert matcher.is_accepting()


def test_tokens_are_those_of_the_request_alone_whatever_shares_the_batch(llm):
    """Free requests and forms, greedy and drawn, several completions: none sees another."""
    params = [
        held(FORMS[0][0], temperature=1.0, n=3),
        SamplingParams(max_tokens=20, seed=5, ignore_eos=True),
        held({"json": NUMBERED, "disable_any_whitespace": True}, temperature=0.0, max_tokens=12),
        held({"choice": ["north", "south", "east", "west"]}, temperature=1.0, seed=8),
        SamplingParams(max_tokens=25, temperature=0.0, ignore_eos=True),
    ]
    together = llm.generate(["Hello"] * 5, params, use_tqdm=False)
    for number, one in enumerate(params):
        (alone,) = llm.generate("Hello", one, use_tqdm=False)
        assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in together[number].outputs]
    assert len({completion.text for completion in together[0].outputs}) > 1


def test_a_preempted_output_goes_on_where_it_was(llm):
    """With pages for half of the sequences, the others give way again and again."""
    schema = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 12, "maxItems": 14}
    params = [held({"json": schema, "disable_any_whitespace": True}, seed=seed) for seed in range(6)]
    alone = [completions(llm, [one])[0] for one in params]
    before = llm.get_metrics().preemptions_total
    together = llm.generate([PROMPTS[0]] * len(params), params, use_tqdm=False)
    assert llm.get_metrics().preemptions_total > before
    assert [(output.outputs[0].finish_reason, output.outputs[0].text) for output in together] == alone
    assert all(reason == "stop" and is_met(json.loads(text), schema) for reason, text in alone)


def test_where_an_output_may_end(llm):
    """At an end-of-sequence id where the grammar accepts: not before `min_tokens` as long as it can go on, and with
    `ignore_eos` only where nothing else can follow.
    """
    letters = {"regex": "[ab]*"}
    (ended, never, complete, cut, stopped) = llm.generate(
        ["x"] * 5,
        [
            held(letters, min_tokens=30),
            held(letters, ignore_eos=True, max_tokens=40),
            held({"choice": ["ab"]}, min_tokens=30, ignore_eos=True),
            held({"regex": "[ab]{50}"}, max_tokens=7),
            held({"regex": "a{9}b"}, stop=["b"]),
        ],
        use_tqdm=False,
    )
    assert len(ended.outputs[0].token_ids) >= 30
    assert (len(never.outputs[0].token_ids), never.outputs[0].finish_reason) == (40, "length")
    assert (complete.outputs[0].text, complete.outputs[0].finish_reason) == ("ab", "stop")
    assert (cut.outputs[0].finish_reason, len(cut.outputs[0].token_ids)) == ("length", 7)
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("a" * 9, "b")


DEEP = {"$defs": {f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1400)}}
DEEP |= {"$ref": "#/$defs/a0"}
DEEP["$defs"]["a1400"] = {"type": "string"}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(a"}, r"structured_outputs\.regex='\(a' cannot be followed: .*unclosed group"),
        ({"regex": "[^\\x00-\\U0010ffff]"}, "no output meets it"),
        ({"regex": "((a{1,100}){1,100}){1,100}"}, "too many expressions"),
        ({"json": {"type": "nonsense"}}, "Invalid type: nonsense"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 1}}, "Unsatisfiable"),
        ({"json": "{"}, r"json='\{' cannot be followed"),
        ({"json": "[1]"}, "a JSON schema is an object"),
        ({"json": DEEP}, "nested too deeply"),
        ({"grammar": "start: nowhere"}, "unknown name"),
        ({"grammar": "root ::= ("}, "as EBNF it cannot be read"),
        ({"grammar": 'start: "a" start'}, "cannot be followed"),
        ({"structural_tag": TAGS | {"triggers": ["<g>"]}}, "none of the triggers"),
        ({"structural_tag": {"type": "structural_tag", "format": {}}}, "format must be an object"),
    ],
    ids=str,
)
def test_a_grammar_that_cannot_be_followed_is_refused(llm, form, message):
    with pytest.raises(ValueError, match=message):
        llm.generate("x", held(form), use_tqdm=False)


def test_a_grammar_that_takes_long_is_given_up_and_the_next_one_is_checked(vocabulary, monkeypatch):
    checker = GrammarChecker(vocabulary)
    assert checker.grammar(StructuredOutputsParams(regex="a"))
    monkeypatch.setattr(grammar_checker, "CHECK_SECONDS", 0.1)
    checker._idle[0].process.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=r"more than 0\.1 seconds"):
        checker.grammar(StructuredOutputsParams(regex="(a|b)*c"))
    monkeypatch.undo()
    assert checker.grammar(StructuredOutputsParams(regex="(a|b)*c"))


def test_a_grammar_that_takes_long_keeps_no_other_waiting(vocabulary, monkeypatch):
    """And is checked once, whoever asks about it."""
    monkeypatch.setattr(grammar_checker, "CHECK_SECONDS", 60.0)
    checker = GrammarChecker(vocabulary)
    assert checker.grammar(StructuredOutputsParams(regex="a"))
    (stopped,) = checker._idle
    stopped.process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(checker.grammar, StructuredOutputsParams(regex="(a|b)*c")) for _ in range(2)]
        while checker._idle:
            time.sleep(0.01)
        assert checker.grammar(StructuredOutputsParams(regex="b+"))
        assert not any(one.done() for one in slow)
        stopped.process.send_signal(signal.SIGCONT)
        assert slow[0].result() == slow[1].result()
    assert len(checker._idle) == 2


def test_a_token_that_the_grammar_does_not_allow_ends_the_request_with_an_error(vocabulary, checker):
    """As when `allowed_token_ids` leave nothing that the grammar allows."""
    grammar = checker.grammar(StructuredOutputsParams(choice=["yes"]))
    asked = core_request("r", [1], 9, eos_token_ids=(EOS,), structured=StructuredRequest(grammar))
    constraint = GrammarConstraint(new_matcher(grammar, vocabulary), asked, vocabulary)
    request = Request(asked, order=0, constraint=constraint)
    assert request.append(500) is None
    constraints.Constraints().make_masks([constraint])
    assert request.append(500) == "error"
    assert constraint.error


def test_an_output_that_goes_round_in_circles_is_ended(llm):
    """The form makes it: nothing but a's."""
    detection = {"max_pattern_size": 3, "min_count": 4}
    (output,) = llm.generate("x", held({"regex": "a{40}"}, repetition_detection=detection), use_tqdm=False)
    (completion,) = output.outputs
    assert (completion.finish_reason, completion.stop_reason) == ("repetition", "repetition_detected")
    assert 4 <= len(completion.token_ids) < 40
    assert completion.text == "a" * len(completion.text)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    free = llm.generate("x", params, use_tqdm=False)[0].outputs[0].token_ids
    ended = llm.generate("x", replace(params, repetition_detection=detection), use_tqdm=False)[0].outputs[0]
    expected = next((n for n in range(1, 61) if RepetitionDetectionParams(**detection).found_in(free[:n], 0)), 60)
    assert ended.token_ids == free[:expected]


def test_a_mask_is_made_elsewhere_once_one_took_long(vocabulary, checker, monkeypatch):
    grammar = checker.grammar(StructuredOutputsParams(regex="[a-c]+"))
    monkeypatch.setattr(constraints, "SLOW_SECONDS", -1.0)
    owner = constraints.Constraints()
    owner.take_vocabulary(vocabulary)
    owner.begin(core_request("r", [1], 9, eos_token_ids=(EOS,), structured=StructuredRequest(grammar)))
    while not (ready := owner.take_compiled()):
        owner.wait(1.0)
    ((_, constraint),) = ready
    decode = load_tokenizer(resolve_model_path("demo")).decode
    for _ in range(3):
        assert constraint.is_slow
        masks, row = constraint.made()
        assert constraint.is_ready
        texts = {decode([int(token)]): int(token) for token in ids_of(masks[row]) if token != EOS}
        assert {"a", "b", "c"} <= texts.keys()
        assert all(re.fullmatch("[a-c]+", text) for text in texts)
        constraint.advance([texts["b"]])
        assert not constraint.is_ready
        owner.make_masks([constraint])
    owner.shutdown()


def test_masks_behind_drafts_are_those_of_the_tokens_one_by_one(vocabulary, checker, monkeypatch):
    """Also before `min_tokens`; a draft that may not come has none behind it, and nothing is left behind of them."""
    monkeypatch.setattr(constraints, "SLOW_SECONDS", math.inf)  # on a busy machine, none is made in a thread
    grammar = checker.grammar(StructuredOutputsParams(regex="a(b|cd)*e?"))
    asked = core_request("r", [1], 9, eos_token_ids=(EOS,), structured=StructuredRequest(grammar, min_tokens=3))
    decode = load_tokenizer(resolve_model_path("demo")).decode
    ids = {decode([token]): token for token in range(1024)}

    def constraint() -> GrammarConstraint:
        made = GrammarConstraint(new_matcher(grammar, vocabulary), asked, vocabulary)
        constraints.Constraints().make_masks([made])
        return made

    def rows_of(made: GrammarConstraint, drafts: list[int]) -> np.ndarray:
        rows = np.full((1 + len(drafts), 1024 // 32), ALL_TOKENS)
        made.fill(rows, drafts)
        return rows

    ahead, one_by_one = constraint(), constraint()
    drafts = [ids[text] for text in "abbcd"]
    rows = rows_of(ahead, drafts)
    for index, draft in enumerate(drafts):
        assert (rows[index] == rows_of(one_by_one, [])[0]).all()
        one_by_one.advance([draft])
        constraints.Constraints().make_masks([one_by_one])
    assert (rows[-1] == rows_of(one_by_one, [])[0]).all()
    assert not has_bit(rows[2], EOS)
    assert has_bit(rows[3], EOS)
    cut = rows_of(ahead, [ids["a"], ids["e"], ids["b"], ids["b"]])
    assert (cut[:2] == rows[:2]).all()
    assert (cut[3:] == ALL_TOKENS).all(), "behind e comes no b"
    ahead.advance(drafts[:2])
    constraints.Constraints().make_masks([ahead])
    assert (rows_of(ahead, []) == rows[2]).all()
    assert ahead.error is None


@pytest.mark.slow
def test_drafts_change_no_token_of_what_follows_a_grammar(settings, llm):
    """The draft model is the model, which knows of no grammar: what it drafts is often allowed, and often not."""
    forms: list[dict[str, Any]] = [
        {"regex": "[ -~\\n]{20,}"},
        {"json": NUMBERED},
        {"choice": ["yes", "no, never at all"]},
        {"regex": "(ab?){4,12}"},
    ]
    params = [
        *(held(form, max_tokens=40, temperature=number % 2, min_tokens=2) for number, form in enumerate(forms)),
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.2, bad_words=["a", " the"]),
        SamplingParams(temperature=0, max_tokens=30),
    ]
    speculation = {"method": "draft_model", "model": settings["model"], "num_speculative_tokens": 3}
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": 64 * 2**10}
    changes = {"speculative_config": speculation, "compile_before_ready": True, **limits}
    with LLM(**(settings | changes)) as drafting:
        drafting._running_core()._core.scheduler.drafts.times = Untimed((), ())
        for number, one in enumerate(params):
            with_drafts = drafting.generate(PROMPTS[number % 3], one, use_tqdm=False)[0].outputs[0]
            without = llm.generate(PROMPTS[number % 3], one, use_tqdm=False)[0].outputs[0]
            assert (with_drafts.token_ids, with_drafts.finish_reason) == (without.token_ids, without.finish_reason)
        together = drafting.generate([PROMPTS[number % 3] for number in range(6)], params, use_tqdm=False)
        alone = llm.generate([PROMPTS[number % 3] for number in range(6)], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]
        stats = drafting.get_metrics()
        assert 40 < stats.spec_accepted_tokens_total < stats.spec_draft_tokens_total
