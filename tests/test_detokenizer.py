"""Streamed text equals the text decoded at once, costs no more as it grows, and never shows a part of a stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from jax_engine.frontend.detokenizer import WINDOW_TOKENS, IncrementalDetokenizer, StopMatcher, StopStrings
from jax_engine.frontend.tokenizer import Tokenizer

TEXTS = ["the quick brown fox jumps", "日本語のテキスト", "привет мир", "👩‍👩‍👧‍👦 😀😀 é e\u0301", "x\n\n  y\t"]


def byte_level_tokenizer() -> Tokenizer:
    """A trained byte-level BPE; some of its tokens end in the middle of a character, and one id is missing."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False),
    )
    rust.add_tokens([AddedToken("<think>", special=False), AddedToken("日本", special=False)])
    return Tokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>"))


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece's decoder: spaces as ▁, one dropped at the beginning, unknown characters byte by byte."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁the", "日", "."]
    rust = RustTokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", unk_token="<unk>"))


BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
BYTES = {
    bytes_: BYTE_LEVEL.hugging_face.convert_tokens_to_ids(bytes_) for bytes_ in pre_tokenizers.ByteLevel.alphabet()
}
MALFORMED = BYTES["ÿ"]  # the byte 0xFF, which no UTF-8 text holds
FALLBACK_IDS = dict(BYTE_FALLBACK.hugging_face.get_vocab())


def stream(tokenizer: Tokenizer, pieces: list[list[int]], *, skip_special_tokens: bool = False) -> list[str]:
    """What each push returns, and the last flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


def one_by_one(token_ids: list[int]) -> list[list[int]]:
    return [[token] for token in token_ids]


def test_added_tokens_that_follow_one_another_are_joined_if_that_is_asked():
    """Of a decoder that puts spaces between all tokens; other spaces stay, and skipped tokens leave none."""
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    rust.add_special_tokens(["<s>", "<t>"])
    rust.add_tokens([AddedToken("<think>", special=False)])
    spaced = Tokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>"))
    ids = spaced.hugging_face.convert_tokens_to_ids(["a", "<s>", "<t>", "b", "<think>", "<s>", "<think>", "a", "b"])
    texts = {}
    for skip in (False, True):
        detokenizer = IncrementalDetokenizer(spaced, skip_special_tokens=skip, spaces_between_special_tokens=False)
        texts[skip] = "".join([*(detokenizer.push([token]) for token in ids * 4), detokenizer.flush()])
    assert texts[False] == " ".join(["a <s><t> b <think><s><think> a b"] * 4)
    assert texts[True] == " ".join(["a b <think> <think> a b"] * 4)


class Recorder:
    """A tokenizer that remembers how many tokens each decoding took."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_ids = tokenizer.num_ids
        self.skipped_ids = tokenizer.skipped_ids
        self.sizes: list[int] = []

    def decode(self, token_ids: list[int]) -> str:
        self.sizes.append(len(token_ids))
        return self.tokenizer.decode(token_ids)


any_id = st.integers(0, BYTE_LEVEL.num_ids + 2)  # some beyond the tokenizer's: models pad their vocabularies
any_pieces = st.lists(st.lists(any_id, max_size=5), max_size=60)


@settings(max_examples=400, deadline=None)
@given(any_pieces)
@example([[MALFORMED]] * 40)
@example([[MALFORMED] * 40, [MALFORMED]])
def test_any_tokens_in_any_pieces_join_to_the_whole_text(pieces: list[list[int]]) -> None:
    whole = [token for piece in pieces for token in piece]
    assert "".join(stream(BYTE_LEVEL, pieces)) == BYTE_LEVEL.decode(whole)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(sorted(BYTES.values())), max_size=80), st.integers(1, 7))
def test_any_bytes_join_to_the_whole_text(token_ids: list[int], size: int) -> None:
    """Single bytes are the hardest case: nearly all of these are malformed UTF-8."""
    pieces = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    assert "".join(stream(BYTE_LEVEL, pieces)) == BYTE_LEVEL.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_text_arrives_as_soon_as_its_last_byte(text: str) -> None:
    """Byte by byte, a whole character comes with its last byte and U+FFFD never shows (unless it is in the text)."""
    level_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    token_ids = [BYTES[byte] for piece, _ in level_bytes for byte in piece]
    pushed = stream(BYTE_LEVEL, one_by_one(token_ids))
    assert "".join(pushed) == text
    if "\ufffd" not in text:
        assert [piece for piece in pushed if piece] == list(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a the.日é😀", max_size=60), st.integers(1, 4))
def test_byte_fallback_keeps_spaces_and_characters(text: str, size: int) -> None:
    token_ids: list[int] = []
    for character in text:
        piece = character.replace(" ", "▁")
        known = (
            [FALLBACK_IDS[piece]]
            if piece in FALLBACK_IDS
            else [FALLBACK_IDS[f"<0x{b:02X}>"] for b in character.encode()]
        )
        token_ids += known
    pieces = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    assert "".join(stream(BYTE_FALLBACK, pieces)) == BYTE_FALLBACK.decode(token_ids) == text.removeprefix(" ")


def test_a_continuation_keeps_the_space_that_a_beginning_drops() -> None:
    """SentencePiece's decoder drops the first space of a text; a completion is not the beginning of one."""
    first, second = FALLBACK_IDS["▁the"], FALLBACK_IDS["▁a"]
    assert BYTE_FALLBACK.decode([second]) == "a"
    detokenizer = IncrementalDetokenizer(BYTE_FALLBACK, skip_special_tokens=True, prompt_token_ids=[first])
    assert detokenizer.push([second]) == " a"


@settings(max_examples=200, deadline=None)
@given(any_pieces)
def test_skipped_special_tokens_leave_no_trace(pieces: list[list[int]]) -> None:
    kept = [token for piece in pieces for token in piece if token not in BYTE_LEVEL.special_ids]
    assert "".join(stream(BYTE_LEVEL, pieces, skip_special_tokens=True)) == BYTE_LEVEL.decode(kept)


def test_special_tokens_are_skipped_on_request_and_other_added_tokens_never() -> None:
    start, think = BYTE_LEVEL.hugging_face.convert_tokens_to_ids(["<s>", "<think>"])
    assert stream(BYTE_LEVEL, [[start], [think]], skip_special_tokens=True) == ["", "<think>", ""]
    assert stream(BYTE_LEVEL, [[start], [think]]) == ["<s>", "<think>", ""]


def test_an_unfinished_character_is_held_until_the_end() -> None:
    first, second, third = (BYTES[byte] for byte in "æĹ¥")  # 日 is E6 97 A5
    assert stream(BYTE_LEVEL, [[first], [second], [third]]) == ["", "", "日", ""]
    assert stream(BYTE_LEVEL, [[first], [second]]) == ["", "", "\ufffd"]


def test_malformed_bytes_do_not_stop_the_stream() -> None:
    """A model that repeats a bad byte must still stream, or a client would wait for text until the very end."""
    pushed = stream(BYTE_LEVEL, one_by_one([MALFORMED] * 100))
    assert "".join(pushed[:50]).count("\ufffd") >= 45
    assert "".join(pushed) == "\ufffd" * 100


@pytest.mark.parametrize("token", [MALFORMED, BYTES["a"], BYTES["æ"]], ids=["malformed", "ascii", "unfinished"])
def test_cost_of_a_token_does_not_grow(token: int) -> None:
    recorder = Recorder(BYTE_LEVEL)
    detokenizer = IncrementalDetokenizer(recorder, skip_special_tokens=True)  # type: ignore[arg-type]
    for _ in range(2000):
        detokenizer.push([token])
    assert max(recorder.sizes) <= 2 * WINDOW_TOKENS
    assert len(recorder.sizes) <= 2000 * 5


def feed(
    stops: list[str], pieces: list[str], *, include: bool = False, armed_from: int = 0
) -> tuple[list[str], str | None]:
    """Pieces shown, up to the stop string found."""
    matcher = StopMatcher(StopStrings(stops), include_stop_string=include)
    shown = []
    for index, piece in enumerate(pieces):
        text, found = matcher.push(piece, armed=index >= armed_from)
        shown.append(text)
        if found is not None:
            return shown, found
    return [*shown, matcher.flush()], None


def first_stop(stops: list[str], text: str) -> tuple[int, str] | None:
    """Where the first stop string to be complete ends; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


few_letters = st.text(alphabet="ab", max_size=12)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3), st.lists(few_letters, max_size=8)
)
def test_the_first_stop_string_wins_and_no_part_of_it_shows(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = first_stop(stops, text)
    shown, found = feed(stops, pieces)
    included, also_found = feed(stops, pieces, include=True)
    if expected is None:
        assert (found, "".join(shown)) == (None, text) == (also_found, "".join(included))
    else:
        end, stop = expected
        assert (found, "".join(shown)) == (stop, text[: end - len(stop)])
        assert (also_found, "".join(included)) == (stop, text[:end])


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab", min_size=1, max_size=5), st.lists(few_letters, max_size=8))
def test_only_what_may_begin_a_stop_string_is_held(stop: str, pieces: list[str]) -> None:
    matcher = StopMatcher(StopStrings([stop]), include_stop_string=False)
    seen = shown = ""
    for piece in pieces:
        text, found = matcher.push(piece, armed=True)
        seen, shown = seen + piece, shown + text
        if found is not None:
            return
        held = max(length for length in range(len(stop)) if seen.endswith(stop[:length]))
        assert shown == seen[: len(seen) - held]


def test_a_stop_string_that_ends_too_early_does_not_count() -> None:
    assert feed(["END"], ["aEND", "bE", "ND", "c"], armed_from=1) == (["aEND", "b", ""], "END")
    assert feed(["END"], ["aE", "ND", "c"], armed_from=1) == (["a", ""], "END"), "it counts where it ends"
    assert feed(["aba"], ["aba", "ba"], armed_from=1) == (["ab", ""], "aba"), "the end of one may begin the next"
