"""A process in which grammars are tried out: `python -m jax_engine.grammar.grammar_process`.

A grammar is a program of the user's. There are some that exhaust the compiler's stack, which ends the process, and some
that take it minutes. So each is compiled and tried here first, under a time limit and on a smaller stack than the
engine core has for it.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping

import msgspec
import numpy as np

from jax_engine.core.messages import Vocabulary
from jax_engine.grammar.bitmasks import ids_of
from jax_engine.grammar.grammars import error_of, grammar_text, make_mask, new_matcher, special_token_ids
from jax_engine.grammar.tag_formats import schemas_of
from jax_engine.structured_outputs import StructuredOutputsParams

START_SECONDS = 60.0  # loading a large vocabulary, on a busy machine
MASK_SECONDS = 0.1  # of processor time, for one token of one request
STACK_BYTES = 8 * 2**20  # the engine core has `constraints.STACK_BYTES`
NUM_TRIED_TOKENS = 32


class Checked(msgspec.Struct, frozen=True):
    """The answer about one form: its grammar, or what is wrong with it."""

    grammar: str = ""
    error: str = ""


class GrammarProcess:
    """One such process, which checks one grammar at a time. Mutable; owned by a `GrammarChecker`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Start it; ValueError when it cannot read the vocabulary."""
        command = (sys.executable, "-P", "-m", "jax_engine.grammar.grammar_process")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._end = weakref.finalize(self, _end, self.process)
        if not self._exchange(msgspec.json.encode(vocabulary), START_SECONDS):
            self._end()
            raise ValueError("structured_outputs: llguidance cannot read the model's tokenizer; leave them out")

    @property
    def is_alive(self) -> bool:
        return self._end.alive

    def ask(self, form: bytes, seconds: float) -> Checked:
        """Its answer about a form. It is ended where that takes more than so many seconds, or ends it."""
        answer = self._exchange(form, seconds)
        if answer:
            return msgspec.json.decode(answer, type=Checked)
        self._end()
        if answer is None:
            return Checked(error=f"it takes more than {seconds:g} seconds to compile")
        return Checked(error="it is nested too deeply to compile")

    def _exchange(self, line: bytes, seconds: float) -> bytes | None:
        """Send a line and return the one that comes back: None after that many seconds, empty when it has ended."""
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        deadline, answer = time.monotonic() + seconds, b""
        while not answer.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            read = os.read(process.stdout.fileno(), 2**16)
            if not read:
                return b""
            answer += read
        return answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process, by force, and let go of what it held."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            pipe.close()


def check(form: bytes, vocabulary: Vocabulary, special_ids: Mapping[str, int]) -> Checked:
    """Compile one form, given as JSON, and follow it for a few tokens."""
    try:
        params = StructuredOutputsParams(**msgspec.json.decode(form))
        grammar = grammar_text(params, special_ids)
        matcher = new_matcher(grammar, vocabulary)
    except (ValueError, RecursionError) as error:
        return Checked(error=_bad_schema(params, vocabulary) or str(error) or type(error).__name__)
    for count in range(NUM_TRIED_TOKENS):
        start = time.thread_time()
        mask = make_mask(matcher, vocabulary.size)
        seconds = time.thread_time() - start
        if reason := error_of(matcher):
            return Checked(error=reason if count else f"no output meets it, or it is too complex ({reason})")
        if seconds > MASK_SECONDS:
            return Checked(error=f"it takes {seconds:.2f} seconds to find the tokens that may come next; simplify it")
        allowed = np.setdiff1d(ids_of(mask), vocabulary.eos_token_ids)
        if not len(allowed):
            break
        matcher.consume_token(int(allowed[7919 * count % len(allowed)]))  # some choice, but always the same
    return Checked(grammar=grammar)


def _bad_schema(params: StructuredOutputsParams, vocabulary: Vocabulary) -> str:
    """Which schema of a structural tag cannot be followed, and why; empty where that is not what is wrong."""
    name, value = params.form
    if name != "structural_tag":
        return ""
    try:
        schemas = schemas_of(json.loads(value) if isinstance(value, str) else value)
    except (KeyError, TypeError, ValueError):
        return ""
    for index, schema in enumerate(schemas):
        try:
            new_matcher(grammar_text(StructuredOutputsParams(json=schema), {}), vocabulary)
        except ValueError as error:
            return f"schema {index}: {error}"
    return ""


def _serve() -> None:
    """Answer line by line until there are no more."""
    vocabulary = msgspec.json.decode(sys.stdin.buffer.readline(), type=Vocabulary)
    special_ids = special_token_ids(vocabulary)
    ready = new_matcher('start: ""', vocabulary)
    assert not ready.is_error()
    sys.stdout.buffer.write(b"{}\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(check(line, vocabulary, special_ids)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    server = threading.Thread(target=_serve)
    server.start()
    server.join()
