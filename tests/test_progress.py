"""What is shown of a start: in a terminal alone, and no more often than something has changed."""

import io
import sys
import threading
from dataclasses import dataclass, field

import pytest

from jax_engine.frontend.progress import CompileBar, reports_of_start


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Compiling:
    """As much of `CompiledSteps` as is looked at."""

    num_ready: int = 3
    programs: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    eta: float = 7.0


def test_a_terminal_sees_how_many_programs_there_are_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with CompileBar() as bar:
        bar.update(0, 5, 0.0)
        bar.update(2, 5, 30.2)
        drawn = sys.stderr.getvalue()  # type: ignore[attr-defined]
        bar.update(2, 5, 30.1)
        assert sys.stderr.getvalue() == drawn  # type: ignore[attr-defined]
    assert "compiling step programs: 0/5" in drawn
    assert "2/5" in drawn and "about 30 s left" in drawn


def test_nothing_is_shown_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with CompileBar() as bar:
        bar.update(0, 5, 0.0)
        bar.update(2, 5, 30.0)
    assert capsys.readouterr() == ("", "")


def test_a_start_is_reported_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_engine.frontend.progress.REPORT_SECONDS", 0.01)
    told: list[tuple[int, int, float]] = []
    heard = threading.Event()

    def tell(*report: float) -> None:
        told.append(report)  # type: ignore[arg-type]
        heard.set()

    with reports_of_start(tell) as watch:
        watch(Compiling())  # type: ignore[arg-type]
        assert heard.wait(10)
    assert told[0] == (3, 5, 7.0)
    count = len(told)
    assert not any(thread.name == "reports of the start" for thread in threading.enumerate())
    assert len(told) == count
