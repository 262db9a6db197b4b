"""Output: the core's tokens become vLLM's outputs, stop strings end sequences, nothing is lost between two looks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_engine import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams
from jax_engine.core.messages import CoreOutput, Ready, TokenLogprobs
from jax_engine.frontend.output_processor import OutputProcessor, QueueOverflowError, RequestFailedError, RequestState
from jax_engine.frontend.processor import InputProcessor, ModelText, PreparedRequest
from jax_engine.frontend.tokenizer import Tokenizer

DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(
        models.BPE(vocab={"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}, merges=[])
    )
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    return Tokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>"))


TOKENIZER = byte_tokenizer()
EOS = 1
INPUTS = InputProcessor(ModelText(Path(), TOKENIZER, {}), Ready(1000, 300, 64, 16))


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def request(request_id: str = "r", **params: Any) -> PreparedRequest:
    return INPUTS.prepare(request_id, "Hi", SamplingParams(**{"max_tokens": 100, **params}))


class Playback:
    """An output processor with one request, fed by hand."""

    def __init__(self, **params: Any) -> None:
        self.outputs = OutputProcessor(TOKENIZER)
        self.prepared = request(**params)
        self.state: RequestState = self.outputs.add(self.prepared)
        self.aborted: list[str] = []

    def send(self, text: str | list[int], *, index: int = 0, **fields: Any) -> bool:
        """Pass on one message of the core; returns whether there is something new to take."""
        token_ids = ids_of(text) if isinstance(text, str) else text
        output = CoreOutput(self.prepared.core_requests[index].request_id, token_ids, **fields)
        processed = self.outputs.process([output])
        self.aborted += processed.stopped
        return processed.changed == [self.state]

    def take(self) -> RequestOutput:
        return self.state.take()

    def completion(self) -> CompletionOutput:
        (completion,) = self.state.take().outputs
        return completion


def test_a_finished_request_has_all_that_vllm_gives() -> None:
    play = Playback()
    assert play.send("ab", first_scheduled_time=2.0, num_cached_tokens=1)
    play.send("c", finish_reason="length", num_preemptions=3)
    output = play.take()
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "Hi", ids_of("Hi"))
    assert output.outputs == [CompletionOutput(0, "abc", ids_of("abc"), "length", None)]
    assert output.finished and output.outputs[0].finished()
    assert output.num_cached_tokens == 1
    assert output.metrics is not None
    assert output.metrics.arrival_time == play.prepared.arrival_time
    assert output.metrics.first_scheduled_time == 2.0
    assert output.metrics.first_token_time is not None and output.metrics.last_token_time is not None
    assert output.metrics.first_token_time <= output.metrics.last_token_time
    assert output.metrics.num_preemptions == 3
    assert play.outputs.num_requests == 0


def test_deltas_that_nobody_took_are_merged() -> None:
    play = Playback(output_kind=DELTA)
    assert play.send("a")
    assert not play.send("b"), "already known to have news"
    assert play.completion() == CompletionOutput(0, "ab", ids_of("ab"))
    assert play.send("c"), "news again after it was taken"
    play.send("d", finish_reason="length")
    assert play.completion() == CompletionOutput(0, "cd", ids_of("cd"), "length")


def test_cumulative_outputs_hold_everything_and_stay_as_they_were() -> None:
    play = Playback(output_kind=CUMULATIVE)
    play.send("a")
    early = play.completion()
    play.send("b")
    assert play.completion() == CompletionOutput(0, "ab", ids_of("ab"))
    assert early == CompletionOutput(0, "a", ids_of("a"))


def test_final_only_has_no_news_before_the_end() -> None:
    play = Playback(output_kind=FINAL_ONLY)
    assert not play.send("a")
    assert play.send("b", finish_reason="length")
    assert play.completion().text == "ab"


def test_a_request_that_finishes_is_reported_even_when_it_had_news_already() -> None:
    """Otherwise its owner would never learn of the end and keep it for ever."""
    play = Playback(output_kind=DELTA)
    assert play.send("a")
    assert play.send("b", finish_reason="length")


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_every_kind_tells_the_same_story(kind: RequestOutputKind) -> None:
    play = Playback(output_kind=kind, stop="</", include_stop_str_in_output=True)
    text, token_ids = "", []
    for character in "é<b>日本<":
        changed = play.send(character)
        if changed and kind is DELTA:
            text, token_ids = text + (new := play.completion()).text, token_ids + new.token_ids
    play.send("/")
    last = play.completion()
    if kind is not DELTA:
        text, token_ids = "", []
    assert (text + last.text, token_ids + last.token_ids) == ("é<b>日本</", ids_of("é<b>日本</"))
    assert (last.finish_reason, last.stop_reason) == ("stop", "</")


def test_an_unfinished_character_ends_as_a_replacement_character() -> None:
    play = Playback(output_kind=DELTA)
    play.send(ids_of("é")[:1])
    assert play.completion().text == ""
    play.send([], finish_reason="length")
    assert play.completion().text == "\ufffd"


@pytest.mark.parametrize("include", [False, True], ids=["hidden", "included"])
def test_a_stop_string_ends_the_sequence_and_the_core_is_told(include: bool) -> None:
    play = Playback(stop=["zz", "END"], include_stop_str_in_output=include)
    for character in "okE":
        play.send(character)
    assert play.completion().text == "ok", "what may become a stop string is held back"
    play.send("N")
    assert play.send("D")
    expected = CompletionOutput(0, "okEND" if include else "ok", ids_of("okEND"), "stop", "END")
    assert play.completion() == expected
    assert play.aborted == [play.prepared.core_requests[0].request_id]
    assert not play.send("more"), "what the core had under way is ignored"
    assert play.outputs.num_requests == 0


def test_tokens_after_a_stop_string_in_the_same_message_are_dropped() -> None:
    play = Playback(stop="b")
    play.send("abcd")
    assert play.completion() == CompletionOutput(0, "a", ids_of("ab"), "stop", "b")


def test_what_was_held_back_comes_out_at_the_end() -> None:
    play = Playback(stop="END")
    play.send("okEN", finish_reason="length")
    assert play.completion() == CompletionOutput(0, "okEN", ids_of("okEN"), "length")
    assert play.aborted == []


def test_a_stop_string_in_the_last_token_wins_over_the_length() -> None:
    play = Playback(stop="END")
    play.send("okEND", finish_reason="length")
    assert play.completion() == CompletionOutput(0, "ok", ids_of("okEND"), "stop", "END")
    assert play.aborted == [], "the core has ended it already"


def test_a_stop_string_counts_only_after_min_tokens() -> None:
    play = Playback(stop="a", min_tokens=2)
    play.send("a")
    play.send("a")
    assert play.completion().text == "aa"
    play.send("a")
    assert play.completion() == CompletionOutput(0, "aa", ids_of("aaa"), "stop", "a")


@pytest.mark.parametrize("stop", [None, "never"], ids=["no stop string", "a stop string"])
@pytest.mark.parametrize("include", [False, True], ids=["hidden", "included"])
def test_a_stop_id_is_output_and_its_text_is_not_unless_asked_for(stop: str | None, include: bool) -> None:
    (letter,) = ids_of("!")
    play = Playback(stop_token_ids=[letter], stop=stop, include_stop_str_in_output=include)
    play.send("ok")
    play.send([letter], finish_reason="stop", stop_reason=letter)
    text = "ok!" if include else "ok"
    assert play.completion() == CompletionOutput(0, text, [*ids_of("ok"), letter], "stop", letter)


def test_an_end_without_a_token_takes_none_away() -> None:
    play = Playback()
    play.send("ok")
    play.send([], finish_reason="stop")
    assert play.completion() == CompletionOutput(0, "ok", ids_of("ok"), "stop")


@pytest.mark.parametrize(("skip", "text"), [(True, "ok"), (False, "o<s>k")])
def test_special_tokens_show_on_request(skip: bool, text: str) -> None:
    play = Playback(skip_special_tokens=skip)
    play.send([*ids_of("o"), 0, *ids_of("k"), EOS], finish_reason="stop")
    completion = play.completion()
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", None)
    assert completion.token_ids[-1] == EOS


def test_completions_of_one_prompt_are_merged() -> None:
    play = Playback(n=3, output_kind=DELTA, stop="!")
    play.send("b", index=1)
    play.send("a", index=0)
    first = play.take()
    assert [(c.index, c.text) for c in first.outputs] == [(0, "a"), (1, "b")], "a delta has only those with news"
    play.send("c!", index=2)
    play.send("B", index=1, finish_reason="length")
    assert not play.state.finished and not play.take().finished
    play.send("A", index=0, finish_reason="length")
    last = play.take()
    assert last.finished and [c.text for c in last.outputs] == ["A"]
    assert play.aborted == [play.prepared.core_requests[2].request_id]


def test_news_of_several_completions_in_one_step_count_once() -> None:
    play = Playback(n=2, output_kind=DELTA)
    messages = [
        CoreOutput(core.request_id, ids_of("x"), finish_reason="length") for core in play.prepared.core_requests
    ]
    assert play.outputs.process(messages).changed == [play.state]


def test_a_final_output_of_n_has_every_completion() -> None:
    play = Playback(n=2, output_kind=FINAL_ONLY)
    assert not play.send("a", index=1, finish_reason="length")
    assert play.send("b", index=0, finish_reason="length")
    assert [c.text for c in play.take().outputs] == ["b", "a"]


def test_abort_ends_a_request_with_what_it_has() -> None:
    play = Playback(stop="zz", n=2)
    play.send("okz")
    play.send("done", index=1, finish_reason="length")
    assert play.outputs.abort(["r", "unknown"]) == [play.prepared.core_requests[0].request_id]
    output = play.take()
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("okz", "abort"), ("done", "length")]
    assert output.finished and play.outputs.num_requests == 0
    assert play.outputs.abort(["r"]) == []


def test_an_error_of_the_core_ends_the_request_only() -> None:
    play = Playback(n=2)
    other = play.outputs.add(request("other"))
    assert play.send([], finish_reason="error", error="out of pages")
    assert isinstance(play.state.error, RequestFailedError) and play.state.finished
    assert str(play.state.error) == "request r failed: out of pages"
    assert play.prepared.core_requests[1].request_id in play.aborted, "its other completions end with it"
    assert play.outputs.request_ids() == ["other"] and not other.finished


def test_a_refusal_ends_the_request_with_an_error_of_its_own() -> None:
    play = Playback(n=2)
    assert play.send([], finish_reason="refused", error="the queue is full")
    assert isinstance(play.state.error, QueueOverflowError) and play.state.finished
    assert str(play.state.error) == "the queue is full"


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    play = Playback()
    with pytest.raises(ValueError, match="request_id='r' is in use"):
        play.outputs.add(request())
    play.outputs.abort(["r"])
    again = play.outputs.add(request())
    play.send("late output of the first")
    assert again.take().outputs[0].text == ""


def count_decodings(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, token_ids: calls.append(1) or decode(self, token_ids))
    action()
    monkeypatch.undo()
    return len(calls)


def test_text_that_nobody_looks_at_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and for a slow client, many tokens are decoded together: the loop that receives them stays lean."""

    def run() -> None:
        play = Playback(output_kind=FINAL_ONLY)
        for _ in range(100):
            play.send("a")
        play.send("a", finish_reason="length")
        assert play.completion().text == "a" * 101

    assert count_decodings(run, monkeypatch) <= 4


def logprobs_of(token_ids: list[int], value: float = -1.0) -> list[TokenLogprobs]:
    """Each token's own, of rank 3, and the likeliest, which is the id after it."""
    return [TokenLogprobs(3, [token, token + 1], [value, -0.5]) for token in token_ids]


def test_logprobs_come_with_their_tokens_as_vllms_dictionaries() -> None:
    play = Playback(logprobs=1)
    play.send("ab", logprobs=logprobs_of(ids_of("ab")))
    play.send("c", logprobs=logprobs_of(ids_of("c"), -2.0), finish_reason="length")
    completion = play.completion()
    a = ids_of("a")[0]
    assert completion.logprobs is not None and len(completion.logprobs) == 3
    assert completion.logprobs[0] == {a: Logprob(-1.0, 3, "a"), a + 1: Logprob(-0.5, 1, "b")}
    assert completion.cumulative_logprob == -4.0


def test_a_token_that_is_the_likeliest_is_there_once() -> None:
    play = Playback(logprobs=1)
    (a,) = ids_of("a")
    play.send([a], logprobs=[TokenLogprobs(1, [a, a], [-0.25, -0.25])])
    assert play.completion().logprobs == [{a: Logprob(-0.25, 1, "a")}]


def test_deltas_have_the_new_logprobs_and_the_whole_sum() -> None:
    play = Playback(logprobs=0, output_kind=DELTA)
    sums = []
    for text in "abc":
        play.send(text, logprobs=logprobs_of(ids_of(text)))
        completion = play.completion()
        assert [next(iter(position)) for position in completion.logprobs or ()] == completion.token_ids == ids_of(text)
        sums.append(completion.cumulative_logprob)
    assert sums == [-1.0, -2.0, -3.0]


def test_logprobs_end_where_a_stop_string_ends_the_tokens() -> None:
    play = Playback(logprobs=0, stop="b")
    play.send("abc", logprobs=logprobs_of(ids_of("abc")))
    completion = play.completion()
    assert completion.token_ids == ids_of("ab")
    assert len(completion.logprobs or ()) == 2


def test_prompt_logprobs_begin_with_none_and_are_in_one_delta_only() -> None:
    for kind, later in ((DELTA, None), (CUMULATIVE, 2)):
        play = Playback(prompt_logprobs=1, output_kind=kind)
        play.send("a", prompt_logprobs=logprobs_of(ids_of("i")))
        prompt_logprobs = play.take().prompt_logprobs
        assert prompt_logprobs is not None and prompt_logprobs[0] is None
        assert list(prompt_logprobs[1] or ()) == [ids_of("i")[0], ids_of("i")[0] + 1]
        play.send("b")
        again = play.take().prompt_logprobs
        assert (again and len(again)) == later
