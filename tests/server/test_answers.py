"""Log-probabilities in OpenAI's forms, whole and in pieces, without a server."""

from typing import Any

import pytest

from jax_engine import CompletionOutput, Logprob, RequestOutput, SamplingParams
from jax_engine.frontend.token_texts import TokenTexts
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.server.openai.answers import Answers, ChatAnswers, CompletionAnswers

TOKENIZER = load_tokenizer(resolve_model_path("demo"))
TEXTS = TokenTexts(TOKENIZER)
PROMPT, TEXT = "One \u20ac", " is 2 \U0001f600s"
PROMPT_IDS, IDS = (TOKENIZER.encode(text, add_special_tokens=False) for text in (PROMPT, TEXT))
OTHER = 5


def position(token: int) -> dict[int, Logprob]:
    """A token that is second to another."""
    return {token: Logprob(-1.5, 2, TEXTS.text(token)), OTHER: Logprob(-0.5, 1, TEXTS.text(OTHER))}


def whole_characters(token_ids: list[int]) -> str:
    return b"".join(map(TEXTS.utf8, token_ids)).decode(errors="ignore")


def output(first: int = 0, last: int = len(IDS), **fields: Any) -> RequestOutput:
    """What a request gives for some of the tokens."""
    text = whole_characters(IDS[:last])[len(whole_characters(IDS[:first])) :]
    logprobs = [position(token) for token in IDS[first:last]]
    completion = CompletionOutput(0, text, IDS[first:last], logprobs=logprobs)
    prompt_logprobs = [None, *(position(token) for token in PROMPT_IDS[1:])]
    return RequestOutput("r", PROMPT, PROMPT_IDS, [completion], prompt_logprobs=prompt_logprobs)


def shown(answers: Answers, given: RequestOutput) -> tuple[str, Any]:
    (completion,) = given.outputs
    return answers.text(0, given, completion), answers.logprobs(0, given, completion)


def completions(number: int = 1, **options: Any) -> CompletionAnswers:
    return CompletionAnswers(TEXTS, SamplingParams(logprobs=number), TOKENIZER, **options)


def test_completions_have_parallel_lists_and_offsets_into_the_text():
    text, logprobs = shown(completions(), output())
    assert text == TEXT
    assert logprobs["token_logprobs"] == [-1.5] * len(IDS)
    pieces = zip(IDS, logprobs["tokens"], logprobs["text_offset"], strict=True)
    for token, piece, offset in pieces:
        whole = TEXTS.utf8(token).decode(errors="replace")
        assert piece == whole == TEXT[offset:][: len(piece)] or piece.startswith("bytes:\\x")
    assert logprobs["top_logprobs"][0] == {TEXTS.text(IDS[0]): -1.5, TEXTS.text(OTHER): -0.5}


def test_a_character_of_several_tokens_is_shown_as_bytes():
    _, logprobs = shown(completions(), output())
    split = [piece for piece in logprobs["tokens"] if piece.startswith("bytes:")]
    joined = "".join(split).replace("bytes:", "").replace("\\x", "")
    assert bytes.fromhex(joined).decode() == "\U0001f600"


def test_an_echoed_prompt_comes_first_with_nothing_for_its_first_token():
    text, logprobs = shown(completions(echo=True), output())
    assert text == PROMPT + TEXT
    assert len(logprobs["tokens"]) == len(PROMPT_IDS) + len(IDS)
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][len(PROMPT_IDS)] == len(PROMPT)


@pytest.mark.parametrize("echo", [False, True])
def test_pieces_of_a_stream_join_to_the_whole(echo: bool):
    whole_text, whole = shown(completions(echo=echo), output())
    answers = completions(echo=echo)
    pieces = [shown(answers, output(first, min(first + 2, len(IDS)))) for first in range(0, len(IDS), 2)]
    assert "".join(text for text, _ in pieces) == whole_text
    for name in whole:
        assert [item for _, piece in pieces for item in piece[name]] == whole[name]


def test_a_completion_that_begins_later_in_a_stream_has_its_prompt_too():
    answers = completions(echo=True)
    first = shown(answers, output())
    later = RequestOutput("r", PROMPT, PROMPT_IDS, output().outputs)
    assert answers.logprobs(1, later, later.outputs[0]) == first[1]


def test_chats_have_a_list_of_tokens_with_bytes():
    _, logprobs = shown(ChatAnswers(TEXTS, SamplingParams(logprobs=1)), output())
    content = logprobs["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT
    assert [entry["logprob"] for entry in content] == [-1.5] * len(IDS)
    (top,) = content[0]["top_logprobs"]
    assert (top["token"], top["logprob"]) == (TEXTS.text(OTHER), -0.5), "the likeliest, not the token's own"


def test_top_logprobs_of_zero_and_nobody_asking():
    _, logprobs = shown(ChatAnswers(TEXTS, SamplingParams(logprobs=0)), output())
    assert [entry["top_logprobs"] for entry in logprobs["content"]] == [[]] * len(IDS)
    silent = RequestOutput("r", PROMPT, PROMPT_IDS, [CompletionOutput(0, TEXT, IDS)])
    for kind in (Answers, ChatAnswers):
        assert kind(TEXTS, SamplingParams()).logprobs(0, silent, silent.outputs[0]) is None
    assert shown(CompletionAnswers(TEXTS, SamplingParams(), TOKENIZER, echo=True), silent) == (PROMPT + TEXT, None)


def test_minus_infinity_is_a_number_that_json_has():
    impossible = CompletionOutput(0, "a", [3], logprobs=[{3: Logprob(float("-inf"), 9, "a")}])
    given = RequestOutput("r", PROMPT, PROMPT_IDS, [impossible])
    assert shown(completions(), given)[1]["token_logprobs"] == [-9999.0]
    assert shown(ChatAnswers(TEXTS, SamplingParams(logprobs=0)), given)[1]["content"][0]["logprob"] == -9999.0
