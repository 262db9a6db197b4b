"""Sets of tokens as bitmasks, on the host: bit v % 32 of word v // 32 says whether token v is in the set."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32
ALL_TOKENS = np.uint32(0xFFFFFFFF)  # a word with every bit set


def num_words(vocab_size: int) -> int:
    """Of one bitmask."""
    return -(-vocab_size // WORD_BITS)


def all_tokens(num_rows: int, vocab_size: int) -> NDArray[np.uint32]:
    """Bitmasks with every bit set, those past the vocabulary too: [num_rows, words]."""
    return np.full((num_rows, num_words(vocab_size)), ALL_TOKENS)


def pack_bits(tokens: Iterable[int], vocab_size: int) -> NDArray[np.uint32]:
    """The bitmask of these tokens: [words]."""
    bits = np.zeros(num_words(vocab_size) * WORD_BITS, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def has_bit(mask: NDArray[np.uint32], token: int) -> bool:
    """Whether a token is in a bitmask."""
    return bool(mask[token // WORD_BITS] >> np.uint32(token % WORD_BITS) & np.uint32(1))


def ids_of(mask: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The tokens of a bitmask, in ascending order."""
    return np.flatnonzero(np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little"))
