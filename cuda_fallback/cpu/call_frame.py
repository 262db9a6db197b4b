"""What XLA hands to a foreign function: reading `XLA_FFI_CallFrame` of `xla/ffi/api/c_api.h` (in `jaxlib/include`).

An address is an int64, and a structure is seen as its 64-bit words. XLA keeps this layout while the interface's major
version is 0, which it checks when a function is registered.
"""

from typing import no_type_check

from numba import carray, njit
from numpy.typing import NDArray

from jax_engine.cuda_fallback.cpu.vectors import memory, set_word, word

# Which word of a call frame has what; of a buffer; of an extension of the call; of the answer to a question.
EXTENSION, ARGUMENTS, RESULTS, ATTRIBUTES = 1, 9, 14, 20
DATA, DIMENSIONS = 3, 5
KIND, QUESTION = 1, 3
VERSION, TRAITS = 3, 4
METADATA = 1  # the kind of an extension that asks
MAJOR_VERSION, MINOR_VERSION = 0, 3  # of the interface that this was written against


@njit(inline="always")
@no_type_check
def answer_question(extension: int) -> None:
    """XLA asks a function that it is given which version of the interface it is for, by a call with an extension."""
    if word(extension, KIND) & 0xFFFFFFFF == METADATA:
        metadata = word(extension, QUESTION)
        set_word(metadata, VERSION, MAJOR_VERSION | MINOR_VERSION << 32)
        set_word(metadata, TRAITS, word(metadata, TRAITS) >> 32 << 32)  # none, in half a word


@njit(inline="always")
@no_type_check
def dimension(buffer: int, axis: int) -> int:
    return word(word(buffer, DIMENSIONS), axis)


@njit(inline="always")
@no_type_check
def elements(buffer: int, size: int, dtype: type) -> NDArray:
    """A buffer of `size` elements, flat."""
    return carray(memory(word(buffer, DATA)), (size,), dtype)


@njit(inline="always")
@no_type_check
def scalar(attribute: int, dtype: type):
    """The value of a scalar attribute."""
    return carray(memory(word(attribute, 1)), (1,), dtype)[0]
