"""How often a loop of a compiled program runs."""

import json
import re

from jax_engine.plan.hlo_text import Computation, Instruction, Module

_SAME_VALUE = ("bitcast", "convert", "copy", "reshape")


def trip_count(loop: Instruction, computation: Computation, module: Module) -> int | None:
    """Trips of a `while` instruction of `computation`; None where they depend on data.

    A CPU's and a GPU's text says it. A TPU's does not: there it is what a counter, which begins at a constant, takes
    to reach the constant that the condition compares it with.
    """
    if match := re.search(r'"known_trip_count":(\{[^}]*\})', loop.attributes):
        return int(json.loads(match[1])["n"])
    condition = module.computations[loop.called("condition")[0]]
    compared = condition.root
    direction = re.search(r"direction=(\w+)", compared.attributes)
    if compared.opcode != "compare" or direction is None:
        return None
    sides = [_origin(name, condition) for name in compared.operands]
    counter = next((_place(side) for side in sides if side.opcode == "get-tuple-element"), None)
    limits = [side for side in sides if side.opcode == "constant"]
    if counter is None or len(limits) != 1 or direction[1] not in ("LT", "LE"):
        return None
    start = _start(loop, counter, computation)
    step = _step(module.computations[loop.called("body")[0]], counter)
    if start is None or step is None or limits[0] is not sides[1]:
        return None
    end = int(limits[0].operands[0]) + (direction[1] == "LE")
    return max(0, -(-(end - start) // step))


def _origin(name: str, computation: Computation) -> Instruction:
    """Where a value comes from, past copies of it."""
    value = computation.instructions[name]
    while value.opcode in _SAME_VALUE:
        value = computation.instructions[value.operands[0]]
    return value


def _place(value: Instruction) -> int:
    """Which element of the loop's state a value is."""
    match = re.search(r"index=(\d+)", value.attributes)
    assert match is not None, "a get-tuple-element says which"
    return int(match[1])


def _start(loop: Instruction, counter: int, computation: Computation) -> int | None:
    state = computation.instructions[loop.operands[0]]
    if state.opcode != "tuple":
        return None
    start = _origin(state.operands[counter], computation)
    return int(start.operands[0]) if start.opcode == "constant" else None


def _step(body: Computation, counter: int) -> int | None:
    """What a trip adds to the counter: JAX's loops add 1, and the compiler may have unrolled them."""
    if body.root.opcode != "tuple":
        return None
    after = _origin(body.root.operands[counter], body)
    if after.opcode != "add":
        return None
    sides = [_origin(name, body) for name in after.operands]
    constants = [int(side.operands[0]) for side in sides if side.opcode == "constant"]
    return constants[0] if len(constants) == 1 else None
