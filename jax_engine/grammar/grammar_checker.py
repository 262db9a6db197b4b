"""Finds out whether grammars can be followed, each in a process of its own beside others (`grammar_process.py`)."""

import threading
from collections import OrderedDict
from concurrent.futures import Future

import msgspec

from jax_engine.core.messages import Vocabulary
from jax_engine.grammar.grammar_process import Checked, GrammarProcess
from jax_engine.structured_outputs import StructuredOutputsParams

CHECK_SECONDS = 10.0  # for one grammar
PATIENCE_SECONDS = 0.1  # for which a grammar waits for others before one more process is started for it
MAX_PROCESSES = 4  # each has the vocabulary: some 100 MB where that is large
NUM_KEPT_GRAMMARS = 256


class GrammarChecker:
    """Turns forms into grammars that are known to work. Mutable; threads may share it.

    Several forms are checked at once, and a form that several threads ask about only once. The first process starts
    with the first form, others when all are busy for long, and again when a form has ended one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._changing = threading.Condition()  # guards what follows
        self._idle: list[GrammarProcess] = []
        self._num_busy = 0  # or starting
        self._checking: dict[bytes, Future[Checked]] = {}
        self._kept: OrderedDict[bytes, Checked] = OrderedDict()  # of forms that were asked for lately

    def grammar(self, params: StructuredOutputsParams) -> str:
        """The grammar of a form. Takes milliseconds, or as many seconds as are allowed: call it in a thread.

        Raises:
            ValueError: it cannot be followed, or not fast enough; the message says why.
        """
        checked = self._checked(msgspec.json.encode(params))
        if checked.error:
            name, value = params.form
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise ValueError(f"structured_outputs.{name}={shown} cannot be followed: {checked.error}; correct it")
        return checked.grammar

    def _checked(self, form: bytes) -> Checked:
        """The answer about a form: that which is kept, or which another thread waits for, or a new one."""
        with self._changing:
            if form in self._kept:
                self._kept.move_to_end(form)
                return self._kept[form]
            others = self._checking.get(form)
            own: Future[Checked] = Future()
            if others is None:
                self._checking[form] = own
        if others is not None:
            return others.result()
        try:
            own.set_result(self._ask(form))
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._changing:
                del self._checking[form]
                if own.exception() is None and not own.result().error:
                    self._kept[form] = own.result()
                    if len(self._kept) > NUM_KEPT_GRAMMARS:
                        self._kept.popitem(last=False)
        return own.result()

    def _ask(self, form: bytes) -> Checked:
        """A process's answer."""
        process = self._take()
        try:
            process = process or GrammarProcess(self._vocabulary)
            return process.ask(form, CHECK_SECONDS)
        finally:
            with self._changing:
                self._num_busy -= 1
                if process is not None and process.is_alive:
                    self._idle.append(process)
                self._changing.notify()

    def _take(self) -> GrammarProcess | None:
        """A process with nothing to do; None for one that is to be started. Waits while there are too many."""
        with self._changing:
            self._changing.wait_for(lambda: self._idle or not self._num_busy, PATIENCE_SECONDS)
            self._changing.wait_for(lambda: self._idle or self._num_busy < MAX_PROCESSES)
            self._num_busy += 1
            return self._idle.pop() if self._idle else None
