"""Sharing a call's work with the other threads of XLA.

A call puts its items in the hands of whoever comes: itself, and threads of XLA's pool, which are asked to help and may
come late or never. Each takes the next item until there are none, and the call ends when all are done. What a thread
that comes late looks at, a *block* of counters, outlives the call: whoever leaves it last frees it.
"""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jax_engine.cuda_fallback.cpu.vectors import set_word, word

# Words of a call frame, of the interface's functions, and of a block.
INTERFACE, CONTEXT = 2, 3
DESTROY_ERROR, SCHEDULE, NUM_THREADS = 8, 17, 18
NEXT_ITEM, NUM_DONE, NUM_USERS = 0, 8, 16  # in cache lines of their own
NUM_ITEMS, FRAME, TASK, BLOCK_WORDS = 24, 25, 26, 32

_WORD = ir.IntType(64)


@no_type_check
def _at(builder, address, place):
    return builder.gep(builder.inttoptr(address, _WORD.as_pointer()), [place])


@intrinsic
@no_type_check
def add(typing_context, address, place, amount):
    """Add to a word that other threads use too; returned is what it was."""

    def generate(context, builder, signature, arguments):
        address, place, amount = arguments
        return builder.atomic_rmw("add", _at(builder, address, place), amount, "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
@no_type_check
def look(typing_context, address, place):
    """A word that other threads use too, and all that they wrote before they changed it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_at(builder, *arguments), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
@no_type_check
def call(typing_context, function, argument):
    """Call a C function of one 64-bit argument and such a result, by its address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_WORD, [_WORD])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
@no_type_check
def address_of(typing_context, symbol):
    """The address of a C function by its name, a literal: of the process, or from `llvmlite.binding.add_symbol`."""
    name = symbol.literal_value

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_WORD, [_WORD])
        return builder.ptrtoint(cgutils.get_or_insert_function(builder.module, kind, name), _WORD)

    return types.int64(symbol), generate


@njit(inline="always")
@no_type_check
def open_block(frame, task):
    """A block for a call, which is its first user; the number of items is -1, not known yet."""
    block = call(address_of("malloc"), BLOCK_WORDS * 8)
    for place in (NEXT_ITEM, NUM_DONE):
        set_word(block, place, 0)
    set_word(block, NUM_USERS, 1)
    set_word(block, NUM_ITEMS, -1)
    set_word(block, FRAME, frame)
    set_word(block, TASK, task)
    return block


@njit(inline="always")
@no_type_check
def num_threads(block):
    """Threads of XLA's pool; 1 where it says nothing of one."""
    frame = word(block, FRAME)
    interface = word(frame, INTERFACE)
    given = np.zeros(5, np.int64)
    given[0], given[2], given[3] = 32, word(frame, CONTEXT), given.ctypes.data + 32
    error = call(word(interface, NUM_THREADS), given.ctypes.data)
    if error:
        destroy(interface, error)
    return max(given[4], 1)


@njit(inline="always")
@no_type_check
def ask_for_help(block):
    """Have a thread of the pool call the task, some time, with the block."""
    frame = word(block, FRAME)
    interface = word(frame, INTERFACE)
    add(block, NUM_USERS, 1)
    given = np.zeros(5, np.int64)
    given[0], given[2], given[3], given[4] = 40, word(frame, CONTEXT), word(block, TASK), block
    error = call(word(interface, SCHEDULE), given.ctypes.data)
    if error:
        destroy(interface, error)
        add(block, NUM_USERS, -1)


@njit(inline="always")
@no_type_check
def destroy(interface, error):
    """Free an error of XLA's."""
    given = np.zeros(3, np.int64)
    given[0], given[2] = 24, error
    call(word(interface, DESTROY_ERROR), given.ctypes.data)


@njit(inline="always")
@no_type_check
def wait(block):
    """Until all items are done: others may be at their last."""
    while look(block, NUM_DONE) < look(block, NUM_ITEMS):
        call(address_of("sched_yield"), 0)


@njit(inline="always")
@no_type_check
def leave_block(block):
    if add(block, NUM_USERS, -1) == 1:
        call(address_of("free"), block)
