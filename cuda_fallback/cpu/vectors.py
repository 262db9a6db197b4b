"""What Numba has no words for: vectors of floats in registers, and memory by its address.

Each function here becomes instructions in the place of its call. Arrays are one-dimensional and contiguous, offsets and
strides count elements, and nothing is checked.
"""

from typing import Any, no_type_check

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

KEYS = 64  # of a block
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8  # of the widest vectors

_FLOAT, _INDEX, _HALF = ir.FloatType(), ir.IntType(64), ir.IntType(16)


class _Emitter:
    """Writes the instructions of one call."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any) -> None:
        self.context, self.builder, self.kinds = context, builder, signature.args

    def pointer(self, argument: int, array: ir.Value, place: ir.Value) -> ir.Value:
        """To an element of the array that is an argument."""
        data = self.context.make_array(self.kinds[argument])(self.context, self.builder, array).data
        return self.builder.gep(data, [place])

    def load(self, pointer: ir.Value, lanes: int) -> ir.Value:
        """So many neighbours, as floats."""
        element = pointer.type.pointee
        wide = self.builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())
        if element == _FLOAT:
            return self.builder.load(wide, align=4)
        bits = self.builder.zext(self.builder.load(wide, align=2), ir.VectorType(ir.IntType(32), lanes))
        shift = ir.Constant(bits.type, [16] * lanes)
        return self.builder.bitcast(self.builder.shl(bits, shift), ir.VectorType(_FLOAT, lanes))

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer()), align=4)

    def broadcast(self, value: ir.Value, lanes: int) -> ir.Value:
        nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(first, nothing, [0] * lanes)

    def shuffle(self, first: ir.Value, second: ir.Value, lanes: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self.builder.shuffle_vector(first, second, mask)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))

    def plus(self, base: ir.Value, amount: int) -> ir.Value:
        return self.builder.add(base, ir.Constant(_INDEX, amount))

    def times(self, base: ir.Value, amount: ir.Value | int) -> ir.Value:
        return self.builder.mul(base, amount if isinstance(amount, ir.Value) else ir.Constant(_INDEX, amount))

    def constant(self, value: float, lanes: int = LANES) -> ir.Value:
        return ir.Constant(ir.VectorType(_FLOAT, lanes), [value] * lanes)

    def call(self, name: str, *arguments: ir.Value) -> ir.Value:
        """One of LLVM's own operations on vectors of floats."""
        kind = arguments[0].type
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(kind, [kind] * len(arguments)), f"llvm.{name}.v{kind.count}f32"
        )
        return self.builder.call(function, arguments)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def sum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.fadd(a, b)

    def all_lanes(self, combine: Any, value: ir.Value) -> ir.Value:
        """What `combine` makes of all lanes, halves first."""
        lanes = value.type.count
        while lanes > 1:
            lanes //= 2
            low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
            value = combine(self.shuffle(value, value, low), self.shuffle(value, value, high))
        return self.builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    def exponential(self, x: ir.Value) -> ir.Value:
        """e to the power of x, for x of 0 at most: `2**n * e**r`, with |r| at most log(2) / 2, by a polynomial."""
        builder, lanes = self.builder, x.type.count
        least = self.constant(-87.0, lanes)
        x = builder.select(builder.fcmp_ordered("<", x, least), least, x)  # which NaN passes
        whole = self.call("rint", builder.fmul(x, self.constant(1.4426950408889634, lanes)))
        rest = self.multiply_add(whole, self.constant(-0.693359375, lanes), x)
        rest = self.multiply_add(whole, self.constant(2.12194440e-4, lanes), rest)
        power = self.constant(1.9875691500e-4, lanes)
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
            power = self.multiply_add(power, rest, self.constant(factor, lanes))
        bits = ir.VectorType(ir.IntType(32), lanes)
        exponent = builder.add(builder.fptosi(whole, bits), ir.Constant(bits, [127] * lanes))
        scale = builder.bitcast(builder.shl(exponent, ir.Constant(bits, [23] * lanes)), x.type)
        return builder.fmul(power, scale)

    def capped(self, x: ir.Value, cap: ir.Value) -> ir.Value:
        """`cap * tanh(x / cap)`."""
        x = self.builder.fdiv(x, cap)
        size = self.call("fabs", x)
        shrunk = self.exponential(self.builder.fmul(size, self.constant(-2.0)))
        one = self.constant(1.0)
        bent = self.builder.fdiv(self.builder.fsub(one, shrunk), self.builder.fadd(one, shrunk))
        return self.builder.fmul(cap, self.call("copysign", bent, x))

    def running(self, lanes: int) -> ir.Value:
        """A place on the stack for a vector, which ends up in a register."""
        return cgutils.alloca_once(self.builder, ir.VectorType(_FLOAT, lanes))


@intrinsic
@no_type_check
def memory(typing_context, address):
    """An address as a pointer that `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
@no_type_check
def word(typing_context, address, place):
    """The 64-bit word in a place behind an address."""

    def generate(context, builder, signature, arguments):
        words = builder.inttoptr(arguments[0], _INDEX.as_pointer())
        return builder.load(builder.gep(words, [arguments[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
@no_type_check
def set_word(typing_context, address, place, value):
    """Set the 64-bit word in a place behind an address."""

    def generate(context, builder, signature, arguments):
        words = builder.inttoptr(arguments[0], _INDEX.as_pointer())
        builder.store(arguments[2], builder.gep(words, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
@no_type_check
def read(typing_context, array, place):
    """An element as float32: of an array of float32, or of bfloat16 as the bits of uint16."""

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature)
        wide = emit.load(emit.pointer(0, *arguments), 1)
        return builder.extract_element(wide, ir.Constant(ir.IntType(32), 0))

    return types.float32(array, place), generate


@intrinsic
@no_type_check
def write(typing_context, array, place, value):
    """Set an element to a float32, rounded to the nearest, ties to even, in an array of bfloat16."""

    def generate(context, builder, signature, arguments):
        emit, word = _Emitter(context, builder, signature), ir.IntType(32)
        array, place, value = arguments
        pointer = emit.pointer(0, array, place)
        if pointer.type.pointee != _FLOAT:
            bits = builder.bitcast(value, word)
            is_odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.add(bits, builder.add(is_odd, word(0x7FFF)))
            rounded = builder.select(builder.fcmp_unordered("uno", value, value), word(0x7FC00000), rounded)
            value = builder.trunc(builder.lshr(rounded, word(16)), _HALF)
        builder.store(value, pointer)
        return context.get_dummy_value()

    return types.void(array, place, value), generate


@intrinsic
@no_type_check
def transpose(typing_context, source, first, stride, target, to, to_stride):
    """`target[to + h * to_stride + s] = source[first + s * stride + h]` for 8 `s` and 8 `h`."""

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature)
        source, first, stride, target, to, to_stride = arguments
        rows = []
        for row in range(8):
            place = builder.add(first, builder.mul(stride, ir.Constant(_INDEX, row)))
            rows.append(emit.load(emit.pointer(0, source, place), 8))
        for distance in (4, 2, 1):
            # Of two rows, what lies to one side of the diagonal of a square of two such squares changes places.
            low = [lane + 8 - distance if lane & distance else lane for lane in range(8)]
            high = [lane + 8 if lane & distance else lane + distance for lane in range(8)]
            for row in range(8):
                if not row & distance:
                    pair = rows[row], rows[row + distance]
                    rows[row], rows[row + distance] = emit.shuffle(*pair, low), emit.shuffle(*pair, high)
        for row in range(8):
            place = builder.add(to, builder.mul(to_stride, ir.Constant(_INDEX, row)))
            emit.store(rows[row], emit.pointer(3, target, place))
        return context.get_dummy_value()

    return types.void(source, first, stride, target, to, to_stride), generate


@intrinsic(prefer_literal=True)
@no_type_check
def write_scores(typing_context, queries, first, head_dim, keys, out, to, num_rows):
    """`out[to + r * KEYS + s]` = the sum over h of `queries[first + r * head_dim + h] * keys[h * KEYS + s]`, for all
    `s` of a block and `num_rows`, a literal.
    """
    rows, at_once = num_rows.literal_value, min(KEYS // LANES, 4)

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature)
        queries, first, head_dim, keys, out, to, _ = arguments
        for begin in range(0, KEYS, at_once * LANES):
            sums = [[emit.running(LANES) for _ in range(at_once)] for _ in range(rows)]
            for place in [place for row in sums for place in row]:
                builder.store(ir.Constant(place.type.pointee, [0.0] * LANES), place)
            with cgutils.for_range(builder, head_dim, intp=_INDEX) as loop:
                line = emit.times(loop.index, KEYS)
                columns = [
                    emit.load(emit.pointer(3, keys, emit.plus(line, begin + v * LANES)), LANES) for v in range(at_once)
                ]
                for r in range(rows):
                    place = builder.add(first, builder.add(emit.times(head_dim, r), loop.index))
                    query = emit.broadcast(builder.load(emit.pointer(0, queries, place)), LANES)
                    for v in range(at_once):
                        builder.store(emit.multiply_add(query, columns[v], builder.load(sums[r][v])), sums[r][v])
            for r in range(rows):
                for v in range(at_once):
                    place = emit.plus(to, r * KEYS + begin + v * LANES)
                    emit.store(builder.load(sums[r][v]), emit.pointer(4, out, place))
        return context.get_dummy_value()

    return types.void(queries, first, head_dim, keys, out, to, num_rows), generate


@intrinsic(prefer_literal=True)
@no_type_check
def add_values(typing_context, weights, first, values, start, stride, count, sums, to, sums_stride, num_rows, lanes):
    """`sums[to + r * sums_stride + h]` += the sum over s < `count` of `weights[first + r * KEYS + s] * values[start +
    s * stride + h]`, for `num_rows` and as many `h` as there are `lanes`, both literals.
    """
    rows, width = num_rows.literal_value, min(LANES, lanes.literal_value)
    at_once = lanes.literal_value // width

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature)
        weights, first, values, start, stride, count, sums, to, sums_stride, _, _ = arguments
        places = [
            [
                emit.pointer(6, sums, emit.plus(builder.add(to, emit.times(sums_stride, r)), v * width))
                for v in range(at_once)
            ]
            for r in range(rows)
        ]
        running = [[emit.running(width) for _ in range(at_once)] for _ in range(rows)]
        for r in range(rows):
            for v in range(at_once):
                builder.store(emit.load(places[r][v], width), running[r][v])
        with cgutils.for_range(builder, count, intp=_INDEX) as loop:
            line = builder.add(start, builder.mul(loop.index, stride))
            columns = [emit.load(emit.pointer(2, values, emit.plus(line, v * width)), width) for v in range(at_once)]
            for r in range(rows):
                place = builder.add(first, emit.plus(loop.index, r * KEYS))
                weight = emit.broadcast(builder.load(emit.pointer(0, weights, place)), width)
                for v in range(at_once):
                    builder.store(emit.multiply_add(weight, columns[v], builder.load(running[r][v])), running[r][v])
        for r in range(rows):
            for v in range(at_once):
                emit.store(builder.load(running[r][v]), places[r][v])
        return context.get_dummy_value()

    signature = (weights, first, values, start, stride, count, sums, to, sums_stride, num_rows, lanes)
    return types.void(*signature), generate


@intrinsic(prefer_literal=True)
@no_type_check
def weigh_scores(typing_context, scores, to, first, end, soft_cap, largest, total, row, is_capped):
    """Softmax weights in the place of a block's scores, those of `first <= s < end`, the others zero.

    `largest[row]` and `total[row]` are of the softmax so far, and replaced. Returned is what all weights so far have to
    be multiplied by.
    """

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature)
        scores, to, first, end, soft_cap, largest, total, row, _ = arguments
        short = ir.IntType(32)
        first, end = (emit.broadcast(builder.trunc(bound, short), LANES) for bound in (first, end))
        nothing = emit.constant(-1e30)
        places, seen, values = [], [], []
        for begin in range(0, KEYS, LANES):
            places.append(emit.pointer(0, scores, emit.plus(to, begin)))
            lane = ir.Constant(first.type, list(range(begin, begin + LANES)))
            seen.append(builder.and_(builder.icmp_signed(">=", lane, first), builder.icmp_signed("<", lane, end)))
            value = emit.load(places[-1], LANES)
            if is_capped.literal_value:
                value = emit.capped(value, emit.broadcast(soft_cap, LANES))
            values.append(builder.select(seen[-1], value, nothing))
        most = values[0]
        for value in values[1:]:
            most = emit.larger(most, value)
        largest_place, total_place = emit.pointer(5, largest, row), emit.pointer(6, total, row)
        before = builder.load(largest_place)
        new = emit.larger(emit.all_lanes(emit.larger, most), before)
        wide = emit.broadcast(new, LANES)
        added = emit.constant(0.0)
        for place, is_seen, value in zip(places, seen, values, strict=True):
            weight = builder.select(is_seen, emit.exponential(builder.fsub(value, wide)), emit.constant(0.0))
            emit.store(weight, place)
            added = builder.fadd(added, weight)
        shrink = emit.exponential(emit.broadcast(builder.fsub(before, new), 4))
        shrink = builder.extract_element(shrink, ir.Constant(short, 0))
        builder.store(new, largest_place)
        sum_before = builder.fmul(builder.load(total_place), shrink)
        builder.store(builder.fadd(sum_before, emit.all_lanes(emit.sum, added)), total_place)
        return shrink

    signature = (scores, to, first, end, soft_cap, largest, total, row, is_capped)
    return types.float32(*signature), generate
