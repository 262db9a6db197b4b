"""Single tokens as text and as bytes, whatever the kind of tokenizer."""

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from jax_engine.frontend.token_texts import TokenTexts
from jax_engine.frontend.tokenizer import Tokenizer, load_tokenizer
from jax_engine.loading.model_files import resolve_model_path


def sentencepiece() -> Tokenizer:
    """Words with marked spaces, and bytes to fall back on."""
    pieces = {"<s>": 0, "\u2581Hi": 1, "there": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "\u2581": 6}
    rust = RustTokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    return Tokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>"))


def test_a_token_keeps_the_space_that_it_begins_with() -> None:
    texts = TokenTexts(sentencepiece())
    assert [texts.text(token) for token in range(3)] == ["<s>", " Hi", "there"]
    assert texts.text(6) == " "


def test_bytes_of_a_split_character_join_to_it() -> None:
    texts = TokenTexts(sentencepiece())
    assert b"".join(texts.utf8(token) for token in (1, 3, 4, 5)).decode() == " Hi\u20ac"
    assert texts.text(3) == "\ufffd"


@pytest.mark.parametrize("text", ["Once upon a time, 17 + 25 = 42.", "na\u00efve \u20ac \U0001f600\n\t\x00\x7f"])
def test_bytes_of_a_byte_level_tokenizers_tokens_join_to_the_text(text: str) -> None:
    tokenizer = load_tokenizer(resolve_model_path("demo"))
    texts = TokenTexts(tokenizer)
    assert b"".join(texts.utf8(token) for token in tokenizer.encode(text, add_special_tokens=False)).decode() == text


def test_an_id_that_the_tokenizer_lacks_is_no_text() -> None:
    texts = TokenTexts(sentencepiece())
    assert (texts.text(1000), texts.utf8(1000)) == ("", b"")
