"""Text as it is generated: exact to the character, at a bounded cost a token, and no part of a stop string."""

from collections.abc import Sequence

from jax_engine.frontend.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are not, or not yet, UTF-8
# A UTF-8 character has at most four bytes, so at most three tokens can be waiting for its rest.
MAX_UNFINISHED_TOKENS = 3
# Decoding costs about 1 µs, and 0.1 µs a token: a window of this size is cheap to decode and rarely needs to be cut.
WINDOW_TOKENS = 16


class IncrementalDetokenizer:
    """Text of a growing token sequence. Mutable; owned by one sequence.

    The pieces that `push` and the last `flush` return join to what decoding all tokens at once gives. Tokens are
    decoded in a short window that begins with some whose text was already returned: many decoders treat the first
    token of a text differently (`prompt_token_ids` are such a beginning). Bytes that may still become a character are
    held until they do; whether they do is asked of the decoder, not assumed of it.

    A byte-fallback decoder (SentencePiece) finds a whole run of bytes malformed as soon as one of them is; characters
    of the run which were returned before that stay as they were.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        # Where special tokens are skipped, the other setting says nothing.
        as_decoded = skip_special_tokens or spaces_between_special_tokens
        self._decode = tokenizer.decode if as_decoded else tokenizer.decode_without_spaces
        self._num_ids = tokenizer.num_ids
        self._skipped = tokenizer.skipped_ids(skip_special_tokens=skip_special_tokens)
        self._window = self._visible(prompt_token_ids[-WINDOW_TOKENS:])
        text = self._decode(self._window)
        self._shown = len(text) - text.endswith(REPLACEMENT)  # characters of the window's text that were returned
        # The two latest numbers of tokens after which the window's text ended in whole characters.
        self._whole_before, self._whole = 0, len(self._window) if self._shown == len(text) else 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the new text, as far as no further token can change it."""
        visible = self._visible(token_ids)
        if not visible:
            return ""
        self._window += visible
        text = settled = self._decode(self._window)
        whole: int | None = len(self._window)
        if text.endswith(REPLACEMENT):
            settled, whole = self._settle(text)
        new = settled[self._shown :]
        self._shown += len(new)
        if whole is not None and whole > self._whole:
            self._whole_before, self._whole = self._whole, whole
        if len(self._window) > WINDOW_TOKENS:
            self._cut(malformed=whole is None)
        return new

    def flush(self) -> str:
        """The text still held, now that no token follows: an unfinished character becomes U+FFFD."""
        text = self._decode(self._window)
        new = text[self._shown :]
        self._shown += len(new)
        return new

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if token < self._num_ids and token not in self._skipped]

    def _settle(self, text: str) -> tuple[str, int | None]:
        """The settled part of a text that ends in U+FFFD, and the number of tokens it stands for (None: malformed)."""
        for count in range(1, MAX_UNFINISHED_TOKENS + 1):
            shorter = self._decode(self._window[:-count])
            if not shorter.endswith(REPLACEMENT):
                return shorter, max(0, len(self._window) - count)
        # That many tokens are no unfinished character: these bytes are malformed, and only the last may begin a
        # character.
        return text[:-1], None

    def _cut(self, *, malformed: bool) -> None:
        """Drop the window's oldest tokens, up to where a character begins."""
        start = self._whole_before
        if malformed and start == 0:
            # There is no such place. UTF-8 finds its way again within the bytes of one character.
            start = len(self._window) - MAX_UNFINISHED_TOKENS - 1
        if start == 0:
            return
        self._window = self._window[start:]
        self._whole_before, self._whole = 0, max(0, self._whole - start)
        if malformed:
            self._shown = len(self._decode(self._window)) - 1
        else:
            self._shown = len(self._decode(self._window[: self._whole]))


class StopStrings:
    """The stop strings of one request, compiled for matching character by character (Knuth, Morris and Pratt 1977).

    Immutable, so that the request's sequences share it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.fallbacks = tuple(_fallbacks(string) for string in self.strings)
        self.first_characters = frozenset(string[0] for string in self.strings)


class StopMatcher:
    """Finds the first stop string to be complete in a growing text. Mutable; owned by one sequence.

    Which one is found, and where, depends on the characters alone and not on the pieces that they arrive in. Of two
    that end at the same character the longer one counts.
    """

    def __init__(self, stops: StopStrings, *, include_stop_string: bool) -> None:
        self._stops = stops
        self._include = include_stop_string
        self._matched = [0] * len(stops.strings)  # characters of each stop string that the text ends with
        self._held = ""  # the end of the text, which may begin a stop string

    def push(self, new: str, *, armed: bool) -> tuple[str, str | None]:
        """Take more text; returns what may be shown of it, and the stop string that ends it, if one does.

        With `armed` False a stop string that ends within `new` does not count.
        """
        if not self._held and self._stops.first_characters.isdisjoint(new):
            return new, None
        text = self._held + new
        for position in range(len(self._held), len(text)):
            found = self._advance(text[position])
            if found is not None and armed:
                end = position + 1 if self._include else position + 1 - len(found)
                return text[:end], found
        end = len(text) - max(self._matched)
        self._held = text[end:]
        return text[:end], None

    def flush(self) -> str:
        """The text still held, now that none follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Move every match on by one character; returns the longest stop string that is now complete."""
        found: str | None = None
        for index, (string, fallback) in enumerate(zip(self._stops.strings, self._stops.fallbacks, strict=True)):
            count = self._matched[index]
            while count and string[count] != character:
                count = fallback[count - 1]
            if string[count] == character:
                count += 1
            if count == len(string):
                found = string if found is None or len(string) > len(found) else found
                count = fallback[count - 1]
            self._matched[index] = count
        return found


def _fallbacks(string: str) -> tuple[int, ...]:
    """For each prefix of `string`, the length of the longest shorter prefix that it ends with."""
    lengths = [0]
    for character in string[1:]:
        length = lengths[-1]
        while length and string[length] != character:
            length = lengths[length - 1]
        lengths.append(length + (string[length] == character))
    return tuple(lengths)
