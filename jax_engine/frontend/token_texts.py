"""What one token looks like by itself, for log-probabilities."""

from jax_engine.frontend.detokenizer import REPLACEMENT
from jax_engine.frontend.tokenizer import Tokenizer

WORD_BOUNDARY = "\u2581"  # SentencePiece's mark for a space before a word


class TokenTexts:
    """Texts and bytes of single tokens, kept once made. Mutable; owned by one `OutputProcessor`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    def text(self, token_id: int) -> str:
        """The text of a token as it stands inside a text, special ones included; U+FFFD for part of a character, and
        nothing for an id that the tokenizer lacks.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode(token_id)
        return text

    def utf8(self, token_id: int) -> bytes:
        """Its bytes in UTF-8, also of part of a character: those of a text's tokens join to the text's."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._encode(token_id)
        return found

    def _decode(self, token_id: int) -> str:
        if not self._is_known(token_id):
            return ""
        text = self._tokenizer.decode([token_id])
        # Decoders drop the space at the beginning of a text.
        if self._tokenizer.token(token_id).startswith(WORD_BOUNDARY) and not text.startswith(" "):
            return " " + text
        return text

    def _encode(self, token_id: int) -> bytes:
        text = self.text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        token = self._tokenizer.token(token_id)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's byte fallback
            return bytes([int(token[3:5], 16)])
        if all(character in BYTE_OF_CHARACTER for character in token):
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        return text.encode()

    def _is_known(self, token_id: int) -> bool:
        return token_id < self._tokenizer.num_ids and token_id not in self._tokenizer.unknown_ids


def _byte_alphabet() -> dict[str, int]:
    """Byte-level tokenizers write a byte as its Latin-1 character where that is printable, and the others, in order, as
    the characters from U+0100 on (Radford et al. 2019, GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
